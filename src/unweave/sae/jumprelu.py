"""JumpReLU: a learnt threshold per latent (Rajamanoharan et al., arXiv 2407.14435), and its straight-through gradients.

A step function has no gradient, so thresholds learn through a window around themselves: the derivative of the step is
replaced by a kernel of area 1 and width `bandwidth`. A window that holds no pre-activation leaves its threshold where
it is, whatever the penalty; so training widens one that holds too few.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unweave._errors import UnweaveError, nearest
from unweave.kernels import Above, Spec
from unweave.sae.activation import Activation, Threshold, register_activation
from unweave.sae.codes import Codes

# Half the width of each window in bandwidths, beyond which it is 0: entries further below their thresholds are never
# looked at. Kernels without such a bound (Gaussian, Cauchy) would make every step dense.
_HALF_WIDTHS = {"rectangle": 0.5, "triangle": 1.0, "epanechnikov": 1.0, "quartic": 1.0, "cosine": 1.0}
_LEAST_IN_WINDOW = 0.2


@register_activation
@dataclass(frozen=True)
class JumpReLU(Activation):
    """Pre-activations above a learnt threshold per latent (Rajamanoharan et al., arXiv 2407.14435).

    Attributes:
        init_threshold: Initial threshold, in units of inputs scaled to a mean squared norm of d_in.
        bandwidth: Width of the window through which thresholds get their gradient, in the same units.
        kernel: Shape of the window: "rectangle" (as published), "triangle", "epanechnikov", "quartic" or "cosine".
        ste_to_input: Whether the pre-activations get a gradient through the window too (Anthropic, January 2025).
        shared: One threshold for all latents instead of one for each.
        in_window: How many entries the window holds at least, as a share of the active ones: training widens it, for
            all latents alike, where it holds fewer. Pre-activations of clear features leave wide gaps below them. 0
            keeps the bandwidth as it is, which is the published method. None: 0.2 at the default bandwidth, and 0 where
            another one is given.
        log_threshold: Whether the optimiser moves the logarithm of the threshold (Anthropic, January 2025): steps are
            then relative to the threshold, and small thresholds hardly move.
    """

    init_threshold: float = 0.1
    bandwidth: float = 0.1
    kernel: Literal["rectangle", "triangle", "epanechnikov", "quartic", "cosine"] = "rectangle"
    ste_to_input: bool = False
    shared: bool = False
    log_threshold: bool = False
    in_window: float | None = None
    name: ClassVar[str] = "jumprelu"
    default_sparsity: ClassVar[str | None] = "target_l0"

    def __post_init__(self) -> None:
        if self.init_threshold < 0 or self.bandwidth <= 0:
            raise UnweaveError(
                "JumpReLU needs init_threshold >= 0 and bandwidth > 0, got "
                f"init_threshold={self.init_threshold} and bandwidth={self.bandwidth}."
            )
        if not 0 <= self.least_in_window <= 1:
            raise UnweaveError(f"JumpReLU's in_window is a share between 0 and 1, got {self.in_window}.")
        if self.kernel not in _HALF_WIDTHS:
            hint = nearest(self.kernel, _HALF_WIDTHS) or f"; there are {', '.join(_HALF_WIDTHS)}"
            raise UnweaveError(f"JumpReLU has no kernel {self.kernel!r}{hint}")
        if self.log_threshold and self.init_threshold == 0:
            raise UnweaveError("a threshold of 0 has no logarithm: give init_threshold > 0, or log_threshold=False.")

    @property
    def threshold_shape(self) -> Literal["scalar", "vector"]:
        return "scalar" if self.shared else "vector"

    @property
    def initial_threshold(self) -> float:
        return self.init_threshold

    @property
    def is_published(self) -> bool:
        """Whether the gradients are the published ones: a rectangle, for thresholds alone, one for each latent."""
        return self.kernel == "rectangle" and not self.ste_to_input and not self.shared

    @property
    def least_in_window(self) -> float:
        """`in_window`, decided."""
        if self.in_window is not None:
            return self.in_window
        return _LEAST_IN_WINDOW if self.bandwidth == type(self).bandwidth else 0.0

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        """The active entries, and those just below the threshold that still give it a gradient."""
        assert threshold is not None
        return Above(threshold.detach() - self.bandwidth * _HALF_WIDTHS[self.kernel])

    def apply(self, pre: Codes, threshold: Threshold) -> Codes:
        assert threshold is not None
        return pre.with_values(_JumpReLU.apply(pre.values, _at(pre, threshold), self))

    def step(self, pre: Codes, threshold: Threshold) -> Tensor:
        """1 at every entry above its threshold, else 0; differentiable through the window. Shaped as `pre.values`."""
        assert threshold is not None
        return _Step.apply(pre.values, _at(pre, threshold), self)

    def inference(self, threshold: Threshold) -> Spec:
        assert threshold is not None
        return Above(threshold.detach().clamp(min=0))

    def infer(self, pre: Codes, sae: object) -> Codes:
        return pre.with_values(pre.values.relu())  # the selection has compared already

    def widened(self, distance: Tensor) -> JumpReLU:
        """The same with a window that holds the share `least_in_window`.

        Args:
            distance: Of pre-activations from their thresholds, of any shape.
        """
        wanted = round(self.least_in_window * int((distance > 0).sum()))
        if wanted == 0:
            return self
        reach = float(distance.abs().flatten().kthvalue(wanted).values) / _HALF_WIDTHS[self.kernel]
        return dataclasses.replace(self, bandwidth=max(self.bandwidth, 1.01 * reach))  # edges are outside

    def window(self, pre: Tensor, threshold: Tensor) -> Tensor:
        """The kernel, of area 1 as a function of the pre-activation."""
        u = (pre - threshold) / self.bandwidth
        match self.kernel:
            case "rectangle":
                shape = (u.abs() < 0.5).to(u.dtype)
            case "triangle":
                shape = (1 - u.abs()).clamp(min=0)
            case "epanechnikov":
                shape = 0.75 * (1 - u.square()).clamp(min=0)
            case "quartic":
                shape = 15 / 16 * (1 - u.square()).clamp(min=0).square()
            case "cosine":
                shape = math.pi / 4 * (math.pi / 2 * u.clamp(-1, 1)).cos()
        return shape / self.bandwidth


def _at(pre: Codes, threshold: Tensor) -> Tensor:
    """The threshold of every entry, as it broadcasts against the values."""
    return pre.at(threshold) if threshold.ndim else threshold


class _JumpReLU(torch.autograd.Function):
    """`pre * H(pre - threshold)`; the threshold's gradient is `-threshold` times the window."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, activation: JumpReLU) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.activation = activation
        return pre * (pre > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        through = grad * threshold * ctx.activation.window(pre, threshold)
        grad_pre = grad * (pre > threshold)
        if ctx.activation.ste_to_input:
            grad_pre = grad_pre + through
        return grad_pre.to(pre.dtype), -through.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    """`H(pre - threshold)`; its gradient is the window's, for the threshold and, if asked for, the pre-activation."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, activation: JumpReLU) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.activation = activation
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        through = grad * ctx.activation.window(pre, threshold)
        grad_pre = through.to(pre.dtype) if ctx.activation.ste_to_input else None
        return grad_pre, -through.sum_to_size(threshold.shape), None
