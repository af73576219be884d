"""Which latents are dead, without a wait for the device of its own.

A GPU works behind its host, which loses its lead whenever it asks how many entries something has. A step asks once, for
the norm of its gradient; how many latents will be dead after it comes along with the answer, for the next step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

if TYPE_CHECKING:
    from unweave.training.trainee import Trainee


def revives(trainee: Trainee) -> bool:
    """Whether any term of the loss looks at dead latents."""
    config = trainee.config
    return bool(trainee.k_aux or config.ghost or config.pre_act)


def dead_latents(trainee: Trainee) -> Int64[Tensor, " c"]:
    """The dead latents, ascending. The host waits for the device only if no step has counted them."""
    dead, known = trainee.dead, trainee.dead_counted
    count = known[0] if known is not None and known[1:] == state_of(trainee.tokens_since_fired) else int(dead.sum())
    ranks = torch.arange(1, count + 1, device=dead.device)
    return torch.searchsorted(dead.cumsum(0), ranks)


def read_norm(
    trainee: Trainee, norm: Float[Tensor, ""], fired: Bool[Tensor, " d_sae"], n: int
) -> tuple[float, int | None]:
    """The norm of a step's gradient, and how many latents are dead after the step if the next one is going to ask.

    Args:
        trainee: What is trained, as it was before the step.
        norm: On the device.
        fired: The latents that fired in the step.
        n: Its tokens.
    """
    if trainee.fused is not None or not revives(trainee):
        return norm.item(), None
    dead = (trainee.tokens_since_fired + n >= trainee.dead_after) & ~fired
    read, count = torch.stack([norm.double(), dead.sum().double()]).tolist()
    return read, int(count)


def state_of(tensor: Tensor) -> tuple[int, int]:
    """Changes whenever the tensor does."""
    return tensor._version, tensor.data_ptr()
