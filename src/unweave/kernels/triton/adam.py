"""Adam, one pass over the rows of a matrix: everything that a step does to a row happens while it is in registers.

With unit-norm rows the pass renormalises after the update. It writes the bfloat16 image of the new row for the next
product.

Moments may be bfloat16. A moment that decays by a thousandth at a time would then never move if it were rounded to the
nearest, so it is rounded up or down with the probabilities that make the mean right. The random bits are a hash of
step and element (splitmix64), the same on every back-end, so they do not depend on how the work is cut.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from unweave.kernels.dispatch import WIDEST_ON_GPU
from unweave.kernels.triton.launch import FLOAT_OR_BF16, Arguments, launch


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
def _random(step, element):
    """32 random bits."""
    z = step.to(tl.uint64) * 0x9E3779B97F4A7C15 + element.to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return ((z ^ (z >> 31)) >> 32).to(tl.uint32)


@triton.jit(do_not_specialize=["c", "m", "step"])
def _adam_rows(
    weight, grad, slot, first, second, clip, image, c, m, d, step_size, beta1, beta2, rest1, rest2, eps, correction,
    step,
    SLOT: tl.constexpr, CLIP: tl.constexpr, UNIT: tl.constexpr, BF16_MOMENTS: tl.constexpr, IMAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    if CLIP:
        factor = tl.load(clip)
        m = tl.where(factor == factor, m, 0)  # with NaN no row is read, and none written
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < m)[:, None] & (column < d)[None, :]
    element = row[:, None] * d + column[None, :]

    w = tl.load(weight + element, mask, 0.0)
    if SLOT:
        source = tl.load(slot + row, row < m, -1)
        exists = (source >= 0) & (source < c)
        g = tl.load(grad + source[:, None] * d + column[None, :], mask & exists[:, None], 0.0)
    else:
        g = tl.load(grad + element, mask, 0.0)
    if CLIP:
        g *= factor

    u = beta1 * tl.load(first + element, mask, 0.0).to(tl.float32) + rest1 * g
    v = beta2 * tl.load(second + element, mask, 0.0).to(tl.float32) + rest2 * g * g
    if BF16_MOMENTS:
        noise = _random(step, element)
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


def whole_rows(args: Arguments, name: str, d: int) -> dict[str, int]:
    """How many rows of width d one program takes, and with what, where it takes no row in part."""
    args.require(d <= WIDEST_ON_GPU, f"{name} has rows of {d} elements; at most {WIDEST_ON_GPU} fit.")
    block = max(16, triton.next_power_of_2(d))
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "warps": min(32, max(4, block // 512))}


def adam_rows(
    weight: Float[Tensor, "m d"],
    grad: Float[Tensor, "c d"],
    first: Float[Tensor, "m d"],
    second: Float[Tensor, "m d"],
    *,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    slot: Int64[Tensor, " m"] | None = None,
    clip: Float[Tensor, ""] | None = None,
    unit: bool = False,
    image: Float[Tensor, "m d"] | None = None,
) -> None:
    """One step of Adam (Kingma and Ba, arXiv 1412.6980) in place, with the formula of `torch.optim.Adam`.

    Args:
        weight: float32, updated.
        grad: Gradients of some rows, float32; not changed.
        first: First moments, float32 or bfloat16 (rounded stochastically, by `step` and position alone), updated.
        second: Second moments, in the dtype of the first ones, updated.
        lr: Learning rate.
        step: Number of this step; the first is 1.
        betas: Decay of the two moments.
        eps: Added to the square root of the corrected second moment.
        slot: Which row of `grad` belongs to each row of `weight`; one that does not exist, such as -1, stands for a
            gradient of 0. None: `grad` has one for each, in order.
        clip: Factor of the gradient, on the device, so that clipping by the norm waits for nothing. NaN leaves weight,
            moments and image exactly as they are: whoever makes NaN of a norm that is not finite skips such a step
            without having to know of it.
        unit: Whether each row is brought back to norm 1 after the update. Rows of zeros are left alone.
        image: bfloat16; receives the new weight.
    """
    args = Arguments("adam_rows")
    args.take("weight", weight, "m d", torch.float32, in_place=True)
    grad = args.take("grad", grad, "m d" if slot is None else "c d", torch.float32)
    args.take("first", first, "m d", *FLOAT_OR_BF16, in_place=True)
    args.take("second", second, "m d", first.dtype, in_place=True)
    if slot is not None:
        slot = args.take("slot", slot, "m", torch.int64)
    if clip is not None:
        args.take("clip", clip, "", torch.float32)
    if image is not None:
        args.take("image", image, "m d", torch.bfloat16, in_place=True)
    m, d = weight.shape
    cut = whole_rows(args, "weight", d)
    args.require(step >= 1, f"step counts from 1, got {step}.")
    args.require(all(0 <= beta < 1 for beta in betas), f"betas must lie between 0 and 1, got {betas}.")

    beta1, beta2 = betas
    launch(
        _adam_rows, (triton.cdiv(m, cut["ROWS"]),), weight, grad, weight if slot is None else slot, first, second,
        weight if clip is None else clip, weight if image is None else image, len(grad), m, d,
        lr / (1 - beta1**step), beta1, beta2, 1 - beta1, 1 - beta2, eps, 1 / math.sqrt(1 - beta2**step), step,
        SLOT=slot is not None, CLIP=clip is not None, UNIT=unit, BF16_MOMENTS=first.dtype == torch.bfloat16,
        IMAGE=image is not None, **cut,
    )  # fmt: skip
