"""Activations of a model at any number of hooks, from one forward pass per batch of rows.

Every pass yields the activations of its unmasked tokens, in the order of the text and in the model's own type; row `i`
is the same token at every hook. Activations that are not finite stop the stream with the hook's name.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations.masks import MaskConfig, MaskReport, Masks
from unweave.activations.tokens import TokenBatch, TokenRows
from unweave.models import Hook, LoadedModel, capture

_MAX_EMPTY_PASSES = 64


@dataclass(frozen=True)
class StreamCost:
    """What a stream costs, measured on its next rows."""

    tokens_per_second: float
    """Unmasked tokens per second."""
    kept: float
    """Fraction of the tokens that the masks leave."""
    bytes_per_token: dict[str, int]
    """Size of one activation, by hook."""


class ActivationStream(Iterator[dict[str, Tensor]]):
    """Iterator of `{str(hook): (n, d)}`: the unmasked tokens of one pass, rows aligned over the hooks.

    Args:
        model: The model; it stays on its device, and so do the activations.
        hooks: Where to read, each once.
        rows: The rows of tokens to run.
        masks: Which tokens to leave out.
        prompts_per_pass: Rows per forward pass.

    Raises:
        UnweaveError: No hook; rows longer than the model's context; while iterating: a token id outside the model's
            vocabulary, activations that are NaN or infinite, or masks that leave nothing.
    """

    def __init__(
        self,
        model: LoadedModel,
        hooks: Sequence[Hook],
        rows: TokenRows,
        masks: MaskConfig | None = None,
        prompts_per_pass: int = 32,
    ) -> None:
        if not hooks or len(set(hooks)) < len(hooks):
            raise UnweaveError(f"a stream needs one or more different hooks, not {[str(hook) for hook in hooks]}.")
        if prompts_per_pass < 1:
            raise UnweaveError(f"prompts_per_pass={prompts_per_pass} is less than 1.")
        longest = getattr(getattr(model.module, "config", None), "max_position_embeddings", None)
        if longest is not None and rows.config.context > longest:
            raise UnweaveError(f"context={rows.config.context} is longer than the {longest} positions of {model.name}.")
        self.model, self.hooks, self.rows = model, list(hooks), rows
        self.prompts_per_pass = prompts_per_pass
        self.passes = 0
        self._masks = Masks(masks or MaskConfig(), model.tokenizer, rows.config.context)
        self._vocabulary = _vocabulary_size(model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def report(self) -> MaskReport:
        """How many tokens went through the model, and what the masks left out."""
        return self._masks.report

    @property
    def excluded_ids(self) -> dict[int, str]:
        """The token ids that are left out, and the tokens they stand for."""
        return self._masks.excluded_ids

    def __next__(self) -> dict[str, Float[Tensor, "n d"]]:
        for _ in range(_MAX_EMPTY_PASSES):
            batch = self.rows.next_rows(self.prompts_per_pass)
            if not len(batch):
                raise StopIteration
            activations = self._run(batch)
            self.passes += 1
            if len(next(iter(activations.values()))):
                return activations
        raise UnweaveError(f"the masks left no token in {_MAX_EMPTY_PASSES} passes: {self.report}.")

    def measure(self, passes: int = 2) -> StreamCost:
        """Time some passes over the next rows, after one to warm up. The stream is not moved on.

        Raises:
            UnweaveError: What iterating would raise; there are no rows left.
        """
        batch = self.rows.peek(self.prompts_per_pass)
        if not len(batch):
            raise UnweaveError("the stream is exhausted: there is nothing to measure.")
        before = self._masks.state_dict()
        activations = self._run(batch)
        start = time.perf_counter()
        for _ in range(passes):
            activations = self._run(batch)  # counting its tokens waits for an asynchronous device
        seconds = (time.perf_counter() - start) / passes
        self._masks.load_state_dict(before)
        kept = len(next(iter(activations.values())))
        if not kept:
            raise UnweaveError(f"the masks leave none of the {int(batch.real.sum())} tokens of a pass.")
        sizes = {name: x.shape[1] * x.element_size() for name, x in activations.items()}
        return StreamCost(kept / seconds, kept / int(batch.real.sum()), sizes)

    def state_dict(self) -> dict[str, Any]:
        """Position in the rows, and what the masks measured and counted."""
        return {"rows": self.rows.state_dict(), "masks": self._masks.state_dict(), "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved."""
        self.rows.load_state_dict(state["rows"])
        self._masks.load_state_dict(state["masks"])
        self.passes = state["passes"]

    def widths(self) -> dict[str, int]:
        """Size of an activation at each hook, from a pass over the next row; the stream is not moved on."""
        return {name: x.shape[1] for name, x in self._capture(self.rows.peek(1)).items()}

    def _run(self, batch: TokenBatch) -> dict[str, Float[Tensor, "n d"]]:
        captured = self._capture(batch)
        kept = self._masks.by_token(batch).flatten().nonzero().squeeze(1)
        activations = {name: x[kept.to(x.device)] for name, x in captured.items()}
        if not len(kept):
            return activations
        norms = {name: torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for name, x in activations.items()}
        for name, norm in norms.items():
            if not norm.isfinite().all():
                raise UnweaveError(f"the activations at hook {name} are NaN or infinite in pass {self.passes + 1}.")
        keep = self._masks.by_norm(norms)
        return activations if keep.all() else {name: x[keep] for name, x in activations.items()}

    def _capture(self, batch: TokenBatch) -> dict[str, Float[Tensor, "n_tokens d"]]:
        self._check_ids(batch)
        masks: dict[str, Any] = {}
        if not batch.real.all():  # where there is no padding, a mask would only keep attention from its fast path
            masks["attention_mask"] = batch.real.to(self.device, torch.int64)
        captured = capture(self.model.module, self.hooks, batch.ids.to(self.device), **masks)
        return {str(hook): _per_token(captured[str(hook)], batch, hook) for hook in self.hooks}

    def _check_ids(self, batch: TokenBatch) -> None:
        low, high = int(batch.ids.min()), int(batch.ids.max())
        if low < 0 or (self._vocabulary is not None and high >= self._vocabulary):
            raise UnweaveError(
                f"the data hold token id {low if low < 0 else high}, but {self.model.name} knows the ids from 0 to "
                f"{(self._vocabulary or 0) - 1}: the tokens are those of another tokenizer."
            )


def _per_token(activation: Tensor, batch: TokenBatch, hook: Hook) -> Float[Tensor, "n_tokens d"]:
    """One row per token; heads are laid side by side."""
    n_tokens = batch.ids.numel()
    if activation.shape[:2] != batch.ids.shape and activation.shape[0] != n_tokens:
        shape = tuple(activation.shape)
        raise UnweaveError(f"hook {hook} gives shape {shape} for {tuple(batch.ids.shape)} tokens: not one per token.")
    return activation.reshape(n_tokens, -1)


def _vocabulary_size(model: LoadedModel) -> int | None:
    embeddings = getattr(model.module, "get_input_embeddings", lambda: None)()
    return getattr(embeddings, "num_embeddings", None)
