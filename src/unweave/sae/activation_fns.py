"""Activation functions: which pre-activations become codes, in training and in inference.

Each is a small frozen dataclass that says three things: which entries a training step looks at (`selection`), what
their values are with gradients (`apply`; of Gated, `magnitudes`), and which entries inference keeps (`inference`),
which is always a function of one token alone. Thresholds live on the SAE, in float32, and are compared strictly: a
latent is active for `pre > threshold`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from unweave._errors import UnweaveError
from unweave.kernels import Above, Largest, LargestOfBatch, Spec
from unweave.sae.codes import Codes

Threshold = Float[Tensor, "..."] | None
AnyCodes = TypeVar("AnyCodes", bound=Codes)


def _require_k(k: int, name: str) -> None:
    if k < 1:
        raise UnweaveError(f"{name} needs k of at least 1, got k={k}.")


@dataclass(frozen=True)
class ReLU:
    """Every positive pre-activation. Goes with an L1 penalty (Bricken et al. 2023; Anthropic, April 2024)."""

    name: ClassVar[str] = "relu"
    threshold_shape: ClassVar[str | None] = None

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        return Above(0.0)

    def apply(self, pre: Codes, threshold: Threshold) -> Codes:
        return pre.with_values(pre.values.relu())

    def inference(self, threshold: Threshold) -> Spec:
        return Above(0.0)


@dataclass(frozen=True)
class TopK:
    """The `k` largest pre-activations of each token; those at or below 0 become 0 (Gao et al., arXiv 2406.04093)."""

    k: int = 32
    name: ClassVar[str] = "topk"
    threshold_shape: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        _require_k(self.k, "TopK")

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        return Largest(self.k)

    def apply(self, pre: Codes, threshold: Threshold) -> Codes:
        return pre.with_values(pre.values.relu())

    def strongest(self, values: Float[Tensor, " nnz"], n_rows: int) -> Bool[Tensor, " nnz"]:
        """Which entries of a selection with a larger k, row after row, this k would have selected."""
        values = values.view(n_rows, -1)
        best = values.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        return torch.zeros_like(values, dtype=torch.bool).scatter_(1, best, True).flatten()

    def inference(self, threshold: Threshold) -> Spec:
        return Largest(self.k)


@dataclass(frozen=True)
class BatchTopK:
    """The `k * n` largest pre-activations of a batch of n tokens (Bussmann et al., arXiv 2412.06410).

    Inference compares with a calibrated threshold instead, so that a token's code does not depend on its neighbours.
    """

    k: int = 32
    name: ClassVar[str] = "batchtopk"
    threshold_shape: ClassVar[str | None] = "scalar"

    def __post_init__(self) -> None:
        _require_k(self.k, "BatchTopK")

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        # The last batches' threshold is the best guess of this one's; NaN before the first.
        known = threshold is not None and not threshold.isnan()
        return LargestOfBatch(self.k * n_rows, hint=0.95 * float(threshold) if known else None)  # type: ignore[arg-type]

    def apply(self, pre: Codes, threshold: Threshold) -> Codes:
        return pre.with_values(pre.values.relu())

    def strongest(self, values: Float[Tensor, " nnz"], n_rows: int) -> Bool[Tensor, " nnz"]:
        """Which entries of a selection with a larger k, row after row, this k would have selected."""
        budget = self.k * n_rows
        if len(values) <= budget:
            return torch.ones_like(values, dtype=torch.bool)
        bound = values.topk(budget, sorted=False).values.amin()
        above, tied = values > bound, values == bound
        return above | (tied & (tied.cumsum(0) <= budget - above.sum()))  # ties go to the first, as in the selection

    def inference(self, threshold: Threshold) -> Spec:
        if threshold is None or threshold.isnan():
            raise UnweaveError(
                "this BatchTopK SAE has no threshold yet, which its inference form compares pre-activations with: "
                "calibrate it first (training does so at its end)."
            )
        return Above(float(threshold.clamp(min=0)))


@dataclass(frozen=True)
class JumpReLU:
    """Pre-activations above a learnt threshold per latent (Rajamanoharan et al., arXiv 2407.14435).

    Attributes:
        init_threshold: Initial threshold, in units of inputs scaled to a mean squared norm of d_in.
        bandwidth: Width of the rectangular window through which thresholds get their gradient, in the same units.
    """

    init_threshold: float = 0.1
    bandwidth: float = 0.1
    name: ClassVar[str] = "jumprelu"
    threshold_shape: ClassVar[str | None] = "vector"

    def __post_init__(self) -> None:
        if self.init_threshold < 0 or self.bandwidth <= 0:
            raise UnweaveError(
                "JumpReLU needs init_threshold >= 0 and bandwidth > 0, got "
                f"init_threshold={self.init_threshold} and bandwidth={self.bandwidth}."
            )

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        """The active entries, and those just below the threshold that still give it a gradient."""
        assert threshold is not None
        return Above(threshold.detach() - self.bandwidth / 2)

    def apply(self, pre: Codes, threshold: Threshold) -> Codes:
        assert threshold is not None
        return pre.with_values(_JumpReLU.apply(pre.values, pre.at(threshold), self.bandwidth))

    def inference(self, threshold: Threshold) -> Spec:
        assert threshold is not None
        return Above(threshold.detach().clamp(min=0))


@dataclass(frozen=True)
class Gated:
    """A gate chooses the latents, their own gain and bias give the codes (Rajamanoharan et al., arXiv 2404.16014).

        u = (x - b_dec) @ W_enc     gate = u + b_gate     code = relu(exp(r_mag) * u + b_mag) where gate > 0

    The pre-activation is the gate's; the SAE keeps `b_gate` as its `b_enc`, and `r_mag` and `b_mag` beside it. The
    codes are elementwise functions of the gate, so the encoder product is the only one. The gate itself learns from
    its own two losses alone (see `unweave.objectives.gated`).
    """

    name: ClassVar[str] = "gated"
    threshold_shape: ClassVar[str | None] = None

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        return Above(0.0)

    def magnitudes(self, pre: AnyCodes, b_gate: Tensor, r_mag: Tensor | None, b_mag: Tensor | None) -> AnyCodes:
        """The codes at the entries of the gate's pre-activations, 0 where the gate is closed; parameters `(d_sae,)`."""
        assert r_mag is not None
        assert b_mag is not None
        gain = r_mag.exp()
        magnitudes = (pre.values * pre.at(gain) + pre.at(b_mag - gain * b_gate)).relu()
        return cast(AnyCodes, pre.with_values(magnitudes * (pre.values > 0)))

    def inference(self, threshold: Threshold) -> Spec:
        return Above(0.0)


Activation = ReLU | TopK | BatchTopK | JumpReLU | Gated
ACTIVATIONS: dict[str, type[Any]] = {cls.name: cls for cls in (ReLU, TopK, BatchTopK, JumpReLU, Gated)}


def _window(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The rectangle kernel of area 1, as a function of the pre-activation."""
    return ((pre - threshold).abs() < bandwidth / 2) / bandwidth


class _JumpReLU(torch.autograd.Function):
    """`pre * H(pre - threshold)`; the threshold's gradient is `-threshold * K((pre - threshold) / bandwidth)`."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        grad_threshold = -grad * threshold * _window(pre, threshold, ctx.bandwidth)
        return grad * (pre > threshold), grad_threshold.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    """`H(pre - threshold)`, whose gradient reaches the threshold alone (straight-through, arXiv 2407.14435)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        return None, (-grad * _window(pre, threshold, ctx.bandwidth)).sum_to_size(threshold.shape), None


def step(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 where `pre > threshold`, else 0; differentiable in the threshold through a window of width `bandwidth`."""
    return _Step.apply(pre, threshold, bandwidth)
