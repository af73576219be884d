"""Sums whose order, and so whose rounding, does not depend on the number of threads."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import pad

from unweave.kernels import cpu
from unweave.kernels.dispatch import backend

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
    differentiated = x.requires_grad and torch.is_grad_enabled()
    if not differentiated and len(x) and backend("squared_norm", x) == "cpu":
        return cpu.squared_distances(x.contiguous(), None).to(x.dtype)
    pieces = x.split(max(1, _PIECE // max(1, x.shape[1]))) if x.device.type == "cpu" else [x]
    if x.shape[1] >= _PARALLEL:
        pieces = [pad(piece, (0, -x.shape[1] % _BLOCK)).view(-1, _BLOCK) for piece in pieces]
    return ordered_sum(torch.cat([vecdot(piece, piece) for piece in pieces]))


@torch.no_grad()
def spread(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """The sum of the rows' squared distances from their mean, without a gradient; 0 without rows."""
    if len(x) and backend("spread", x) == "cpu":
        x = x.contiguous()
        return cpu.squared_distances(x, cpu.sum_rows(x) / len(x)).to(x.dtype)
    return squared_norm(x - x.mean(0))
