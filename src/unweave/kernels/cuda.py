"""What a training step takes of a GPU: the functions that `unweave.kernels.cpu` has, on Triton's kernels, and encoding.

None of them waits for the device. Entries beyond the last offset are room that was not filled: their latent is -1,
their value 0, and they belong to nothing. Imported only where `backend` chooses these kernels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave.kernels import triton
from unweave.kernels.encode_cuda import above, largest, lowered
from unweave.kernels.reference import RowErrors
from unweave.kernels.triton import ByLatent, count_above, transpose

__all__ = [
    "above",
    "add_halves_",
    "count_above",
    "dense_back",
    "dense_codes",
    "keep_largest_",
    "largest",
    "lowered",
    "scatter_outer",
    "squared_error_rows",
    "sum_by_latent",
    "sum_rows",
    "total",
    "transpose",
]


def sum_by_latent(by_latent: ByLatent, values: Float[Tensor, " nnz"]) -> Float[Tensor, " m"]:
    """The sum of each latent's values, in one order."""
    one_row = by_latent._replace(rows=by_latent.rows.clamp(max=0))
    return triton.segment_sum(one_row, values, values.new_ones(1, 1)).flatten()


def scatter_outer(
    by_latent: ByLatent,
    values: Float[Tensor, " nnz"],
    x: Float[Tensor, "n d"],
    *,
    latents: None = None,
    rows_per_x: int = 1,
    start: tuple[Float[Tensor, "c d"], Int64[Tensor, " c"]] | None = None,
    weight: Float[Tensor, "m d"] | None = None,
    along: Float[Tensor, " m"] | None = None,
    project: bool = False,
    out: Float[Tensor, "m d"] | None = None,
    squares: Float[Tensor, " m"],
) -> Float[Tensor, "m d"]:
    """`codes.T @ x` with what else a gradient has; as `unweave.kernels.cpu.scatter_outer`, but always of all latents.

    Memory for the result, `out`, is not used: PyTorch keeps a GPU's.
    """
    if rows_per_x > 1:
        by_latent = by_latent._replace(rows=torch.div(by_latent.rows, rows_per_x, rounding_mode="floor"))
    made = triton.segment_sum(by_latent, values, x)
    if start is not None:
        rows, where = start
        # No two add to one row but those of latents that do not exist, which add zeros: the order makes no difference.
        made.index_add_(0, where.clamp(max=len(made) - 1), rows)
    squares.copy_(triton.finish_rows(made, weight, along, project))
    return made


def sum_rows(x: Float[Tensor, "n d"], weights: Float[Tensor, " n"] | None = None) -> Float[Tensor, " d"]:
    """The sum of the rows, each times its weight."""
    return x.sum(0) if weights is None else weights @ x


def total(values: Tensor) -> Tensor:
    """The sum of all values, in float64."""
    return values.sum(dtype=torch.float64)


def squared_error_rows(
    indices: Int64[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    offsets: Int64[Tensor, " n*p+1"],
    scales: Float[Tensor, " p"],
    weight: Float[Tensor, "m d"],
    bias: Float[Tensor, " d"],
    x: Float[Tensor, "n d"],
    residual: Float[Tensor, "n d"] | None = None,
    grad: Float[Tensor, "n*p d"] | None = None,
) -> RowErrors:
    """Decode, residual, loss and the gradients of output and codes, row by row; see `unweave.kernels.reference`.

    Memory for the output's gradient, `grad`, is not used: PyTorch keeps a GPU's.
    """
    n, d, p = len(x), x.shape[1], len(scales)
    made = triton.squared_error(indices, values, offsets, weight, bias, x, scales, 0.5)
    if residual is not None:
        torch.div(made.grad.view(n, p, d)[:, -1], -scales[-1], out=residual)  # the last group is part of one prefix
    return RowErrors(made.squares, made.grad, made.grad_values)


def keep_largest_(values: Float[Tensor, "n c"], k: int) -> None:
    """Make everything 0, in place, but the k largest positive values of each row (float32 or bfloat16)."""
    chosen = triton.topk(values, k)
    values.zero_().scatter_(1, chosen.indices, chosen.values.relu())


def add_halves_(into: Float[Tensor, "*n"], halves: Tensor) -> None:
    """Add bfloat16 numbers, in place."""
    into += halves


def dense_codes(
    pre: Float[Tensor, "n m"],
    theta: Float[Tensor, " m"],
    codes: Float[Tensor, "n m"],
    active: Float[Tensor, " m"],
    sums: Float[Tensor, " m"],
) -> bool:
    """Codes of dense pre-activations (float32 or bfloat16) and their column sums.

    Returns:
        True: nobody looks whether all of them are finite. A NaN counts as active, so that the loss becomes NaN.
    """
    on = ~(pre <= theta)
    torch.where(on, pre, pre.new_zeros(()), out=codes)
    active += on.sum(0)
    sums += codes.sum(0, dtype=torch.float32)
    return True


def dense_back(
    back: Float[Tensor, "n m"],
    pre: Float[Tensor, "n m"],
    theta: Float[Tensor, " m"],
    add: Float[Tensor, " m"],
    half_width: float,
    bias: Float[Tensor, " m"],
    windows: Float[Tensor, " m"],
    towards: Float[Tensor, " m"],
) -> None:
    """From the gradient of codes to that of pre-activations, in place, and its column sums; see csrc/dense.h."""
    grad = back + add
    if half_width > 0:
        inside = ((pre - theta).abs() < half_width).float() / (2 * half_width)
        windows += inside.sum(0)
        towards -= (grad * inside).sum(0) * theta
    grad *= ~(pre <= theta)
    bias += grad.sum(0)
    back.copy_(grad)
