"""Everything above a vector of bounds, however much that is, without waiting to know it.

The caller counts, adds up, and says where each row begins in what all rows share, so no row has room of its own and
nothing waits for the device. What has no room is left out, and the caller can see that from the counts.

Bounds may be lower for some rows than for others, by a slack that is a product of the latent's and the row's: so is the
error of a product of them.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from unweave.kernels.triton.launch import Arguments, launch
from unweave.kernels.triton.select import TILE, take_rows, warps_for


@triton.jit
def _load_hits(pre, bounds, slack, size, index, m, SLACK: tl.constexpr):
    """Some pre-activations of a row, and for each of them 1 if it is above its bound, else 0."""
    inside = index < m
    value = tl.load(pre + index, inside, 0.0).to(tl.float32)
    bound = tl.load(bounds + index, inside, 0.0)
    if SLACK:
        bound -= size * tl.load(slack + index, inside, 0.0)
    below = value <= bound
    return value, (inside & (below == 0)).to(tl.int32)  # NaN is not below


@triton.jit
def _count_above(pre, bounds, slack, sizes, counts, m, stride, SLACK: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pre += row * stride
    size = tl.load(sizes + row)
    count = tl.zeros((TILE,), tl.int32)
    for first in range(0, m, TILE):
        _, hit = _load_hits(pre, bounds, slack, size, first + tl.arange(0, TILE), m, SLACK)
        count += hit
    tl.store(counts + row, tl.sum(count))


@triton.jit(do_not_specialize=["room"])
def _write_above(
    pre, bounds, slack, sizes, starts, indices, values, m, room, stride, SLACK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pre += row * stride
    size = tl.load(sizes + row)
    end = tl.load(starts + row)
    for first in range(0, m, TILE):
        index = first + tl.arange(0, TILE)
        value, hit = _load_hits(pre, bounds, slack, size, index, m, SLACK)
        place = end + tl.cumsum(hit, 0) - 1
        fits = (hit == 1) & (place >= 0) & (place < room)
        tl.store(indices + place, index.to(tl.int64), fits)
        tl.store(values + place, value, fits)
        end += tl.sum(hit)


class Bounds(NamedTuple):
    """`latents[j] - slack[j] * sizes[i]` is the bound of latent j in row i; without a slack, `latents[j]`."""

    latents: Float[Tensor, " m"]
    slack: Float[Tensor, " m"] | None = None
    sizes: Float[Tensor, " n"] | None = None

    def of_rows(self, rows: slice) -> Bounds:
        """Those of some rows."""
        return self if self.sizes is None else self._replace(sizes=self.sizes[rows])


def _take_bounds(args: Arguments, bounds: Bounds) -> tuple[Tensor, Tensor, Tensor, bool]:
    latents = args.take("bounds.latents", bounds.latents, "m", torch.float32)
    if bounds.slack is None or bounds.sizes is None:
        return latents, latents, latents.new_zeros(args.sizes["n"]), False
    slack = args.take("bounds.slack", bounds.slack, "m", torch.float32)
    return latents, slack, args.take("bounds.sizes", bounds.sizes, "n", torch.float32), True


def count_above(pre: Float[Tensor, "n m"], bounds: Bounds) -> Int64[Tensor, " n"]:
    """How many pre-activations of each row lie strictly above their bound.

    Args:
        pre: float32 or bfloat16. NaN counts as above.
        bounds: float32.
    """
    args = Arguments("count_above")
    pre = take_rows(args, pre)
    *where, slack = _take_bounds(args, bounds)
    n, m = pre.shape
    counts = pre.new_empty(n, dtype=torch.int64)
    tile = min(triton.next_power_of_2(m), TILE)
    launch(_count_above, (n,), pre, *where, counts, m, pre.stride(0), SLACK=slack, TILE=tile, warps=warps_for(tile))
    return counts


def write_above(
    pre: Float[Tensor, "n m"],
    bounds: Bounds,
    starts: Int64[Tensor, " n"],
    indices: Int64[Tensor, " room"],
    values: Float[Tensor, " room"],
) -> None:
    """Write the pre-activations that `count_above` counts, each row's from its start on, ascending by latent.

    Args:
        pre: float32 or bfloat16.
        bounds: float32.
        starts: Where each row begins in the outputs. What would lie before or beyond them is not written.
        indices: Receives the latents. Places that belong to no row stay as they are.
        values: Receives the pre-activations, float32.
    """
    args = Arguments("write_above")
    pre = take_rows(args, pre)
    *where, slack = _take_bounds(args, bounds)
    starts = args.take("starts", starts, "n", torch.int64)
    args.take("indices", indices, "room", torch.int64, in_place=True)
    args.take("values", values, "room", torch.float32, in_place=True)
    (n, m), room = pre.shape, len(indices)
    tile = min(triton.next_power_of_2(m), TILE)
    launch(
        _write_above, (n,), pre, *where, starts, indices, values, m, room, pre.stride(0),
        SLACK=slack, TILE=tile, warps=warps_for(tile),
    )  # fmt: skip
