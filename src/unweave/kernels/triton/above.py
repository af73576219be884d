"""Everything above a vector of bounds, without waiting to know how much that is.

The caller says how much room each row has. A row that needs more says so by its count, and keeps its first entries.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from unweave.kernels.triton.launch import FLOAT_OR_BF16, Arguments, launch
from unweave.kernels.triton.select import TILE, take_rows, warps_for


class Above(NamedTuple):
    """Up to `capacity` pre-activations of each row."""

    indices: Int64[Tensor, "n capacity"]
    """Latents, ascending; -1 in the places that are left."""
    values: Float[Tensor, "n capacity"]
    """Their pre-activations; 0 in the places that are left."""
    counts: Int64[Tensor, " n"]
    """How many the row has, which may be more than there is room for."""

    @property
    def overflow(self) -> Bool[Tensor, ""]:
        """Whether any row has more than there is room for; on the device, so that nobody waits for it here."""
        return (self.counts > self.indices.shape[1]).any()


@triton.jit(do_not_specialize=["capacity"])
def _above(
    pre, bounds, out_indices, out_values, counts, m, capacity, stride,
    TILE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pre += row * stride
    out_indices += row * capacity
    out_values += row * capacity
    count = 0
    for first in range(0, m, TILE):
        index = first + tl.arange(0, TILE)
        inside = index < m
        value = tl.load(pre + index, inside, 0.0)
        below = value.to(tl.float32) <= tl.load(bounds + index, inside, 0.0)
        hit = (inside & (below == 0)).to(tl.int32)  # NaN is not below
        place = count + tl.cumsum(hit, 0) - 1
        fits = (hit == 1) & (place < capacity)
        tl.store(out_indices + place, index.to(tl.int64), fits)
        tl.store(out_values + place, value, fits)
        count += tl.sum(hit)
    for first in range(tl.minimum(count, capacity), capacity, TILE):
        place = first + tl.arange(0, TILE)
        tl.store(out_indices + place, tl.full((TILE,), -1, tl.int64), place < capacity)
        tl.store(out_values + place, tl.zeros((TILE,), out_values.dtype.element_ty), place < capacity)
    tl.store(counts + row, count)


@triton.jit(do_not_specialize=["capacity"])
def _pack(indices, values, offsets, out_indices, out_values, capacity, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + row)
    count = tl.load(offsets + row + 1) - start
    for first in range(0, count, TILE):
        place = first + tl.arange(0, TILE)
        source, target = row * capacity + place, start + place
        tl.store(out_indices + target, tl.load(indices + source, place < count), place < count)
        tl.store(out_values + target, tl.load(values + source, place < count), place < count)


def above(pre: Float[Tensor, "n m"], bounds: Float[Tensor, " m"], capacity: int) -> Above:
    """The first `capacity` pre-activations of each row that lie strictly above the bound of their latent.

    Args:
        pre: float32 or bfloat16. NaN counts as above.
        bounds: float32.
        capacity: Room for each row. Look at `overflow` when waiting is no loss, and repeat with more room if it is set.
    """
    args = Arguments("above")
    pre = take_rows(args, pre)
    bounds = args.take("bounds", bounds, "m", torch.float32)
    n, m = pre.shape
    args.require(capacity > 0, f"capacity must be positive, got {capacity}.")
    indices, values = pre.new_empty(n, capacity, dtype=torch.int64), pre.new_empty(n, capacity)
    counts = pre.new_empty(n, dtype=torch.int64)
    tile = min(triton.next_power_of_2(m), TILE)
    launch(
        _above, (n,), pre, bounds, indices, values, counts, m, capacity, pre.stride(0), TILE=tile, warps=warps_for(tile)
    )
    return Above(indices, values, counts)


def pack(selected: Above) -> tuple[Int64[Tensor, " room"], Float[Tensor, " room"], Int64[Tensor, " n+1"]]:
    """The kept entries one row after the other, as (indices, values, offsets).

    Returns:
        `n * capacity` places, of which those up to `offsets[-1]` are filled; the products ignore the others.
    """
    args = Arguments("pack")
    indices = args.take("indices", selected.indices, "n capacity", torch.int64)
    values = args.take("values", selected.values, "n capacity", *FLOAT_OR_BF16)
    counts = args.take("counts", selected.counts, "n", torch.int64)
    n, capacity = indices.shape
    offsets = torch.nn.functional.pad(counts.clamp(max=capacity).cumsum(0), (1, 0))
    out_indices, out_values = indices.new_full((n * capacity,), -1), values.new_zeros(n * capacity)
    tile = min(triton.next_power_of_2(capacity), 1024)
    launch(_pack, (n,), indices, values, offsets, out_indices, out_values, capacity, TILE=tile)
    return out_indices, out_values, offsets
