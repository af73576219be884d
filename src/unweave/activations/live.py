"""Activations of a model at any number of hooks, from one forward pass per batch of rows.

Every pass yields the activations of its unmasked tokens, in the order of the text and in the type that the model runs
in; row `i` is the same token at every hook. Activations that are not finite stop the stream with the hook's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations.masks import MaskConfig, MaskReport, Masks, lengths_of
from unweave.activations.rows import Batch, Rows
from unweave.activations.transfer import moved
from unweave.models import Hook, LoadedModel, Meter, capture, copied_bytes, copy_in, dtype_of, lean
from unweave.models.meter import typical_seconds

_MAX_EMPTY_PASSES = 64

# A pass is as fast as it gets once its widest tensor fills the processor's cache; beyond that, tensors travel to memory
# and back. A GPU wants more, as far as its memory goes.
_CPU_BYTES, _CPU_TOKENS = 12 << 20, 1 << 12
_GPU_BYTES, _GPU_TOKENS = 1 << 28, 1 << 16
_GPU_SHARE = 4


@dataclass(frozen=True)
class StreamCost:
    """What a stream costs, measured on its next rows."""

    tokens_per_second: float
    """Unmasked tokens per second."""
    kept: float
    """Fraction of the tokens that the masks leave."""
    bytes_per_token: dict[str, int]
    """Size of one activation, by hook."""
    widths: dict[str, int]
    """Size of an activation, by hook."""
    dtypes: dict[str, torch.dtype]
    """Type of the activations, by hook."""
    precision: str
    """Type that the model runs in."""
    prompts_per_pass: int
    pass_bytes: int
    """Memory that a pass takes at its peak, on the model's device."""
    copy_bytes: int
    """Memory of the model's copy in another type; 0 without one."""


@dataclass(frozen=True, eq=False)
class Pass:
    """The unmasked positions of one forward pass. Row `i` is the same position everywhere."""

    activations: dict[str, Float[Tensor, "n d"]]
    """By hook, on the stream's device and in the type that the model runs in."""
    records: dict[str, Int[Tensor, " n"]]
    """What is known of each position, on the CPU: see `Batch.records`."""


class ActivationStream(Iterator[dict[str, Tensor]]):
    """Iterator of `{str(hook): (n, d)}`: the unmasked tokens of one pass, rows aligned over the hooks.

    Args:
        model: The model; it stays on its device, and as it is.
        hooks: Where to read, each once.
        rows: The rows of tokens (or images) to run.
        masks: Which tokens to leave out.
        prompts_per_pass: Rows per forward pass. None: chosen from a pass over the first row, so that the widest tensor
            of a pass fits the cache (12 MiB, at most 4096 tokens), or on a GPU 256 MiB and a quarter of the memory
            that is free (at most 65,536 tokens). A saved state keeps the choice.
        dtype: Type to run the model in, in a copy of what lies in front of the hooks; None: as it is.
        device: Where to put the activations; None: where the model is.

    Attributes:
        model: What runs: the model or its lean twin, its copy in another type once there has been a pass.
        given: The model as it was given.

    Raises:
        UnweaveError: No hook; rows longer than the model's context; while iterating: a token id outside the model's
            vocabulary, activations that are NaN or infinite, or masks that leave nothing.
    """

    def __init__(
        self,
        model: LoadedModel,
        hooks: Sequence[Hook],
        rows: Rows,
        masks: MaskConfig | None = None,
        prompts_per_pass: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        if not hooks or len(set(hooks)) < len(hooks):
            raise UnweaveError(f"a stream needs one or more different hooks, not {[str(hook) for hook in hooks]}.")
        if prompts_per_pass is not None and prompts_per_pass < 1:
            raise UnweaveError(f"prompts_per_pass={prompts_per_pass} is less than 1.")
        longest = getattr(getattr(model.module, "config", None), "max_position_embeddings", None)
        if longest is not None and rows.context > longest:
            raise UnweaveError(f"context={rows.context} is longer than the {longest} positions of {model.name}.")
        self.model, self.hooks, self.rows = lean(model), list(hooks), rows
        self.prompts_per_pass = prompts_per_pass
        self.dtype, self.passes = dtype, 0
        self.given, self._device = model, device or model.device
        self._ready: list[Pass] = []  # run before a state was saved, and not handed out yet
        self._masks = Masks(masks or MaskConfig(), model.tokenizer, rows.context)
        self._vocabulary = _vocabulary_size(model)

    @property
    def device(self) -> torch.device:
        """Where the activations are."""
        return self._device

    @property
    def report(self) -> MaskReport:
        """How many tokens went through the model, and what the masks left out."""
        return self._masks.report

    @property
    def excluded_ids(self) -> dict[int, str]:
        """The token ids that are left out, and the tokens they stand for."""
        return self._masks.excluded_ids

    def __next__(self) -> dict[str, Float[Tensor, "n d"]]:
        return self.next_pass().activations

    def next_pass(self) -> Pass:
        """The activations of the next pass that leaves any, and which positions they belong to.

        Raises:
            StopIteration: The rows have ended.
            UnweaveError: As in iterating.
        """
        if self._ready:
            return self._ready.pop(0)
        n = self.prepare()
        for _ in range(_MAX_EMPTY_PASSES):
            batch = self.rows.next_rows(n)
            if not len(batch):
                raise StopIteration
            done = self._run(batch)
            self.passes += 1
            if _n_rows(done):
                return done
        why = self.report.why_nothing(self._masks.config)
        raise UnweaveError(f"the masks left no token in {_MAX_EMPTY_PASSES} passes: {why}.")

    def measure(self, passes: int = 2, seconds: float = 0.0) -> StreamCost:
        """Time some passes over the next rows, after one to warm up. The stream is not moved on.

        Args:
            passes: How many, at least.
            seconds: How long, at least.

        Raises:
            UnweaveError: What iterating would raise; there are no rows left.
        """
        n = self.prepare()
        batch = self.rows.peek(n)
        if not len(batch):
            raise UnweaveError("the stream is exhausted: there is nothing to measure.")
        before = self._masks.state_dict()
        with Meter() as meter:
            done = self._run(batch)
        # Counting a pass's tokens waits for an asynchronous device.
        taken = typical_seconds(lambda: self._run(batch), passes, seconds)
        self._masks.load_state_dict(before)
        kept = _n_rows(done)
        if not kept:
            self._masks.report = MaskReport()
            self._run(batch)
            why = self.report.why_nothing(self._masks.config)
            self._masks.load_state_dict(before)
            raise UnweaveError(f"the masks left no token of a pass: {why}.")
        sizes = {name: x.shape[1] * x.element_size() for name, x in done.activations.items()}
        return StreamCost(
            tokens_per_second=kept / taken,
            kept=kept / int(batch.real.sum()),
            bytes_per_token=sizes,
            widths={name: x.shape[1] for name, x in done.activations.items()},
            dtypes={name: x.dtype for name, x in done.activations.items()},
            precision=_name(dtype_of(self.model.module)),
            prompts_per_pass=n,
            pass_bytes=meter.peak,
            copy_bytes=copied_bytes(self.given.module, self.model.module),
        )

    def prepare(self) -> int:
        """Copy the model if it is to run in another type, and choose the rows of a pass; returns how many they are.

        The first pass does this by itself.
        """
        other = self.dtype is not None and self.dtype != dtype_of(self.model.module)
        if self.prompts_per_pass is not None and not other:
            return self.prompts_per_pass
        row = self.rows.peek(1)
        if not len(row):
            return self.prompts_per_pass or 1
        if other:
            assert self.dtype is not None
            first, named = row.inputs(self.model.device)
            self._check_ids(row)
            self.model = copy_in(self.given, self.dtype, self.hooks, first, **named)
        if self.prompts_per_pass is None:
            with Meter() as meter:
                self._capture(row)
            self.prompts_per_pass = _rows_that_fit(self.model.device, self.rows.context, meter)
        return self.prompts_per_pass

    def state_dict(self) -> dict[str, Any]:
        """Position in the rows, how they are run, and what the masks measured and counted."""
        return {
            "rows": self.rows.state_dict(),
            "masks": self._masks.state_dict(),
            "passes": self.passes,
            "prompts_per_pass": self.prompts_per_pass,
            "dtype": _name(self.dtype or dtype_of(self.model.module)),
            "ready": [{"activations": p.activations, "records": p.records} for p in self._ready],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved, in the same type and with as many rows in a pass."""
        self.rows.load_state_dict(state["rows"])
        self._masks.load_state_dict(state["masks"])
        self.passes, self.prompts_per_pass = state["passes"], state["prompts_per_pass"]
        self.model, self.dtype = lean(self.given), getattr(torch, state["dtype"])
        self._ready = [Pass(self._moved(p["activations"]), dict(p["records"])) for p in state["ready"]]

    def widths(self) -> dict[str, int]:
        """Size of an activation at each hook, from a pass over the next row; the stream is not moved on."""
        return {name: x.shape[1] for name, x in self._capture(self.rows.peek(1)).items()}

    def _run(self, batch: Batch) -> Pass:
        captured = self._capture(batch)
        kept = self._masks.by_token(batch).flatten().nonzero().squeeze(1)
        there = moved(kept, self.model.device)
        activations = {name: x[there] for name, x in captured.items()}
        records = {name: x.flatten()[kept] for name, x in batch.records().items()}
        if not len(kept):
            return Pass(self._moved(activations), records)
        norms = {name: lengths_of(x) for name, x in activations.items()}
        for name, norm in norms.items():
            if not norm.isfinite().all():
                i = int((~norm.isfinite()).nonzero()[0])
                where = f"document {int(records['documents'][i])}, position {int(records['positions'][i])}"
                raise UnweaveError(
                    f"the activations at hook {name} are NaN or infinite in pass {self.passes + 1} ({where})."
                )
        keep = self._masks.by_norm(norms)
        if not keep.all():
            at = keep.cpu()
            activations = {name: x[keep] for name, x in activations.items()}
            records = {name: x[at] for name, x in records.items()}
        return Pass(self._moved(activations), records)

    def _moved(self, activations: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: moved(x, self.device) for name, x in activations.items()}

    def _capture(self, batch: Batch) -> dict[str, Float[Tensor, "n_tokens d"]]:
        self._check_ids(batch)
        first, named = batch.inputs(self.model.device)
        if first.is_floating_point():  # pixels
            first = first.to(dtype_of(self.model.module))
        captured = capture(self.model.module, self.hooks, first, **named)
        return {str(hook): _per_token(captured[str(hook)], batch, hook) for hook in self.hooks}

    def _check_ids(self, batch: Batch) -> None:
        ids = batch.records().get("token_ids")
        if ids is None:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (self._vocabulary is not None and high >= self._vocabulary):
            raise UnweaveError(
                f"the data hold token id {low if low < 0 else high}, but {self.model.name} knows the ids from 0 to "
                f"{(self._vocabulary or 0) - 1}: the tokens are those of another tokenizer."
            )


def _rows_that_fit(device: torch.device, context: int, row: Meter) -> int:
    """Rows of a pass, from what one row takes."""
    if device.type == "cuda":
        n = min(_GPU_BYTES // max(row.largest, 1), torch.cuda.mem_get_info(device)[0] // _GPU_SHARE // max(row.peak, 1))
        most = _GPU_TOKENS // context
    else:
        n, most = _CPU_BYTES // max(row.largest, 1), _CPU_TOKENS // context
    return max(1, min(n, most))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _n_rows(done: Pass) -> int:
    return len(next(iter(done.activations.values())))


def _per_token(activation: Tensor, batch: Batch, hook: Hook) -> Float[Tensor, "n_tokens d"]:
    """One row per token; heads are laid side by side."""
    shape, n_tokens = batch.real.shape, batch.real.numel()
    if activation.shape[:2] != shape and activation.shape[0] != n_tokens:
        raise UnweaveError(
            f"hook {hook} gives shape {tuple(activation.shape)} for {tuple(shape)} tokens: not one per token."
        )
    return activation.reshape(n_tokens, -1)


def _vocabulary_size(model: LoadedModel) -> int | None:
    embeddings = getattr(model.module, "get_input_embeddings", lambda: None)()
    return getattr(embeddings, "num_embeddings", None)
