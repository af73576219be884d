"""Which latents are dead, without a wait for the device of its own: steps count them for later ones (`clip`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

if TYPE_CHECKING:
    from unweave.training.trainee import Trainee


def revives(trainee: Trainee) -> bool:
    """Whether any term of the loss looks at dead latents."""
    config = trainee.config
    return bool(trainee.k_aux or config.ghost or config.pre_act)


def dead_latents(trainee: Trainee) -> Int64[Tensor, " c"]:
    """The dead latents, ascending. The host waits for the device only if no step has counted them."""
    known = None if trainee.readback is not None else known_count(trainee)
    return _first(trainee.dead, int(trainee.dead.sum()) if known is None else known)


def revived(trainee: Trainee) -> Int64[Tensor, " c"]:
    """The latents that AuxK revives in a fused step, ascending; none where there is no AuxK.

    A GPU's host knows how many they were some steps ago. Where fewer are left, `d_sae` takes the place of the others;
    where there are more, the last ones come later.
    """
    if not trainee.k_aux:
        return trainee.tokens_since_fired[:0]
    known = known_count(trainee)
    return dead_latents(trainee) if known is None else _first(trainee.dead, known)


def known_count(trainee: Trainee) -> int | None:
    """How many latents were dead when they were last counted, unless somebody else changed them since."""
    counted = trainee.dead_counted
    return counted[0] if counted is not None and counted[1:] == state_of(trainee.tokens_since_fired) else None


def _first(dead: Bool[Tensor, " d_sae"], count: int) -> Int64[Tensor, " count"]:
    return torch.searchsorted(dead.cumsum(0), torch.arange(1, count + 1, device=dead.device))


def state_of(tensor: Tensor) -> tuple[int, int]:
    """Changes whenever the tensor does."""
    return tensor._version, tensor.data_ptr()
