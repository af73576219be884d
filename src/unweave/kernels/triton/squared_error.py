"""The squared-error step of a row: decode, residual, loss, and its gradients, while the decoder rows are in cache.

One program takes one row of codes. Columns do not depend on each other until the dot products, so it goes through them
tile by tile: it decodes a tile, forms the residual and its gradient, and takes this tile's share of every dot product
with the same decoder rows, which it has just read.

Matryoshka prefixes are groups of entries. The reconstruction of prefix p is the sum over the groups up to p; group q's
gradient is the sum over the prefixes from q on. So each row has P groups, decoded forward with a running sum, and
differentiated backward with another. The ordinary loss is the case P = 1.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor, float32, int64

from unweave.kernels.triton.launch import FLOAT_OR_BF16, Arguments, launch, tile_width
from unweave.kernels.triton.segment_sum import add_rows

AT_ONCE = 8
WIDEST = 2048
"""Bytes of a tile: so much of each of 64 decoder rows still lies in the caches when it is read again."""


class SquaredError(NamedTuple):
    """What the fused pass gives for n rows and P prefixes."""

    squares: Float[Tensor, "n P"]
    """`‖x̂_p - x‖²` of each row and prefix, without weights or scale."""
    grad: Float[Tensor, "n*P d"]
    """Row `i * P + q`: gradient of the loss in what the entries of group q of row i decode to."""
    grad_values: Float[Tensor, " nnz"]
    """Gradient of the loss in the values."""


@triton.jit(do_not_specialize=["nnz", "m"])
def _squared_error(
    indices, values, offsets, weight, bias, x, prefix_weights, squares, grad, grad_values, scale, nnz, m, d,
    PREFIXES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    prefix = tl.arange(0, PADDED)
    total = tl.zeros((PADDED,), tl.float32)
    for first_column in range(0, d, BLOCK):
        columns = first_column + tl.arange(0, BLOCK)
        inside = columns < d
        target = tl.load(x + row * d + columns, inside, 0.0).to(tl.float32)
        residual = tl.load(bias + columns, inside, 0.0) - target
        for p in range(PREFIXES):
            group = row * PREFIXES + p
            start, end = tl.load(offsets + group), tl.load(offsets + group + 1)
            valid = (start >= 0) & (end >= start) & (end <= nnz)
            end = tl.where(valid, end, start)
            decoded = add_rows(weight, indices, values, indices, start, end, m, d, columns, False, AT_ONCE)
            residual += tl.where(valid, decoded, float("nan"))
            square = tl.sum(tl.where(inside, residual * residual, 0.0))
            total += tl.where(prefix == p, square, 0.0)
            slope = 2.0 * scale * tl.load(prefix_weights + p) * residual
            tl.store(grad + group * d + columns, slope, inside)
        # What is read from here on was written by other threads: these slopes, and the last tile's dot products.
        tl.debug_barrier()
        slope = tl.zeros((BLOCK,), tl.float32)
        for back in range(PREFIXES):
            group = row * PREFIXES + (PREFIXES - 1 - back)
            slope += tl.load(grad + group * d + columns, inside, 0.0)
            if back > 0:
                tl.store(grad + group * d + columns, slope, inside)
            start, end = tl.maximum(tl.load(offsets + group), 0), tl.minimum(tl.load(offsets + group + 1), nnz)
            for first in range(start, end, AT_ONCE):
                entry = first + tl.arange(0, AT_ONCE)
                live = entry < end
                index = tl.load(indices + entry, live, 0)
                exists = (index >= 0) & (index < m)
                mask = (live & exists)[:, None] & inside[None, :]
                w = tl.load(weight + index[:, None] * d + columns[None, :], mask, 0.0).to(tl.float32)
                share = tl.where(exists, tl.sum(w * slope[None, :], 1), float("nan"))
                before = tl.load(grad_values + entry, live & (first_column > 0), 0.0)
                tl.store(grad_values + entry, before + share, live)
    tl.store(squares + row * PREFIXES + prefix, total, prefix < PREFIXES)


def squared_error(
    indices: Int64[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    offsets: Int64[Tensor, " n*P+1"],
    weight: Float[Tensor, "m d"],
    bias: Float[Tensor, " d"],
    x: Float[Tensor, "n d"],
    prefix_weights: Float[Tensor, " P"],
    scale: float,
) -> SquaredError:
    """`scale · Σ_i Σ_p prefix_weights[p] · ‖x̂_ip - x_i‖²`, as sums by row, and its gradients.

    Here x̂_ip is `bias` plus the decoded entries of the groups up to p of row i.

    Args:
        indices: Latent of each entry; one that does not exist makes its row NaN.
        values: Codes, float32.
        offsets: Group q of row i has the entries from `offsets[i * P + q]` to the next offset.
        weight: The decoder, float32 or bfloat16.
        bias: Of the decoder, float32.
        x: What is to be reconstructed, float32 or bfloat16.
        prefix_weights: float32; `[1.0]` for the ordinary loss.
        scale: Common factor, such as one over the number of rows.
    """
    args = Arguments("squared_error")
    indices = args.take("indices", indices, "nnz", int64)
    values = args.take("values", values, "nnz", float32)
    offsets = args.take("offsets", offsets, "n*P+1", int64)
    weight = args.take("weight", weight, "m d", *FLOAT_OR_BF16)
    bias = args.take("bias", bias, "d", float32)
    x = args.take("x", x, "n d", *FLOAT_OR_BF16)
    prefix_weights = args.take("prefix_weights", prefix_weights, "P", float32)
    (n, d), m, prefixes, nnz = x.shape, len(weight), len(prefix_weights), len(indices)
    args.require(prefixes > 0, "prefix_weights is empty; the ordinary loss has one prefix of weight 1.")
    args.require(
        len(offsets) == n * prefixes + 1,
        f"offsets must have n * P + 1 = {n * prefixes + 1} elements for {n} rows and {prefixes} prefixes, "
        f"got {len(offsets)}.",
    )
    block = tile_width(d, WIDEST // weight.itemsize)
    squares, grad = x.new_empty(n, prefixes, dtype=float32), x.new_empty(n * prefixes, d, dtype=float32)
    grad_values = values.new_zeros(nnz)
    launch(
        _squared_error, (n,), indices, values, offsets, weight, bias, x, prefix_weights, squares, grad, grad_values,
        float(scale), nnz, m, d,
        PREFIXES=prefixes, PADDED=triton.next_power_of_2(prefixes), BLOCK=block, AT_ONCE=AT_ONCE,
    )  # fmt: skip
    return SquaredError(squares, grad, grad_values)
