"""The dense product of a step, and what is kept of it.

Pre-activations are made tile by tile in one reused buffer and looked at while they are in cache, so the full
`(n, d_sae)` tensor never exists. With compiled kernels on a CPU the product only screens: whatever may belong to the
selection, given the rounding of the product, is computed again as an fp32 dot product, and the selection is made among
these. It is the same, bit for bit, whatever the precision of the product and the number of threads.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.kernels import cpu, select
from unweave.kernels.collector import Collector
from unweave.kernels.dispatch import backend
from unweave.kernels.scratch import LIKE_W_ENC, scratch
from unweave.kernels.screen import Images, Precision, Screen, Screening, too_coarse
from unweave.kernels.select import Above, Largest, LargestOfBatch, LargestOfGroups, Selection, Spec, TooDense

CHUNK_ROWS = 512
TILE = 16_384
FUSED_ROWS = 4096
"""Rows of a chunk where products are made by the kernels, and only its candidates take memory."""
FIRST_TILE = 2048
"""Latents of such a chunk after which it is first seen whether it is too dense."""
_PROBE_ROWS = 64
_GUESS = 0.25
"""Share of the slack that floors of `Largest` are set below what was seen, after an int8 product: twice the standard
deviation of the error."""


def encode_select(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    spec: Spec,
    *,
    precision: Precision = "auto",
    screen: Screen | None = None,
    max_density: float = 1.0,
) -> Selection:
    """Compute `x @ W_enc + b_enc` once and return what is asked for.

    Args:
        x: Encoder input; a pre-encoder bias is subtracted already.
        W_enc: Encoder weights; fastest when laid out latent by latent (`W_enc.T` is contiguous).
        b_enc: Encoder bias.
        spec: What to keep.
        precision: Of the product. On a CPU it changes the time and not the result: with compiled kernels, "bf16"
            products are made exact again, and the reference always computes in the weights' dtype. On a GPU "auto" is
            "fp32", TF32 if PyTorch is allowed to; with "bf16", values are exact, and what is within rounding of a bound
            or of the k-th largest may be missed (kernels/encode_cuda.py says by how much).
        screen: What a step of the optimiser has prepared; None: it is made here.
        max_density: Largest share of entries that may lie above their bounds in the first rows (`Above`).

    Returns:
        The selection of all `n` rows.

    Raises:
        UnweaveError: If shapes, dtypes or devices do not fit, or a pre-activation is NaN or infinite.
        TooDense: If `max_density` is exceeded.
    """
    _check(x, W_enc, b_enc, spec, screen)
    x, W_enc, b_enc = x.detach(), W_enc.detach(), b_enc.detach()
    if isinstance(spec, LargestOfBatch):
        return _largest_of_batch(x, W_enc, b_enc, spec, precision, screen)
    match backend("encode_select", x, W_enc, b_enc):
        case "cpu" if len(x):
            return _screened(x.contiguous(), W_enc, b_enc.contiguous(), spec, precision, screen, max_density)
        case "cuda" if W_enc.shape[1]:
            from unweave.kernels import encode_cuda

            x, b_enc, half = x.contiguous(), b_enc.contiguous(), None if screen is None else screen.images.half
            found = encode_cuda.select(x, W_enc, b_enc, spec, precision == "bf16", half, max_density)
            if (row := encode_cuda.first_not_finite(x, W_enc, b_enc)) is not None:
                raise _not_finite(row)
            return found
    return _reference(x, W_enc, b_enc, spec, max_density)


def _check(x: Tensor, W_enc: Tensor, b_enc: Tensor, spec: Spec, screen: Screen | None) -> None:
    if x.ndim != 2 or W_enc.ndim != 2 or x.shape[1] != W_enc.shape[0] or b_enc.shape != W_enc.shape[1:]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, W_enc, b_enc))
        raise UnweaveError(f"encode_select: x, W_enc and b_enc have shapes that do not fit: {shapes}.")
    if not x.dtype == W_enc.dtype == b_enc.dtype or not x.is_floating_point():
        raise UnweaveError(
            f"encode_select: x is {x.dtype}, W_enc {W_enc.dtype} and b_enc {b_enc.dtype}; they must be alike and real."
        )
    d, m = W_enc.shape
    if screen is not None and not screen.fits(m, d):
        raise UnweaveError(f"encode_select: the screen is of another encoder, not of this one of shape {(d, m)}.")
    match spec:
        case Largest(k) if not 1 <= k <= m:
            raise UnweaveError(f"encode_select: k={k} is not between 1 and the number of latents, {m}.")
        case LargestOfGroups(groups) if groups < 1 or m % groups:
            raise UnweaveError(f"encode_select: {groups} groups do not divide {m} latents.")
        case LargestOfBatch(budget) if budget < 1:
            raise UnweaveError(f"encode_select: a budget of {budget} is not positive.")
        case Above(Tensor() as bounds) if bounds.shape not in ((), (m,)):
            raise UnweaveError(f"encode_select: bounds have the shape {tuple(bounds.shape)}, not ({m},).")
        case Above(Tensor() as bounds) if bounds.device != x.device:
            raise UnweaveError(f"encode_select: x and bounds are on different devices ({x.device}, {bounds.device}).")


def _not_finite(row: int) -> UnweaveError:
    return UnweaveError(f"encode_select: pre-activations of row {row} are NaN or infinite.")


def _reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, spec: Spec, max_density: float) -> Selection:
    buffer = x.new_empty(min(CHUNK_ROWS, len(x)), W_enc.shape[1])
    return select_by_rows(x, lambda rows: torch.addmm(b_enc, rows, W_enc, out=buffer[: len(rows)]), spec, max_density)


def select_by_rows(
    x: Float[Tensor, "n d_in"],
    pre_activations: Callable[[Float[Tensor, "c d_in"]], Float[Tensor, "c d_sae"]],
    spec: Spec,
    max_density: float = 1.0,
) -> Selection:
    """What a selection keeps of pre-activations that are made densely, for some rows at a time.

    Args:
        x: Encoder input.
        pre_activations: Makes those of some rows; they may be overwritten for the next ones.
        spec: What to keep of each row by itself, so not `LargestOfBatch`.
        max_density: As for `encode_select`.

    Raises:
        UnweaveError: If a pre-activation is NaN or infinite.
        TooDense: If `max_density` is exceeded.
    """
    parts: list[Selection] = []
    for rows in x.split(CHUNK_ROWS):
        pre = pre_activations(rows)
        if len(rows) and not pre.sum().isfinite() and not pre.isfinite().all():
            bad = (~pre.isfinite()).any(1).nonzero()[0].item()
            raise _not_finite(CHUNK_ROWS * len(parts) + int(bad))
        match spec:
            case Largest():
                parts.append(select.largest(pre, spec))
            case LargestOfGroups():
                parts.append(select.largest_of_groups(pre, spec))
            case Above(bounds):
                parts.append(select.above(pre, bounds))
        if len(parts) == 1 and len(parts[0].indices) > max_density * pre.numel():
            raise TooDense
    return _joined(parts)


def _joined(parts: list[Selection]) -> Selection:
    if len(parts) == 1:
        return parts[0]
    columns = list(zip(*parts, strict=True))
    parts.clear()  # each column's parts are given back before the next is joined
    return Selection(*(torch.cat(columns.pop(0)) for _ in Selection._fields))


def _largest_of_batch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, spec: LargestOfBatch, precision: Precision, screen: Screen | None
) -> Selection:
    """Everything above a guessed bound, and the largest of it; a guess that was too high is lowered."""
    budget = spec.budget
    bound = spec.hint if spec.hint is not None else _probe(x, W_enc, b_enc, budget)
    while True:
        bound = max(bound, 0.0)
        found = encode_select(x, W_enc, b_enc, Above(bound), precision=precision, screen=screen)
        if len(found.values) >= budget or bound == 0:
            break
        bound = 0.8 * bound if 1e-6 < bound < math.inf else 0.0
    if len(found.values) <= budget:
        return found
    if backend("encode_select", found.values) == "cpu":
        return cpu.largest_of_batch_(found, budget)
    return select.largest_of_batch(found, budget)


def _probe(x: Tensor, W_enc: Tensor, b_enc: Tensor, budget: int) -> float:
    """A guess of the smallest winner, from rows spread over the batch."""
    rows = x[:: max(1, len(x) // _PROBE_ROWS)]
    pre = torch.addmm(b_enc, rows, W_enc).flatten()
    share = min(pre.numel(), max(1, round(1.25 * budget * len(rows) / max(1, len(x)))))
    return pre.topk(share, sorted=False).values.amin().item() if pre.numel() else 0.0


def _screened(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    spec: Spec,
    precision: Precision,
    screen: Screen | None,
    max_density: float,
    guessing: bool = True,
) -> Selection:
    """Selection with the compiled kernels on a CPU; `guessing` is whether floors of `Largest` may be guessed."""
    rows, (n, m) = W_enc.T.contiguous(), (len(x), W_enc.shape[1])
    if screen is None:
        screen = Screen.room_for(rows, precision, LIKE_W_ENC)
        cpu.make_images(rows, screen.images)
    inputs = cpu.make_images(x, Images.room_for(x, screen.kind, "images of inputs", inputs=True))
    if screen.kind == "int8" and too_coarse(inputs):
        screen = Screen("bf16", cpu.make_images(rows, Images.room_for(rows, "bf16", LIKE_W_ENC)))
        inputs = cpu.make_images(x, Images.room_for(x, "bf16", "images of inputs"))
    if not all(t.isfinite().all() for t in (inputs.norms, screen.images.norms, b_enc)):
        return _reference(x, W_enc, b_enc, spec, max_density)  # no bound holds; it says which row is not finite
    screening = Screening(screen, inputs, x, rows, b_enc)
    fused = cpu.picks() and screening.fits_int8()
    group = m // spec.groups if isinstance(spec, LargestOfGroups) else 1
    # `Largest` has the fewest candidates, which take memory, and so has one positive bound for all latents, which is
    # BatchTopK's; what may turn out too dense has the most.
    few = isinstance(spec, Largest) or (isinstance(spec, Above) and isinstance(spec.bounds, float) and spec.bounds > 0)
    parts = 4 if max_density < 1 else 1 if few else 2
    chunk_rows, tile = (-(-FUSED_ROWS // parts), FIRST_TILE) if fused else (CHUNK_ROWS, TILE)
    # Tiles of equal width, of whole groups.
    tiles = -(-m // max(tile, group))
    width = -(-m // (tiles * group)) * group
    buffer = None if fused else scratch("products", (min(chunk_rows, n) * min(width, m),), screening.product_dtype)
    if isinstance(spec, Above):
        bounds = torch.as_tensor(spec.bounds, dtype=torch.float32).expand(m).contiguous()

    # What PyTorch's products leave in `buffer`, or the kernels' own products while they are made.
    def scan(collector: Collector, tile: Tensor, first: int, known: ctypes.Structure, guess: float) -> None:
        match spec:
            case Largest(k, magnitude):
                collector.scan_topk(tile, first, known, k, magnitude, guess)
            case LargestOfGroups():
                collector.scan_groups(tile, first, known, group)
            case Above():
                collector.scan_above(tile, first, known, bounds)

    def check_density(collector: Collector, latents: int) -> None:
        if collector.certain() > max_density * collector.n * latents:
            raise TooDense

    def pick(collector: Collector, early: bool, known: ctypes.Structure, guess: float) -> None:
        match spec:
            case Largest(k, magnitude):
                collector.pick("topk", range(m), x.shape[1], known, k, magnitude, guess)
            case LargestOfGroups():
                collector.pick("groups", range(m), x.shape[1], known, group)
            case Above():
                step = width if early else m
                for first in range(0, m, step):
                    latents = range(first, min(first + step, m))
                    collector.pick("above", latents, x.shape[1], known, bounds, early)
                    if early:
                        check_density(collector, latents.stop)

    def chunk(start: int, guess: float) -> Selection:
        part, known = x[start : start + chunk_rows], screening.struct(start)
        with Collector(len(part)) as collector:
            early = start == 0 and max_density < 1
            if buffer is None:
                pick(collector, early, known, guess)
            else:
                for first in range(0, m, width):
                    products = screening.products(slice(start, start + chunk_rows), slice(first, first + width), buffer)
                    scan(collector, products, first, known, guess)
                    if early:
                        check_density(collector, min(first + width, m))
            if (row := collector.not_finite()) >= 0:
                raise _not_finite(start + row)
            match spec:
                case Largest(k, magnitude):
                    return collector.finish_topk(part, rows, known, k, magnitude, guess < 1)
                case LargestOfGroups(groups):
                    return collector.finish_groups(part, rows, known, groups, group)
            return collector.finish_above(part, rows, known, bounds)

    # A guess that fails costs the row a second product, and the certain way still gives the answer.
    guess = _GUESS if guessing and screening.kind == "int8" else 1.0
    found = _joined([chunk(start, guess) for start in range(0, n, chunk_rows)])
    if isinstance(spec, Largest) and guess < 1 and int(found.indices[:: spec.k].min()) < 0:
        failed = (found.indices[:: spec.k] < 0).nonzero().flatten()
        again = _screened(x[failed], W_enc, b_enc, spec, precision, screen, max_density, guessing=False)
        found.indices.view(n, -1)[failed] = again.indices.view(len(failed), -1)
        found.values.view(n, -1)[failed] = again.values.view(len(failed), -1)
    return found
