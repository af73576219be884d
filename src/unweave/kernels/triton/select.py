"""Which pre-activations of a tile are kept. Ties go to the latent with the lowest index, as on every back-end.

Values are compared as integer keys of the same order: -0 and 0 share a key, NaN is the largest (so it is kept, and
seen), and 0 is no value's key but the mark of an absent one.

The exact top-k of a row takes two reads of it, and no sorting:

1. Maxima of strided lanes, at least 2 k of them. They are distinct entries, so their k-th largest is a lower bound of
   the row's k-th largest.
2. Everything at or above the bound is collected in the order of the latents, each tile by a prefix sum: k entries and a
   few more, unless the row was made to be difficult.
3. The k-th largest key is found among these bit by bit, each bit one pass of compare and count, and the winners are
   written, again by a prefix sum.

If a row has more candidates than there is room for, the third step reads the whole row, again and again. That is slow
and exact.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from unweave.kernels.triton.launch import FLOAT_OR_BF16, Arguments, launch

BITS_OF = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
TILE = 1024
MAX_LANES = 8192
AT_ONCE = 4
"""Loads in flight while the maxima are taken, when nothing else needs registers."""


class Chosen(NamedTuple):
    """A fixed number of pre-activations of each row."""

    indices: Int64[Tensor, "n k"]
    """Latents, ascending."""
    values: Float[Tensor, "n k"]
    """Their pre-activations, in the dtype of all."""


@triton.jit
def _keys(bits, BITS: tl.constexpr, MAGNITUDE: tl.constexpr):
    """The bits of floats as unsigned integers of the same order, from 1 to 2**BITS - 1; in 32 bits to one less."""
    bits = bits.to(tl.int32) << (32 - BITS)  # bfloat16 is the upper half of float32
    size = bits & 0x7FFFFFFF
    if MAGNITUDE:
        key = (size.to(tl.uint32, bitcast=True) >> (32 - BITS)) + 1
    else:
        bits = tl.where(size == 0, 0, bits)
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ -2147483648).to(tl.uint32, bitcast=True) >> (32 - BITS)
    return tl.where(size > 0x7F800000, 4294967294 >> (32 - BITS), key).to(tl.uint32)


@triton.jit
def _load_keys(pre, index, mask, BITS: tl.constexpr, MAGNITUDE: tl.constexpr):
    return tl.where(mask, _keys(tl.load(pre + index, mask, 0), BITS, MAGNITUDE), 0).to(tl.uint32)


@triton.jit
def _kth_largest(keys, k, BITS: tl.constexpr):
    """The k-th largest of some keys; 0 if there are fewer."""
    found = tl.full((), 0, tl.uint32)
    for bit in range(BITS):
        trial = found | (tl.full((), 1, tl.uint32) << (BITS - 1 - bit))
        found = tl.where(tl.sum((keys >= trial).to(tl.int32)) >= k, trial, found)
    return found


@triton.jit
def _count_at_least(pre, bound, m, BITS: tl.constexpr, MAGNITUDE: tl.constexpr, TILE: tl.constexpr):
    count = tl.zeros((TILE,), tl.int32)
    for first in range(0, m, TILE):
        index = first + tl.arange(0, TILE)
        count += (_load_keys(pre, index, index < m, BITS, MAGNITUDE) >= bound).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _write_winners(pre, index, keys, last, ties, tied, written, out_indices, out_values):
    """Write the keys above `last` and the first `ties` of those equal to it; `tied` and `written` came before."""
    equal = (keys == last).to(tl.int32)
    rank = tied + tl.cumsum(equal, 0)
    won = (keys > last) | ((equal == 1) & (rank <= ties))
    place = written + tl.cumsum(won.to(tl.int32), 0) - 1
    tl.store(out_indices + place, index.to(tl.int64), won)
    tl.store(out_values + place, tl.load(pre + index, won, 0), won)
    return tied + tl.sum(equal), written + tl.sum(won.to(tl.int32))


@triton.jit(do_not_specialize=["k"])
def _topk(
    pre, candidates, out_indices, out_values, m, k, stride,
    BITS: tl.constexpr, MAGNITUDE: tl.constexpr, LANES: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pre += row * stride
    candidates += row * LANES
    out_indices += row * k
    out_values += row * k
    lane = tl.arange(0, LANES)

    maxima = tl.zeros((LANES,), tl.uint32)
    strides = tl.arange(0, AT_ONCE)[:, None] * LANES + lane[None, :]
    for first in range(0, m, AT_ONCE * LANES):
        index = first + strides
        maxima = tl.maximum(maxima, tl.max(_load_keys(pre, index, index < m, BITS, MAGNITUDE), 0))
    bound = tl.maximum(_kth_largest(maxima, k, BITS), 1)

    found = 0
    for first in range(0, m, LANES):
        index = first + lane
        hit = (_load_keys(pre, index, index < m, BITS, MAGNITUDE) >= bound).to(tl.int32)
        place = found + tl.cumsum(hit, 0) - 1
        tl.store(candidates + place, index, (hit == 1) & (place < LANES))
        found += tl.sum(hit)

    if found <= LANES:
        tl.debug_barrier()  # the candidates were written by other threads
        index = tl.load(candidates + lane, lane < found, 0)
        keys = _load_keys(pre, index, lane < found, BITS, MAGNITUDE)
        last = _kth_largest(keys, k, BITS)
        ties = k - tl.sum((keys > last).to(tl.int32))
        _write_winners(pre, index, keys, last, ties, 0, 0, out_indices, out_values)
    else:
        last = tl.full((), 0, tl.uint32)
        for bit in range(BITS):
            trial = last | (tl.full((), 1, tl.uint32) << (BITS - 1 - bit))
            reached = trial <= bound  # then there is nothing to count
            if reached == 0:
                reached = _count_at_least(pre, trial, m, BITS, MAGNITUDE, LANES) >= k
            last = tl.where(reached, trial, last)
        ties = k - _count_at_least(pre, last + 1, m, BITS, MAGNITUDE, LANES)
        tied, written = 0, 0
        for first in range(0, m, LANES):
            index = first + lane
            keys = _load_keys(pre, index, index < m, BITS, MAGNITUDE)
            tied, written = _write_winners(pre, index, keys, last, ties, tied, written, out_indices, out_values)


@triton.jit(do_not_specialize=["k"])
def _group_max(
    pre, out_indices, out_values, k, size, stride, BITS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pre += row * stride
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    best = tl.zeros((GROUPS,), tl.uint32)
    winner = tl.zeros((GROUPS,), tl.int32)
    for first in range(0, size, TILE):
        member = first + tl.arange(0, TILE)
        index = group[:, None] * size + member[None, :]
        keys = _load_keys(pre, index, (group < k)[:, None] & (member < size)[None, :], BITS, False)
        top = tl.max(keys, 1)
        lowest = tl.min(tl.where(keys == top[:, None], index, 2147483647), 1)
        winner = tl.where(top > best, lowest, winner)
        best = tl.maximum(top, best)
    tl.store(out_indices + row * k + group, winner.to(tl.int64), group < k)
    tl.store(out_values + row * k + group, tl.load(pre + winner, group < k, 0), group < k)


def warps_for(tile: int) -> int:
    """Warps of a program that takes `tile` pre-activations at a time: 8 for each thread."""
    return max(1, min(tile // 256, 32))


def take_rows(args: Arguments, pre: Tensor) -> Tensor:
    """The checked pre-activations; some columns of a wider tensor are not copied."""
    pre = args.take("pre", pre, "n m", *FLOAT_OR_BF16, gaps=True)
    args.require(0 < pre.shape[1] < 2**31, f"pre has {pre.shape[1]} latents; it needs 1 or more, and fewer than 2^31.")
    return pre


def topk(pre: Float[Tensor, "n m"], k: int, *, magnitude: bool = False) -> Chosen:
    """The `k` largest pre-activations of each row, exactly; among equal ones the lowest latents win.

    Args:
        pre: float32 or bfloat16. NaN counts as the largest.
        k: From 1 to m.
        magnitude: Whether sizes are compared instead of values.
    """
    args = Arguments("topk")
    pre = take_rows(args, pre)
    n, m = pre.shape
    args.require(1 <= k <= m, f"k must lie between 1 and the number of latents, {m}, got {k}.")
    lanes = min(triton.next_power_of_2(m), max(TILE, min(triton.next_power_of_2(2 * k), MAX_LANES)))
    indices, values = pre.new_empty(n, k, dtype=torch.int64), pre.new_empty(n, k)
    candidates = pre.new_empty(n, lanes, dtype=torch.int32)
    bits = BITS_OF[pre.dtype]
    launch(
        _topk, (n,), pre.view(bits), candidates, indices, values.view(bits), m, k, pre.stride(0),
        BITS=pre.itemsize * 8, MAGNITUDE=magnitude, LANES=lanes, AT_ONCE=AT_ONCE, warps=warps_for(lanes),
    )  # fmt: skip
    return Chosen(indices, values)


def group_max(pre: Float[Tensor, "n m"], k: int) -> Chosen:
    """The largest pre-activation in each of `k` groups of m / k neighbouring latents; the lowest of equal ones.

    Args:
        pre: float32 or bfloat16. NaN counts as the largest.
        k: Divides m.
    """
    args = Arguments("group_max")
    pre = take_rows(args, pre)
    n, m = pre.shape
    args.require(k > 0 and m % k == 0, f"k must divide the number of latents, {m}, got {k}.")
    indices, values = pre.new_empty(n, k, dtype=torch.int64), pre.new_empty(n, k)
    tile = min(triton.next_power_of_2(m // k), TILE)
    groups = min(triton.next_power_of_2(k), TILE // tile)
    bits = BITS_OF[pre.dtype]
    launch(
        _group_max, (n, triton.cdiv(k, groups)), pre.view(bits), indices, values.view(bits), k, m // k, pre.stride(0),
        BITS=pre.itemsize * 8, GROUPS=groups, TILE=tile, warps=warps_for(groups * tile),
    )  # fmt: skip
    return Chosen(indices, values)
