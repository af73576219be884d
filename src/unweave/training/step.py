"""What one training step computes before its update, however it was computed."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from unweave.training.optimizer import RowGrad


class Step(NamedTuple):
    """Loss, gradients, and what the trainee keeps count of."""

    loss: Float[Tensor, ""]
    squared_error: Float[Tensor, ""]
    """Of the reconstruction, summed over tokens and width."""
    l0: Tensor
    """Active codes, summed over tokens."""
    fired: Bool[Tensor, " d_sae"]
    """Which latents were active on any token."""
    smallest: Float[Tensor, ""] | None
    """Smallest active code of BatchTopK, if there is one."""
    grads: dict[str, Tensor | RowGrad]
    """By parameter; what would only change the norm of a unit decoder row is taken out."""
    squares: Tensor
    """Squared norm of all gradients together."""
    density: Float[Tensor, ""] | None = None
    """Share of entries that are active, or that a GPU's product has kept, where `Fused.observe` is to know it."""
    fits: Bool[Tensor, ""] | None = None
    """Whether there was room for them all; if not, the step is not to be used. None: there was."""
