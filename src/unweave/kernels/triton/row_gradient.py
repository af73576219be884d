"""What remains to be done to a decoder's gradient once `segment_sum` made it, in one pass over its rows.

A penalty on the norms of decoder rows adds something along each row. Where rows have unit norm, what points along a row
would only change its norm, and is taken away. Then the row's share of the gradient's norm is known, for clipping.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from unweave.kernels.triton.adam import whole_rows
from unweave.kernels.triton.launch import Arguments, launch


@triton.jit(do_not_specialize=["m"])
def _finish_rows(
    grad, weight, along, squares, m, d,
    ALONG: tl.constexpr, PROJECT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < m)[:, None] & (column < d)[None, :]
    element = row[:, None] * d + column[None, :]

    g = tl.load(grad + element, mask, 0.0)
    if ALONG or PROJECT:
        w = tl.load(weight + element, mask, 0.0)
        if ALONG:
            g += tl.load(along + row, row < m, 0.0)[:, None] * w
        if PROJECT:
            g -= tl.sum(g * w, 1)[:, None] * w
        tl.store(grad + element, g, mask)
    tl.store(squares + row, tl.sum(g * g, 1), row < m)


def finish_rows(
    grad: Float[Tensor, "m d"],
    weight: Float[Tensor, "m d"] | None,
    along: Float[Tensor, " m"] | None,
    project: bool,
) -> Float[Tensor, " m"]:
    """Add what a penalty on row norms adds, remove what would only change a row's norm, and measure what is left.

    Args:
        grad: float32, updated; only read if there is neither `along` nor `project`.
        weight: The decoder, float32; needed for `along` and for `project`.
        along: Multiples of the rows of `weight` to add to those of `grad`, float32.
        project: Whether the part of each row along its row of `weight`, of unit norm, is removed afterwards.

    Returns:
        Squared norm of each resulting row, float32.
    """
    args = Arguments("finish_rows")
    changed = along is not None or project
    grad = args.take("grad", grad, "m d", torch.float32, in_place=changed)
    args.require(weight is not None or not changed, "weight is needed for along and for project.")
    if weight is not None:
        weight = args.take("weight", weight, "m d", torch.float32)
    if along is not None:
        along = args.take("along", along, "m", torch.float32)
    m, d = grad.shape
    cut = whole_rows(args, "grad", d)
    squares = grad.new_empty(m)
    launch(
        _finish_rows, (triton.cdiv(m, cut["ROWS"]),), grad, grad if weight is None else weight,
        grad if along is None else along, squares, m, d, ALONG=along is not None, PROJECT=project, **cut,
    )  # fmt: skip
    return squares
