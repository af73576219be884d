"""Sums whose order, and so whose rounding, does not depend on the number of threads."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import pad

_SERIAL = 4096  # PyTorch adds up fewer elements than 32,768 on one thread
_BLOCK = 256


def ordered_sum(x: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """The sum of all elements, block by block."""
    x = x.flatten()
    while len(x) > _SERIAL:
        x = pad(x, (0, -len(x) % _BLOCK)).view(-1, _BLOCK).sum(1)
    return x.sum()


def squared_norm(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The sum of squares of a matrix, row by row and then over the rows."""
    return ordered_sum(vecdot(x, x))
