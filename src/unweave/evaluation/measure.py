"""One evaluation while it runs: a batch goes through the model and the SAE, and every sum is updated."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations import MaskConfig, Masks, TokenBatch
from unweave.evaluation.behaviour import BehaviourSums, add_behaviour
from unweave.evaluation.causal_lm import CausalLM
from unweave.evaluation.sample import TokenHash, check_fit, rows_of
from unweave.evaluation.sums import CodeSums, ReconstructionSums
from unweave.models import Hook, LoadedModel, capture
from unweave.sae import SAE

MEDIAN_PROMPTS = 32
"""The median norm, which attention sinks are told by, is that of the first so many rows."""


class Measurement:
    """The sums of an evaluation. Model and SAE must be on one device and in evaluation mode, without gradients.

    Args:
        sae: The SAE.
        model: The model.
        hook: Where the SAE belongs.
        masks: Which tokens do not count.
        first: Batches of the first `MEDIAN_PROMPTS` rows or more, to check that all fits together and to measure the
            median norm. They are not added.

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

    def __init__(self, sae: SAE, model: LoadedModel, hook: Hook, masks: MaskConfig, first: list[TokenBatch]) -> None:
        self.sae, self.model, self.hook = sae, model, hook
        self.reconstruction, self.codes, self.behaviour = ReconstructionSums(), CodeSums(sae.d_sae), BehaviourSums()
        self.context = first[0].ids.shape[1]
        self.masks = Masks(masks, model.tokenizer, self.context)
        self.passes = self.prompts = self.padding = 0
        self.token_hash = TokenHash()
        self.notes: list[str] = []
        if model.tokenizer is None and masks.special_tokens:
            self.notes.append("without a tokenizer special tokens are not known, so none were masked")
        self._measure_median(first)
        self._lm = self._causal_lm(first[0])

    def add(self, batch: TokenBatch) -> None:
        """Run a batch and add it."""
        check_fit(self.model, batch)
        ids, real = self._on_device(batch)
        run = self._lm.run(ids, real) if self._lm else None
        x, mask = self._unmasked(batch, run.activation if run else self._activation(ids, real))
        codes = self.sae.encode_sparse(x)
        x_hat = self.sae.decode(codes)
        self.reconstruction.update(x, x_hat)
        self.codes.update(codes, mask.nonzero()[:, 0])
        if self._lm and run:
            add_behaviour(self.behaviour, self._lm, run, ids, real, mask, x_hat)
        self.token_hash.update(batch)
        self.passes += 1
        self.prompts += len(batch)
        self.padding += int((~batch.real).sum())

    def _on_device(self, batch: TokenBatch) -> tuple[Int64[Tensor, "n context"], Bool[Tensor, "n context"]]:
        return batch.ids.to(self.model.device), batch.real.to(self.model.device)

    def _activation(self, ids: Tensor, real: Tensor) -> Float[Tensor, "..."]:
        inputs: dict[str, Any] = {"input_ids": ids}
        if not bool(real.all()):
            inputs["attention_mask"] = real.long()
        (activation,) = capture(self.model.module, [self.hook], **inputs).values()
        return activation

    def _unmasked(
        self, batch: TokenBatch, activation: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "n_tokens d_in"], Bool[Tensor, "n context"]]:
        """The activations that count, and where they are."""
        mask = self.masks.by_token(batch).to(activation.device)
        x, lengths = self._rows(batch, activation, mask)
        if len(x):
            kept = self.masks.by_norm({str(self.hook): lengths})
            mask[mask.clone()] = kept
            x = x[kept]
        return x, mask

    def _rows(
        self, batch: TokenBatch, activation: Float[Tensor, "..."], mask: Bool[Tensor, "n context"]
    ) -> tuple[Float[Tensor, "n_tokens d_in"], Float[Tensor, " n_tokens"]]:
        """The activations at some tokens, and their lengths."""
        n_tokens = batch.ids.numel()
        if activation.shape[:2] != batch.ids.shape and activation.shape[0] != n_tokens:
            shapes = f"{tuple(activation.shape)} for tokens of shape {tuple(batch.ids.shape)}"
            raise UnweaveError(f"{str(self.hook)!r} gives activations of shape {shapes}: not one per token.")
        x = activation.reshape(n_tokens, -1)[mask.flatten()]
        if x.shape[1] != self.sae.d_in:
            raise UnweaveError(
                f"the SAE takes activations of width {self.sae.d_in}, but {str(self.hook)!r} of {self.model.name!r} "
                f"gives {x.shape[1]}."
            )
        lengths = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
        if not bool(lengths.isfinite().all()):
            raise UnweaveError(f"the activations at {str(self.hook)!r} are NaN or infinite in pass {self.passes + 1}.")
        return x, lengths

    def _measure_median(self, first: list[TokenBatch]) -> None:
        """Fix what "too long" means from a fixed number of rows, so that it depends on no batch size."""
        masks = Masks(self.masks.config, self.model.tokenizer, self.context)  # counts apart from the evaluation's
        lengths, seen = [], 0
        for batch in first:
            check_fit(self.model, batch)
            batch = rows_of(batch, slice(MEDIAN_PROMPTS - seen))
            seen += len(batch)
            activation = self._activation(*self._on_device(batch))
            lengths.append(self._rows(batch, activation, masks.by_token(batch).to(self.model.device))[1])
        together = torch.cat(lengths)
        if len(together):
            self.masks.report.median_norm = {str(self.hook): float(together.median())}

    def _causal_lm(self, batch: TokenBatch) -> CausalLM | None:
        module = self.model.module
        obstacle = CausalLM.obstacle(module, self.hook)
        if obstacle is None:
            lm = CausalLM(module, self.hook)
            if lm.reproduces(batch.ids[:1].to(self.model.device)):
                return lm
            obstacle = f"the predictions of {type(module).__name__} could not be reproduced from earlier tokens"
        self.notes.append(f"no metrics of behaviour: {obstacle}")
        return None
