"""Thresholds whose logarithm is what the optimiser moves (Anthropic, January 2025).

The SAE always holds the thresholds themselves: they become logarithms for the length of one update, and so do their
gradients, by the chain rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from unweave.training.step import Step


def step_in_log(step: Step, threshold: Tensor) -> Step:
    """A step whose gradient for the thresholds, and share in the gradient's norm, is that of their logarithms."""
    grad = step.grads["threshold"]
    assert isinstance(grad, Tensor)
    through = grad * threshold.detach()
    squares = step.squares - grad.square().sum() + through.square().sum()
    return step._replace(grads=step.grads | {"threshold": through}, squares=squares.clamp(min=0))


@contextmanager
def as_logarithm(threshold: Tensor) -> Iterator[None]:
    """Within the block the tensor holds its own logarithm."""
    with torch.no_grad():
        threshold.clamp_(min=torch.finfo(threshold.dtype).tiny).log_()
        yield
        threshold.exp_()
