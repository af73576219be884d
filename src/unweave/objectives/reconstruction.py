"""How far a reconstruction is from its target."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from unweave.kernels import squared_norm


def squared_error(x_hat: Float[Tensor, "n d"], x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """`mean over tokens of sum over d of (x_hat - x)^2`."""
    return squared_norm(x_hat - x) / len(x)
