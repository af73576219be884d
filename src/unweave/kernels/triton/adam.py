"""Adam, one pass over the rows of a matrix: everything that a step does to a row happens while it is in registers.

With unit-norm rows the pass removes the part of the gradient that would only change the norm, and renormalises after
the update. It writes the bfloat16 image of the new row for the next product, and its squared norm.

Moments may be bfloat16. A moment that decays by a thousandth at a time would then never move if it were rounded to the
nearest, so it is rounded up or down with the probabilities that make the mean right. The random bits are a hash of
seed, step and element (splitmix64), so they do not depend on how the work is cut.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from unweave.kernels.triton.launch import FLOAT_OR_BF16, Arguments, launch

MAX_WIDTH = 32768


@triton.jit
def _to_bf16(x, noise):
    """The upper half of a float32's bits after adding `noise` to the lower; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == x, bits, 0x7FC00000)
    return ((bits + noise) >> 16).to(tl.int16)


@triton.jit
def _to_nearest_bf16(x):
    bits = x.to(tl.int32, bitcast=True)
    return _to_bf16(x, 0x7FFF + ((bits >> 16) & 1))  # ties to even


@triton.jit
def _random(key, element):
    """32 random bits."""
    z = key.to(tl.uint64) * 0x9E3779B97F4A7C15 + element.to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return ((z ^ (z >> 31)) >> 32).to(tl.uint32)


@triton.jit(do_not_specialize=["m", "key"])
def _adam_rows(
    weight, grad, first, second, clip, image, squares, m, d, step_size, beta1, beta2, rest1, rest2, eps, correction,
    key,
    CLIP: tl.constexpr, PROJECT: tl.constexpr, UNIT: tl.constexpr, BF16_MOMENTS: tl.constexpr, IMAGE: tl.constexpr,
    SQUARES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < m)[:, None] & (column < d)[None, :]
    element = row[:, None] * d + column[None, :]

    w = tl.load(weight + element, mask, 0.0)
    g = tl.load(grad + element, mask, 0.0)
    if CLIP:
        g *= tl.load(clip)
    if PROJECT:
        norm = tl.sum(w * w, 1)
        along = tl.sum(g * w, 1) / tl.where(norm > 0, norm, 1.0)
        g -= along[:, None] * w

    u = beta1 * tl.load(first + element, mask, 0.0).to(tl.float32) + rest1 * g
    v = beta2 * tl.load(second + element, mask, 0.0).to(tl.float32) + rest2 * g * g
    if BF16_MOMENTS:
        noise = _random(key, element)
        u_bits, v_bits = _to_bf16(u, (noise & 0xFFFF).to(tl.int32)), _to_bf16(v, (noise >> 16).to(tl.int32))
        tl.store(first + element, u_bits.to(tl.bfloat16, bitcast=True), mask)
        tl.store(second + element, v_bits.to(tl.bfloat16, bitcast=True), mask)
    else:
        tl.store(first + element, u, mask)
        tl.store(second + element, v, mask)

    w -= step_size * tl.div_rn(u, tl.sqrt_rn(v) * correction + eps)
    w = tl.where(mask, w, 0.0)
    if UNIT:
        norm = tl.sqrt_rn(tl.sum(w * w, 1))
        w = w / tl.where(norm > 0, norm, 1.0)[:, None]
    tl.store(weight + element, w, mask)
    if IMAGE:
        tl.store(image + element, _to_nearest_bf16(w).to(tl.bfloat16, bitcast=True), mask)
    if SQUARES:
        tl.store(squares + row, tl.sum(w * w, 1), row < m)


def _mixed(seed: int, step: int) -> int:
    """A 63-bit key of which neighbouring seeds and steps share nothing."""
    key = 0
    for word in (seed, step):
        key = (key + word + 1) * 0x9E3779B97F4A7C15 % 2**64
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        key ^= key >> 31
    return key >> 1


def adam_rows(
    weight: Float[Tensor, "m d"],
    grad: Float[Tensor, "m d"],
    first: Float[Tensor, "m d"],
    second: Float[Tensor, "m d"],
    *,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    clip: Float[Tensor, ""] | None = None,
    project: bool = False,
    unit: bool = False,
    seed: int = 0,
    image: Float[Tensor, "m d"] | None = None,
    squares: Float[Tensor, " m"] | None = None,
) -> None:
    """One step of Adam (Kingma and Ba, arXiv 1412.6980) in place, with the formula of `torch.optim.Adam`.

    Args:
        weight: float32, updated.
        grad: float32; not changed.
        first: First moments, float32 or bfloat16, updated.
        second: Second moments, in the dtype of the first ones, updated.
        lr: Learning rate.
        step: Number of this step; the first is 1.
        betas: Decay of the two moments.
        eps: Added to the square root of the corrected second moment.
        clip: Factor of the gradient, on the device, so that clipping by the norm waits for nothing.
        project: Whether the part of each row's gradient along the row is removed. Rows of zeros have no direction.
        unit: Whether each row is brought back to norm 1 after the update. Rows of zeros are left alone.
        seed: Of the rounding of bfloat16 moments; each matrix should have its own.
        image: bfloat16; receives the new weight.
        squares: float32; receives each new row's squared norm.
    """
    args = Arguments("adam_rows")
    args.take("weight", weight, "m d", torch.float32, in_place=True)
    grad = args.take("grad", grad, "m d", torch.float32)
    args.take("first", first, "m d", *FLOAT_OR_BF16, in_place=True)
    args.take("second", second, "m d", first.dtype, in_place=True)
    if clip is not None:
        args.take("clip", clip, "", torch.float32)
    if image is not None:
        args.take("image", image, "m d", torch.bfloat16, in_place=True)
    if squares is not None:
        args.take("squares", squares, "m", torch.float32, in_place=True)
    m, d = weight.shape
    args.require(d <= MAX_WIDTH, f"weight has rows of {d} elements; at most {MAX_WIDTH} fit.")
    args.require(step >= 1, f"step counts from 1, got {step}.")

    args.require(all(0 <= beta < 1 for beta in betas), f"betas must lie between 0 and 1, got {betas}.")
    beta1, beta2 = betas
    block = max(16, triton.next_power_of_2(d))
    rows = max(1, 1024 // block)
    launch(
        _adam_rows, (triton.cdiv(m, rows),), weight, grad, first, second,
        weight if clip is None else clip, weight if image is None else image, weight if squares is None else squares,
        m, d, lr / (1 - beta1**step), beta1, beta2, 1 - beta1, 1 - beta2, eps, 1 / math.sqrt(1 - beta2**step),
        _mixed(seed, step),
        CLIP=clip is not None, PROJECT=project, UNIT=unit, BF16_MOMENTS=first.dtype == torch.bfloat16,
        IMAGE=image is not None, SQUARES=squares is not None, ROWS=rows, BLOCK=block,
        warps=min(32, max(4, block // 512)),
    )  # fmt: skip
