"""One evaluation while it runs: a batch goes through the model and the SAE, and every sum is updated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations import MaskConfig, Masks, TokenBatch
from unweave.activations.masks import lengths_of
from unweave.evaluation.behaviour import BehaviourSums, add_behaviour
from unweave.evaluation.causal_lm import CausalLM
from unweave.evaluation.sample import AnyBatch, TokenHash, check_fit, rows_of
from unweave.evaluation.sums import CodeSums, ReconstructionSums
from unweave.models import Hook, LoadedModel, capture, dtype_of
from unweave.sae import SAE, TemporalSAE
from unweave.sae.codes import SparseCodes

MEDIAN_PROMPTS = 32
"""The median norm, which attention sinks are told by, is that of the first so many rows."""


class Measurement:
    """The sums of an evaluation. Model and SAE must be on one device and in evaluation mode, without gradients.

    Args:
        sae: The SAE.
        model: The model.
        hook: Where the SAE belongs: where its output takes the activation's place.
        masks: Which tokens do not count.
        first: Batches of the first `MEDIAN_PROMPTS` rows or more, to check that all fits together and to measure the
            median norm. They are not added.
        reads: The hooks that a transcoder reads, whose activations lie side by side; None: `hook` itself.
        context: Tokens in a row, at most; None: those of the first batch.

    Attributes:
        reconstruction: Sums over unmasked tokens.
        codes: Sums over the codes of unmasked tokens.
        behaviour: Sums over predictions of unmasked tokens; empty for a model that predicts no next token.
        masks: The masks, with their counts.
        context: Tokens in a row.
        passes: Batches added.
        prompts: Rows read.
        padding: Padding tokens read.
        token_hash: Hash of the tokens read.
        notes: What a reader has to know beside the numbers.

    Raises:
        UnweaveError: Tokens that are not the model's, a hook that is not of the SAE's width, activations that are NaN
            or infinite.
    """

    def __init__(
        self,
        sae: SAE,
        model: LoadedModel,
        hook: Hook,
        masks: MaskConfig,
        first: list[AnyBatch],
        reads: Sequence[Hook] | None = None,
        context: int | None = None,
    ) -> None:
        self.sae, self.model, self.hook = sae, model, hook
        self.reads = [hook] if reads is None else list(reads)
        self._hooks = list(dict.fromkeys([*self.reads, hook]))
        self.reconstruction, self.codes, self.behaviour = ReconstructionSums(), CodeSums(sae.d_sae), BehaviourSums()
        self.context = first[0].real.shape[1] if context is None else context
        self.masks = Masks(masks, model.tokenizer, self.context)
        self.passes = self.prompts = self.padding = 0
        self.token_hash = TokenHash()
        self.notes: list[str] = []
        if model.tokenizer is None and model.vision is None and masks.special_tokens:
            self.notes.append("without a tokenizer special tokens are not known, so none were masked")
        self._measure_median(first)
        self._lm = self._causal_lm(first[0])

    def add(self, batch: AnyBatch) -> None:
        """Run a batch and add it."""
        check_fit(self.model, batch)
        run = None
        if self._lm and isinstance(batch, TokenBatch):
            ids, real = self._on_device(batch)
            run = self._lm.run(ids, real)
        seen = dict(zip(self._hooks, run.read, strict=True)) if run else self._activations(batch)
        rows, mask = self._unmasked(batch, seen)
        x, y = torch.cat([rows[hook] for hook in self.reads], 1), rows[self.hook]
        if isinstance(self.sae, TemporalSAE):
            codes, y_hat = self._of_sequences(self.sae, seen[self.hook], mask)
        else:
            codes = self.sae.encode_sparse(x)
            y_hat = self.sae.output(codes, x)
        self.reconstruction.update(y, y_hat)
        self.codes.update(codes, mask.nonzero()[:, 0])
        if self._lm and run:
            add_behaviour(self.behaviour, self._lm, run, ids, real, mask, y_hat)
        self.token_hash.update(batch)
        self.passes += 1
        self.prompts += len(batch)
        self.padding += int((~batch.real).sum())

    def _of_sequences(
        self, sae: TemporalSAE, activation: Float[Tensor, "..."], mask: Bool[Tensor, "n context"]
    ) -> tuple[SparseCodes, Float[Tensor, "n_tokens d"]]:
        """The codes and outputs at some tokens of whole rows, all of whose tokens are read."""
        x = activation.reshape(*mask.shape, -1)
        codes, kept = sae.encode_sparse(x), mask.flatten()
        entries = kept[codes.rows]
        row_of_token = kept.cumsum(0) - 1
        found = SparseCodes.from_entries(
            row_of_token[codes.rows[entries]], codes.indices[entries], codes.values[entries], int(kept.sum()), sae.d_sae
        )
        return found, sae.output(codes, x)[kept]

    def _on_device(self, batch: TokenBatch) -> tuple[Int64[Tensor, "n context"], Bool[Tensor, "n context"]]:
        return batch.ids.to(self.model.device), batch.real.to(self.model.device)

    def _activations(self, batch: AnyBatch) -> dict[Hook, Float[Tensor, "..."]]:
        first, named = batch.inputs(self.model.device)
        if first.is_floating_point():  # pixels
            first = first.to(dtype_of(self.model.module))
        if isinstance(batch, TokenBatch):
            captured = capture(self.model.module, self._hooks, input_ids=first, **named)
        else:
            captured = capture(self.model.module, self._hooks, first, **named)
        return {hook: captured[str(hook)] for hook in self._hooks}

    def _unmasked(
        self, batch: AnyBatch, seen: dict[Hook, Float[Tensor, "..."]]
    ) -> tuple[dict[Hook, Float[Tensor, "n_tokens d"]], Bool[Tensor, "n context"]]:
        """The activations that count at each hook, and where they are."""
        mask = self.masks.by_token(batch).to(self.model.device)
        rows = {hook: self._rows(batch, hook, activation, mask) for hook, activation in seen.items()}
        self._check_widths({hook: x.shape[1] for hook, x in rows.items()})
        if len(rows[self.hook]):
            kept = self.masks.by_norm({str(hook): self._lengths(hook, x) for hook, x in rows.items()})
            mask[mask.clone()] = kept
            rows = {hook: x[kept] for hook, x in rows.items()}
        return rows, mask

    def _rows(
        self, batch: AnyBatch, hook: Hook, activation: Float[Tensor, "..."], mask: Bool[Tensor, "n context"]
    ) -> Float[Tensor, "n_tokens d"]:
        """The activations at some tokens."""
        n_tokens = batch.real.numel()
        if activation.shape[:2] != batch.real.shape and activation.shape[0] != n_tokens:
            shapes = f"{tuple(activation.shape)} for tokens of shape {tuple(batch.real.shape)}"
            raise UnweaveError(f"{str(hook)!r} gives activations of shape {shapes}: not one per token.")
        return activation.reshape(n_tokens, -1)[mask.flatten()]

    def _check_widths(self, widths: dict[Hook, int]) -> None:
        for verb, hooks, expected in (("takes", self.reads, self.sae.d_in), ("predicts", [self.hook], self.sae.d_out)):
            found = sum(widths[hook] for hook in hooks)
            if found != expected:
                places = ", ".join(repr(str(hook)) for hook in hooks)
                raise UnweaveError(
                    f"the SAE {verb} activations of width {expected}, but {places} of {self.model.name!r} gives "
                    f"{found}."
                )

    def _lengths(self, hook: Hook, x: Float[Tensor, "n_tokens d"]) -> Float[Tensor, " n_tokens"]:
        lengths = lengths_of(x)
        if not bool(lengths.isfinite().all()):
            raise UnweaveError(f"the activations at {str(hook)!r} are NaN or infinite in pass {self.passes + 1}.")
        return lengths

    def _measure_median(self, first: list[AnyBatch]) -> None:
        """Fix what "too long" means from a fixed number of rows, so that it depends on no batch size."""
        masks = Masks(self.masks.config, self.model.tokenizer, self.context)  # counts apart from the evaluation's
        lengths: dict[Hook, list[Tensor]] = {hook: [] for hook in self._hooks}
        read = 0
        for batch in first:
            check_fit(self.model, batch)
            batch = rows_of(batch, slice(MEDIAN_PROMPTS - read))
            read += len(batch)
            mask = masks.by_token(batch).to(self.model.device)
            seen = self._activations(batch)
            rows = {hook: self._rows(batch, hook, activation, mask) for hook, activation in seen.items()}
            self._check_widths({hook: x.shape[1] for hook, x in rows.items()})
            for hook, x in rows.items():
                lengths[hook].append(self._lengths(hook, x))
        together = {str(hook): torch.cat(parts) for hook, parts in lengths.items()}
        if len(together[str(self.hook)]):
            self.masks.report.median_norm = {name: float(x.median()) for name, x in together.items()}

    def _causal_lm(self, batch: AnyBatch) -> CausalLM | None:
        module = self.model.module
        if not isinstance(batch, TokenBatch):
            self.notes.append("no metrics of behaviour: images have no next token to predict")
            return None
        obstacle = CausalLM.obstacle(module, self.hook)
        if obstacle is None:
            lm = CausalLM(module, self.hook, self._hooks)
            if lm.reproduces(batch.ids[:1].to(self.model.device)):
                return lm
            obstacle = f"the predictions of {type(module).__name__} could not be reproduced from earlier tokens"
        self.notes.append(f"no metrics of behaviour: {obstacle}")
        return None
