"""The dense product of a step on a GPU, and what is kept of it.

Pre-activations are made for some rows at a time, so the full `(n, d_sae)` tensor does not exist. From a bf16 product a
shortlist is kept, whose values are computed again in fp32, and the selection is made among these:

    Largest   of the k + `SPARE` largest. A latent is missed only if rounding puts more than `SPARE` others before it.
    Above     of everything down to `MARGIN` below the bounds, in units of what rounding can be expected to change.
    LargestOfGroups   takes fp32 products, since every group's winner would need a shortlist of its own

`largest` and `above` wait for nothing and look at nothing: NaN counts as the largest number, so it is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.kernels import triton
from unweave.kernels.select import Above, Largest, LargestOfGroups, Selection, TooDense, kept
from unweave.kernels.triton import Bounds
from unweave.kernels.triton.screened import SPARE

MARGIN = 8.0
"""How far below its bound a bf16 pre-activation is kept, in `2^-9 (‖w‖ rms(x) + |bound| + |b_enc|)`. Rounding has about
one of these as its standard deviation, unless few dimensions make most of the sum."""
_CHUNK_BYTES = 1 << 29
"""Of the pre-activations that are held at a time."""


class _Chunk(NamedTuple):
    rows: slice
    pre: Float[Tensor, "c m"]


def _chunks(x: Tensor, weight: Tensor, bias: Tensor, low: bool, half: Tensor | None = None) -> Iterator[_Chunk]:
    """Pre-activations of some rows after the other, each in the memory of the ones before."""
    dtype = torch.bfloat16 if low else x.dtype
    factor = half if low and half is not None else weight.to(dtype)
    b = bias.to(dtype)
    count = max(1, min(len(x), _CHUNK_BYTES // (dtype.itemsize * len(weight))))
    buffer = x.new_empty(count, len(weight), dtype=dtype)
    for start in range(0, len(x), count):
        rows = x[start : start + count].to(dtype)
        yield _Chunk(slice(start, start + len(rows)), torch.addmm(b, rows, factor.T, out=buffer[: len(rows)]))


def largest(x: Tensor, W_enc: Tensor, b_enc: Tensor, spec: Largest, low: bool, half: Tensor | None = None) -> Selection:
    """The `k` largest of each row; `half` has the encoder's rows in bf16, if somebody has made them."""
    n, weight = len(x), W_enc.T.contiguous()
    indices, values = x.new_empty(n, spec.k, dtype=torch.int64), x.new_empty(n, spec.k)
    for rows, pre in _chunks(x, weight, b_enc, low, half):
        if low:
            found = triton.topk_screened(pre, x[rows], weight, b_enc, spec.k, spare=SPARE, magnitude=spec.magnitude)
        else:
            found = triton.topk(pre, spec.k, magnitude=spec.magnitude)
        indices[rows], values[rows] = found
    counts = torch.full((n,), spec.k, device=x.device)
    return Selection(counts, indices.flatten(), values.flatten())


def above(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    bounds: Float[Tensor, " m"] | float,
    low: bool,
    room: int,
    half: Tensor | None = None,
) -> Selection:
    """At least what is strictly above the bounds; from a bf16 product, entries a little below them too.

    Args:
        x: Encoder input.
        W_enc: Encoder weights.
        b_enc: Encoder bias.
        bounds: For each latent, or one for all.
        low: Whether the product is made in bf16.
        room: How many entries there is room for.
        half: The encoder's rows in bf16, if somebody has made them.

    Returns:
        `room` entries, of which those up to the sum of `counts` are filled. If the sum is larger, the rest was left
        out.
    """
    n, weight, lowest = len(x), W_enc.T.contiguous(), lowered(x, W_enc, b_enc, bounds, low)
    indices, values = torch.full((room,), -1, device=x.device), x.new_zeros(room)
    counts, filled = x.new_empty(n, dtype=torch.int64), torch.zeros((), dtype=torch.int64, device=x.device)
    for rows, pre in _chunks(x, weight, b_enc, low, half):
        counts[rows] = triton.count_above(pre, lowest.of_rows(rows))
        ends = filled + counts[rows].cumsum(0)
        triton.write_above(pre, lowest.of_rows(rows), ends - counts[rows], indices, values)
        filled = ends[-1]
    if low and n:
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).clamp(max=room)
        exact = triton.sddmm(indices, offsets, x, weight) + b_enc[indices]
        values = torch.where(torch.arange(room, device=x.device) < offsets[-1], exact, 0.0)
    return Selection(counts, indices, values)


def lowered(x: Tensor, W_enc: Tensor, b_enc: Tensor, bounds: Float[Tensor, " m"] | float, low: bool) -> Bounds:
    """The bounds that a product's pre-activations are compared with."""
    if not isinstance(bounds, Tensor):
        bounds = torch.full_like(b_enc, bounds, dtype=torch.float32)
    of_all = bounds.to(torch.float32).expand(W_enc.shape[1])
    if not low:
        return Bounds(of_all.contiguous())
    unit = MARGIN * 2.0**-9
    sizes = x.norm(dim=1) / x.shape[1] ** 0.5
    return Bounds(of_all - unit * (of_all.abs() + b_enc.abs()), unit * W_enc.norm(dim=0), sizes)


def above_exactly(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    bounds: Float[Tensor, " m"] | float,
    low: bool,
    half: Tensor | None,
    max_density: float,
) -> Selection:
    """What is strictly above the bounds; the host waits to know how much that is, for some rows at a time.

    Raises:
        TooDense: If more than a share of the first rows' entries are.
    """
    parts: list[Selection] = []
    weight, lowest = W_enc.T.contiguous(), lowered(x, W_enc, b_enc, bounds, low)
    for rows, pre in _chunks(x, weight, b_enc, low, half):
        counts = triton.count_above(pre, lowest.of_rows(rows))
        ends = counts.cumsum(0)
        room = int(ends[-1])
        if not parts and room > max_density * pre.numel():
            raise TooDense
        indices, values = x.new_empty(room, dtype=torch.int64), x.new_empty(room)
        triton.write_above(pre, lowest.of_rows(rows), ends - counts, indices, values)
        part = Selection(counts, indices, values)
        if low:
            exact = triton.sddmm(indices, torch.nn.functional.pad(ends, (1, 0)), x[rows], weight) + b_enc[indices]
            limit = bounds[indices] if isinstance(bounds, Tensor) and bounds.ndim else bounds
            part = kept(part._replace(values=exact), ~(exact <= limit))
        parts.append(part)
    columns = zip(*parts, strict=True) if parts else [[x.new_empty(0, dtype=torch.int64)]] * 2 + [[x.new_empty(0)]]
    return Selection(*(torch.cat(list(column)) for column in columns))


def select(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    spec: Largest | LargestOfGroups | Above,
    low: bool,
    half: Tensor | None,
    max_density: float,
) -> Selection:
    """What a selection keeps; see `unweave.kernels.encode_select`."""
    match spec:
        case Largest():
            return largest(x, W_enc, b_enc, spec, low, half)
        case LargestOfGroups(groups):
            return largest_of_groups(x, W_enc, b_enc, groups)
        case Above(bounds):
            return above_exactly(x, W_enc, b_enc, bounds, low, half, max_density)


def largest_of_groups(x: Tensor, W_enc: Tensor, b_enc: Tensor, groups: int) -> Selection:
    """The largest of each group of neighbouring latents."""
    n = len(x)
    indices, values = x.new_empty(n, groups, dtype=torch.int64), x.new_empty(n, groups)
    for rows, pre in _chunks(x, W_enc.T.contiguous(), b_enc, low=False):
        indices[rows], values[rows] = triton.group_max(pre, groups)
    counts = torch.full((n,), groups, device=x.device)
    return Selection(counts, indices.flatten(), values.flatten())


def first_not_finite(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> int | None:
    """The first row with a pre-activation that is NaN or infinite, for which the host waits."""
    if not len(x) or (x.norm(dim=1).amax() * W_enc.norm(dim=0).amax() + b_enc.abs().amax()).isfinite():
        return None  # no pre-activation is larger than that
    for rows, pre in _chunks(x, W_enc.T.contiguous(), b_enc, low=False):
        if len(bad := (~pre.isfinite()).any(1).nonzero()):
            return rows.start + int(bad[0])
    return None
