"""Weighted sums of rows: `gather_sum` for the decoder, `segment_sum` for the weight gradients.

`gather_sum` gives each row of codes and each tile of columns to one program, which keeps several rows of the weight in
flight and adds them in fp32.

For a weight gradient the entries are needed latent by latent. `transpose` sorts them once for both gradients:

    order     entry 4, entry 9 | entry 2 | (none) | entry 0, entry 1, entry 3, ...
    rows      the row of codes that each of them comes from
    offsets   latent 0 = 0:2, latent 1 = 2:3, latent 2 = 3:3, latent 3 = 3:...

A latent that fires on every token has as many entries as there are tokens, and one program would need as long for it as
for everything else. So every latent is cut into pieces of `piece_for` entries, at least one piece even without entries:
`nnz // piece + m` programs are always enough, a number that is known without looking at the data.

    latent_of_piece   0, 1, 2, 3, 3, 3, m, m    one program each; those of latent m have nothing to do
    first_piece       0, 1, 2, 3, 6             where each latent's pieces begin

The only piece of a latent writes the result. The pieces of a long latent write partial sums, at most
`2 * (nnz // piece)` rows, which a second kernel adds in their order:

    first_partial     -, -, -, 0                where the partial sums of each long latent begin
    long              3, m, m                   the long latents; at most nnz // (piece + 1)

Entries beyond `offsets[-1]` are room that the caller reserved and did not fill; they belong to nothing.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import pad

from unweave.kernels.triton.launch import FLOAT_OR_BF16, Arguments, launch, tile_width

PIECE = 128
IN_FLIGHT = 4


@triton.jit
def add_rows(
    matrix, ids, values, order, start, end, n_rows, d, columns, ORDERED: tl.constexpr, IN_FLIGHT: tl.constexpr
):  # fmt: skip
    """The sum of `values[e] * matrix[ids[e], columns]` over the entries `start:end`.

    With ORDERED, the value of entry e is `values[order[e]]`.
    """
    lanes = tl.arange(0, IN_FLIGHT)
    inside = columns < d
    total = tl.zeros((IN_FLIGHT, columns.shape[0]), tl.float32)
    for first in range(start, end, IN_FLIGHT):
        entry = first + lanes
        live = entry < end
        row = tl.load(ids + entry, live, 0)
        slot = tl.load(order + entry, live, 0) if ORDERED else entry
        value = tl.load(values + slot, live, 0.0)
        valid = (row >= 0) & (row < n_rows)
        tile = tl.load(matrix + row[:, None] * d + columns[None, :], (live & valid)[:, None] & inside[None, :], 0.0)
        total += tl.where(valid, value, float("nan"))[:, None] * tile.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["nnz", "m"])
def _gather_sum(indices, values, offsets, weight, out, nnz, m, d, BLOCK: tl.constexpr, IN_FLIGHT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    valid = (start >= 0) & (end >= start) & (end <= nnz)
    end = tl.where(valid, end, start)
    total = add_rows(weight, indices, values, indices, start, end, m, d, columns, False, IN_FLIGHT)
    tl.store(out + row * d + columns, tl.where(valid, total, float("nan")), columns < d)


def gather_sum(
    indices: Int64[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    offsets: Int64[Tensor, " n+1"],
    weight: Float[Tensor, "m d"],
) -> Float[Tensor, "n d"]:
    """`codes @ weight`: row i is the sum of `values[e] * weight[indices[e]]` over its entries e.

    Args:
        indices: Row of `weight` of each entry; one that does not exist makes the result's row NaN.
        values: float32.
        offsets: Row i has the entries `offsets[i]:offsets[i + 1]`.
        weight: float32 or bfloat16.

    Returns:
        The sums, float32.
    """
    args = Arguments("gather_sum")
    indices = args.take("indices", indices, "nnz", torch.int64)
    values = args.take("values", values, "nnz", torch.float32)
    offsets = args.take("offsets", offsets, "n+1", torch.int64)
    weight = args.take("weight", weight, "m d", *FLOAT_OR_BF16)
    n, (m, d), nnz = args.sizes["n"], weight.shape, len(indices)
    out, block = values.new_empty(n, d), tile_width(d)
    grid = (n, triton.cdiv(d, block))
    launch(_gather_sum, grid, indices, values, offsets, weight, out, nnz, m, d, BLOCK=block, IN_FLIGHT=IN_FLIGHT)
    return out


def piece_for(nnz: int, m: int) -> int:
    """Entries of a piece: more where there are so many entries that partial sums would take more than the result."""
    return max(PIECE, triton.next_power_of_2(2 * nnz // max(m, 4096)))


def room_for_partials(nnz: int, piece: int = PIECE) -> int:
    """Partial sums of the latents with more than one piece, at most: with q whole pieces, a latent has up to q + 1."""
    return 2 * (nnz // piece)


class ByLatent(NamedTuple):
    """Entries of codes latent by latent, and how the work on them is cut; the module's text explains the layout."""

    order: Int64[Tensor, " nnz"]
    """Positions of the entries in the codes; those of one latent keep their order."""
    rows: Int64[Tensor, " nnz"]
    """Row of codes of each entry; -1 if the entry names a latent that does not exist."""
    offsets: Int64[Tensor, " m+1"]
    """Latent j has the entries `offsets[j]:offsets[j + 1]`."""
    latent_of_piece: Int64[Tensor, " pieces"]
    """Latent of each piece; m for those that are not needed."""
    first_piece: Int64[Tensor, " m+1"]
    """First piece of each latent."""
    first_partial: Int64[Tensor, " m"]
    """First partial sum of each latent that has more than one piece."""
    long: Int64[Tensor, " longest"]
    """The latents of more than one piece, then m."""


def transpose(indices: Int64[Tensor, " nnz"], offsets: Int64[Tensor, " n+1"], m: int) -> ByLatent:
    """The entries of codes over `m` latents, ordered by latent, those of one latent by row.

    Args:
        indices: Latent of each entry. Entries of a latent that does not exist go to the nearest and make it NaN.
        offsets: Row i has the entries `offsets[i]:offsets[i + 1]`.
        m: Number of latents.
    """
    args = Arguments("transpose")
    indices = args.take("indices", indices, "nnz", torch.int64)
    offsets = args.take("offsets", offsets, "n+1", torch.int64)
    args.require(0 < m < 2**31 - 1, f"m must be positive and below 2^31 - 1, got {m}.")
    nnz, device = len(indices), indices.device
    piece = piece_for(nnz, m)

    existing = indices.clamp(0, m - 1)
    filled = torch.arange(nnz, device=device) < offsets[-1]
    # 32 bits are sorted in half the time of 64.
    latents, order = torch.where(filled, existing, m).int().sort(stable=True)
    rows = torch.searchsorted(offsets, order, right=True) - 1
    rows = torch.where((indices == existing)[order], rows, -1)
    bounds = torch.searchsorted(latents, torch.arange(m + 1, device=device, dtype=torch.int32))

    pieces = ((bounds.diff() + piece - 1) // piece).clamp(min=1)
    is_long = pieces > 1
    ends = pieces.cumsum(0)
    partials = torch.where(is_long, pieces, 0)
    return ByLatent(
        order=order,
        rows=rows,
        offsets=bounds,
        latent_of_piece=torch.searchsorted(ends, torch.arange(nnz // piece + m, device=device), right=True),
        first_piece=pad(ends, (1, 0)),
        first_partial=partials.cumsum(0) - partials,
        long=torch.searchsorted(is_long.cumsum(0), torch.arange(1, nnz // (piece + 1) + 1, device=device)),
    )


@triton.jit(do_not_specialize=["n", "m"])
def _add_pieces(
    x, values, order, rows, offsets, latent_of_piece, first_piece, first_partial, out, partial, n, m, d,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, IN_FLIGHT: tl.constexpr
):  # fmt: skip
    piece = tl.program_id(0)
    latent = tl.load(latent_of_piece + piece)
    if latent < m:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        first = tl.load(first_piece + latent)
        direct = tl.where(tl.load(first_piece + latent + 1) - first == 1, d, 0)  # columns that go to the result
        start = tl.load(offsets + latent) + (piece - first) * PIECE
        end = tl.minimum(start + PIECE, tl.load(offsets + latent + 1))
        total = add_rows(x, rows, values, order, start, end, n, d, columns, True, IN_FLIGHT)
        tl.store(out + latent * d + columns, total, columns < direct)
        target = tl.load(first_partial + latent) + piece - first
        tl.store(partial + target * d + columns, total, columns < d - direct)


@triton.jit(do_not_specialize=["m"])
def _add_partials(
    partial, long, first_piece, first_partial, out, m, d, BLOCK: tl.constexpr, IN_FLIGHT: tl.constexpr
):  # fmt: skip
    latent = tl.load(long + tl.program_id(0))
    if latent < m:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        lanes = tl.arange(0, IN_FLIGHT)
        count = tl.load(first_piece + latent + 1) - tl.load(first_piece + latent)
        base = tl.load(first_partial + latent)
        total = tl.zeros((IN_FLIGHT, BLOCK), tl.float32)
        for first in range(0, count, IN_FLIGHT):
            row = first + lanes
            mask = (row < count)[:, None] & (columns < d)[None, :]
            total += tl.load(partial + (base + row)[:, None] * d + columns[None, :], mask, 0.0)
        tl.store(out + latent * d + columns, tl.sum(total, 0), columns < d)


def segment_sum(by_latent: ByLatent, values: Float[Tensor, " nnz"], x: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
    """`codes.T @ x`: row j is the sum of `values[e] * x[row of e]` over the entries e of latent j.

    Args:
        by_latent: What `transpose` gave for the codes.
        values: float32, in the order of the codes, not of `by_latent`.
        x: float32 or bfloat16. A column of ones gives the sums of the values by latent.

    Returns:
        The sums, float32; 0 for a latent without entries.
    """
    args = Arguments("segment_sum")
    args.take("by_latent.order", by_latent.order, "nnz", torch.int64)
    values = args.take("values", values, "nnz", torch.float32)
    x = args.take("x", x, "n d", *FLOAT_OR_BF16)
    (n, d), nnz, m = x.shape, len(values), len(by_latent.first_partial)
    out, block, piece = values.new_empty(m, d), tile_width(d), piece_for(nnz, m)
    partial = values.new_empty(room_for_partials(nnz, piece), d)
    order, rows, offsets, latent_of_piece, first_piece, first_partial, long = by_latent
    tiles = triton.cdiv(d, block)
    launch(
        _add_pieces, (len(latent_of_piece), tiles), x, values, order, rows, offsets, latent_of_piece, first_piece,
        first_partial, out, partial, n, m, d, BLOCK=block, PIECE=piece, IN_FLIGHT=IN_FLIGHT,
    )  # fmt: skip
    if len(long):
        launch(
            _add_partials, (len(long), tiles), partial, long, first_piece, first_partial, out, m, d,
            BLOCK=block, IN_FLIGHT=IN_FLIGHT,
        )  # fmt: skip
    return out


def scatter_outer(
    indices: Int64[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    offsets: Int64[Tensor, " n+1"],
    x: Float[Tensor, "n d"],
    m: int,
) -> Float[Tensor, "m d"]:
    """`codes.T @ x` for codes over `m` latents: `transpose`, then `segment_sum`. Shapes and dtypes are theirs."""
    args = Arguments("scatter_outer")
    args.take("offsets", offsets, "n+1", torch.int64)
    args.take("x", x, "n d", *FLOAT_OR_BF16)
    return segment_sum(transpose(indices, offsets, m), values, x)
