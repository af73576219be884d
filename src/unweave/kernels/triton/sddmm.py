"""Dot products at the entries of codes: the gradients of the codes, and exact values of screened candidates."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from unweave.kernels.triton.launch import FLOAT_OR_BF16, Arguments, launch, tile_width

AT_ONCE = 8
WIDEST = 2048
"""Bytes of a row that are read at a time."""


@triton.jit(do_not_specialize=["nnz", "m"])
def _sddmm(indices, offsets, grad, weight, out, nnz, m, d, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.maximum(tl.load(offsets + row), 0), tl.minimum(tl.load(offsets + row + 1), nnz)
    for first in range(start, end, AT_ONCE):
        entry = first + tl.arange(0, AT_ONCE)
        live = entry < end
        index = tl.load(indices + entry, live, 0)
        valid = (index >= 0) & (index < m)
        total = tl.zeros((AT_ONCE, BLOCK), tl.float32)
        for first_column in range(0, d, BLOCK):
            columns = first_column + tl.arange(0, BLOCK)
            inside = columns < d
            g = tl.load(grad + row * d + columns, inside, 0.0).to(tl.float32)
            w = tl.load(weight + index[:, None] * d + columns[None, :], (live & valid)[:, None] & inside[None, :], 0.0)
            total += w.to(tl.float32) * g[None, :]
        tl.store(out + entry, tl.where(valid, tl.sum(total, 1), float("nan")), live)


def sddmm(
    indices: Int64[Tensor, " nnz"],
    offsets: Int64[Tensor, " n+1"],
    grad: Float[Tensor, "n d"],
    weight: Float[Tensor, "m d"],
) -> Float[Tensor, " nnz"]:
    """`(grad @ weight.T)` at the entries only: the dot products `grad[row of e] · weight[indices[e]]`.

    Args:
        indices: Row of `weight` of each entry; one that does not exist makes its result NaN.
        offsets: Row i has the entries `offsets[i]:offsets[i + 1]`; what lies beyond the last is 0 in the result.
        grad: float32 or bfloat16.
        weight: float32 or bfloat16.

    Returns:
        The dot products, float32.
    """
    args = Arguments("sddmm")
    indices = args.take("indices", indices, "nnz", torch.int64)
    offsets = args.take("offsets", offsets, "n+1", torch.int64)
    grad = args.take("grad", grad, "n d", *FLOAT_OR_BF16)
    weight = args.take("weight", weight, "m d", *FLOAT_OR_BF16)
    (n, d), m, nnz = grad.shape, len(weight), len(indices)
    out = torch.zeros(nnz, device=grad.device)
    block = tile_width(d, WIDEST // weight.itemsize)
    launch(_sddmm, (n,), indices, offsets, grad, weight, out, nnz, m, d, BLOCK=block, AT_ONCE=AT_ONCE)
    return out
