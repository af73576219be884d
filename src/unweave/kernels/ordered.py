"""Sums whose order, and so whose rounding, does not depend on the number of threads."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import pad

_PARALLEL = 32_768  # PyTorch adds up fewer elements on one thread
_SERIAL = 4096
_BLOCK = 256
_PIECE = 1 << 18  # elements whose squares are held at a time on a CPU: as many again as a batch would take its memory


def ordered_sum(x: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """The sum of all elements, block by block."""
    x = x.flatten()
    while len(x) > _SERIAL:
        x = pad(x, (0, -len(x) % _BLOCK)).view(-1, _BLOCK).sum(1)
    return x.sum()


def squared_norm(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The sum of squares of a matrix, row by row (of wide ones, block by block) and then over the rows."""
    pieces = x.split(max(1, _PIECE // max(1, x.shape[1]))) if x.device.type == "cpu" else [x]
    if x.shape[1] >= _PARALLEL:
        pieces = [pad(piece, (0, -x.shape[1] % _BLOCK)).view(-1, _BLOCK) for piece in pieces]
    return ordered_sum(torch.cat([vecdot(piece, piece) for piece in pieces]))
