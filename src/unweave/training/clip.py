"""What a step's gradient is multiplied by, and what the host learns of the step.

A GPU works behind its host, which loses its lead whenever it asks for a number. A step through autograd asks once, for
the norm of its gradient; how many latents will be dead after it comes along with the answer, for the next step. A fused
step asks for nothing: the GPU clips by itself, leaves everything as it is where the gradient is not finite, and its
host is told two steps later (`readback`).
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.training.dead import revives
from unweave.training.step import Step

if TYPE_CHECKING:
    from unweave.training.trainee import Trainee


def clip_factor(trainee: Trainee, made: Step, norm: Float[Tensor, ""], n: int) -> tuple[float | Tensor, int | None]:
    """What the gradients of a step are multiplied by, and how many latents are dead, if the next step is to know.

    Args:
        trainee: What is trained, as it was before the step.
        made: The step.
        norm: Of its gradient.
        n: Its tokens.

    Returns:
        The factor, which is NaN if the step may not change anything, and the count: after this step, or on a GPU after
        one before.

    Raises:
        UnweaveError: If the gradient of this step is NaN or infinite, or on a GPU that of one before.
    """
    config = trainee.config
    limit = config.grad_clip * trainee.sae.d_out if config.grad_clip else None
    if trainee.readback is None:
        read, n_dead = read_norm(trainee, norm, made.fired, n)
        _check(trainee.step_count, read)
        return 1.0 if limit is None else min(1.0, limit / (read + 1e-6)), n_dead
    fits = torch.ones_like(norm) if made.fits is None else made.fits.to(norm)
    density = torch.full_like(norm, -1.0) if made.density is None else made.density.to(norm)
    dead = _dead_after(trainee, made.fired, n).to(norm)  # exact up to 2^24
    arrived = trainee.readback.push(trainee.step_count, torch.stack([norm, fits, density, dead]))
    factor = torch.ones_like(norm) if limit is None else (limit / (norm + 1e-6)).clamp(max=1)
    factor = torch.where(norm.isfinite() & (fits > 0), factor, torch.nan)
    return factor, None if arrived is None else _learn(trainee, *arrived)


def read_norm(
    trainee: Trainee, norm: Float[Tensor, ""], fired: Bool[Tensor, " d_sae"], n: int
) -> tuple[float, int | None]:
    """The norm of a step's gradient, and how many latents are dead after the step if the next one is going to ask."""
    if trainee.fused is not None or not revives(trainee):
        return norm.item(), None
    read, count = torch.stack([norm.double(), _dead_after(trainee, fired, n).double()]).tolist()
    return read, int(count)


def _dead_after(trainee: Trainee, fired: Bool[Tensor, " d_sae"], n: int) -> Int64[Tensor, ""]:
    return ((trainee.tokens_since_fired + n >= trainee.dead_after) & ~fired).sum()


def _learn(trainee: Trainee, step: int, numbers: list[float]) -> int:
    """Take in what a GPU says of an earlier step; returns how many latents were dead after it."""
    _check(step, *numbers[:2])
    _, _, density, dead = numbers
    if density >= 0 and trainee.fused is not None:
        trainee.fused.observe(density)
    return int(dead)


def check_pending(trainee: Trainee) -> None:
    """Say what a GPU has not said yet of the last steps; for where the host waits anyway.

    Raises:
        UnweaveError: If the gradient of one of them was NaN or infinite.
    """
    for step, (norm, fits, *_) in [] if trainee.readback is None else trainee.readback.state():
        _check(step, norm, fits)


def _check(step: int, norm: float, fits: float = 1.0) -> None:
    if not fits:
        warnings.warn(f"step {step} had more active codes than there was room for, and was left out.", stacklevel=5)
    if not math.isfinite(norm):
        raise UnweaveError(f"the gradient of step {step} is NaN or infinite: try a lower learning rate.")
