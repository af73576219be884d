"""Activation functions: which pre-activations become codes, in training and in inference.

Each is a small frozen dataclass that says three things: which entries a training step looks at (`selector`, `finish`),
what their values are with gradients (`apply`), and which entries inference keeps (`infer`), which is always a function
of one token alone. Thresholds live on the SAE, in float32, and are compared strictly: a latent is active for
`pre > threshold`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from unweave import kernels
from unweave._errors import UnweaveError
from unweave.kernels import Selection, Selector
from unweave.sae.codes import Codes

Pre = Float[Tensor, "n d_sae"]
Threshold = Float[Tensor, "..."] | None


def _require_k(k: int, name: str) -> None:
    if k < 1:
        raise UnweaveError(f"{name} needs k of at least 1, got k={k}.")


@dataclass(frozen=True)
class ReLU:
    """Every positive pre-activation. Goes with an L1 penalty (Bricken et al. 2023; Anthropic, April 2024)."""

    name: ClassVar[str] = "relu"
    threshold_shape: ClassVar[str | None] = None

    def selector(self, threshold: Threshold, n_rows: int) -> Selector:
        return lambda pre: kernels.above(pre, 0.0)

    def finish(self, selection: Selection, n_rows: int) -> Selection:
        return selection

    def apply(self, pre: Codes, threshold: Threshold) -> Codes:
        return pre.with_values(pre.values.relu())

    def infer(self, pre: Pre, threshold: Threshold) -> Selection:
        return kernels.above(pre, 0.0)


@dataclass(frozen=True)
class TopK:
    """The `k` largest pre-activations of each token; those at or below 0 become 0 (Gao et al., arXiv 2406.04093)."""

    k: int = 32
    name: ClassVar[str] = "topk"
    threshold_shape: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        _require_k(self.k, "TopK")

    def selector(self, threshold: Threshold, n_rows: int) -> Selector:
        return lambda pre: kernels.topk(pre, self.k)

    def finish(self, selection: Selection, n_rows: int) -> Selection:
        return selection

    def apply(self, pre: Codes, threshold: Threshold) -> Codes:
        return pre.with_values(pre.values.relu())

    def infer(self, pre: Pre, threshold: Threshold) -> Selection:
        return kernels.topk(pre, self.k)


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

    def selector(self, threshold: Threshold, n_rows: int) -> kernels.BatchTopKCandidates:
        # The last batches' threshold is the best guess of this one's; NaN before the first.
        last = 0.0 if threshold is None or threshold.isnan() else float(threshold)
        return kernels.BatchTopKCandidates(self.k * n_rows, hint=last / 2)

    def finish(self, selection: Selection, n_rows: int) -> Selection:
        return kernels.batch_topk(selection, self.k * n_rows)

    def apply(self, pre: Codes, threshold: Threshold) -> Codes:
        return pre.with_values(pre.values.relu())

    def infer(self, pre: Pre, threshold: Threshold) -> Selection:
        if threshold is None or threshold.isnan():
            raise UnweaveError(
                "this BatchTopK SAE has no threshold yet, which its inference form compares pre-activations with: "
                "calibrate it first (training does so at its end)."
            )
        return kernels.above(pre, float(threshold.clamp(min=0)))


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

    def selector(self, threshold: Threshold, n_rows: int) -> Selector:
        """The active entries, and those just below the threshold that still give it a gradient."""
        assert threshold is not None
        bound = threshold - self.bandwidth / 2
        return lambda pre: kernels.above(pre, bound)

    def finish(self, selection: Selection, n_rows: int) -> Selection:
        return selection

    def apply(self, pre: Codes, threshold: Threshold) -> Codes:
        assert threshold is not None
        return pre.with_values(_JumpReLU.apply(pre.values, pre.at(threshold), self.bandwidth))

    def infer(self, pre: Pre, threshold: Threshold) -> Selection:
        assert threshold is not None
        return kernels.above(pre, threshold.clamp(min=0))


Activation = ReLU | TopK | BatchTopK | JumpReLU
ACTIVATIONS: dict[str, type[Any]] = {cls.name: cls for cls in (ReLU, TopK, BatchTopK, JumpReLU)}


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
