"""One pass of Adam over the rows of a matrix, on whichever back-end holds it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.kernels import cpu, reference
from unweave.kernels.dispatch import WIDEST_ON_GPU, backend, check_devices
from unweave.kernels.screen import Precision, Screen, kind_of, low


def adam_rows(
    weight: Float[Tensor, "m d"],
    grad: Float[Tensor, "c d"],
    slot: Int64[Tensor, " m"] | None,
    first: Float[Tensor, "m d"],
    second: Float[Tensor, "m d"],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    grad_scale: float | Float[Tensor, ""] = 1.0,
    unit: bool = False,
    screen: Precision | None = None,
    instead_of: Screen | None = None,
) -> Screen | None:
    """Update a matrix and its moments in place, as `torch.optim.Adam` does (no weight decay).

    Args:
        weight: Rows to update.
        grad: Gradients of some rows.
        slot: Which row of `grad` belongs to each row of `weight`, -1 for none (a gradient of 0). None: `grad` has one
            for each, in order.
        first: First moments, float32 or bfloat16 (rounded stochastically, by `step` and position alone).
        second: Second moments, likewise.
        lr: Learning rate.
        betas: Decay rates.
        eps: Added to the root of the corrected second moment.
        step: Number of this step, from 1.
        grad_scale: Multiplies the gradients. If it is NaN nothing is changed; of a tensor on a GPU nobody waits to
            know whether it is.
        unit: Whether rows are brought back to norm 1 afterwards.
        screen: Return a `Screen` of the new rows, for products of this precision.
        instead_of: The screen of the old rows, whose memory may be overwritten.

    Returns:
        The screen, where one was asked for and a compiled kernel can use it.

    Raises:
        UnweaveError: If shapes or dtypes do not fit.
    """
    _check(weight, grad, slot, first, second, step)
    grad, slot = grad.contiguous(), None if slot is None else slot.contiguous()
    settings = {"lr": lr, "betas": betas, "eps": eps, "step": step, "unit": unit}
    kernels = backend("adam_rows", weight, grad)
    if kernels == "cuda":
        from unweave.kernels.triton.adam import adam_rows as in_triton

        rows = weight, grad, first, second
        if len(weight) == 1 and slot is None and not unit:  # a vector: one program would do all of a row
            rows = tuple(t.view(-1, 1) for t in rows)  # type: ignore[assignment]
        if rows[0].shape[1] <= WIDEST_ON_GPU:
            made = None
            if screen is not None and low(screen, weight.device.type):
                reuse = instead_of is not None and instead_of.fits(*weight.shape)
                made = instead_of if reuse else Screen.of_gpu(weight)
            image = None if made is None else made.images.half
            clip = grad_scale if isinstance(grad_scale, Tensor) else weight.new_full((), grad_scale)
            in_triton(*rows, slot=slot, clip=clip, image=image, **settings)  # type: ignore[arg-type]
            return made
    if kernels == "cpu":
        grad_scale = float(grad_scale)
        if math.isnan(grad_scale):
            return instead_of
        made = None
        if screen is not None:
            reuse = instead_of is not None and instead_of.kind == kind_of(screen, weight.shape[1])
            made = instead_of if reuse and instead_of.fits(*weight.shape) else Screen.room_for(weight, screen)  # type: ignore[union-attr]
        into = None if made is None else made.images
        cpu.adam_rows(weight, grad, slot, first, second, grad_scale=grad_scale, into=into, **settings)  # type: ignore[arg-type]
        return made
    if slot is not None:
        grad = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])[slot]  # -1 takes the row of zeros
    reference.adam_rows(weight, grad, first, second, grad_scale=grad_scale, **settings)  # type: ignore[arg-type]
    return None


def _check(weight: Tensor, grad: Tensor, slot: Tensor | None, first: Tensor, second: Tensor, step: int) -> None:
    updated = {"weight": weight, "first": first, "second": second}
    check_devices("adam_rows", grad, *updated.values(), *([] if slot is None else [slot]))
    if weight.ndim != 2 or not first.shape == second.shape == weight.shape:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in updated.items())
        raise UnweaveError(f"adam_rows: shapes do not fit: {shapes}.")
    wanted = len(weight) if slot is None else len(grad)
    if grad.shape != (wanted, weight.shape[1]) or (slot is not None and slot.shape != weight.shape[:1]):
        raise UnweaveError(f"adam_rows: grad {tuple(grad.shape)} and slot do not fit weight {tuple(weight.shape)}.")
    if not weight.is_floating_point() or grad.dtype != weight.dtype:
        raise UnweaveError(f"adam_rows: weight is {weight.dtype} and grad {grad.dtype}; they must be alike and real.")
    if first.dtype != second.dtype or first.dtype not in (weight.dtype, torch.bfloat16):
        raise UnweaveError(
            f"adam_rows: first is {first.dtype} and second {second.dtype}; both are {weight.dtype}, as weight is, or "
            "both torch.bfloat16."
        )
    for name, tensor in updated.items():
        if not tensor.is_contiguous():
            raise UnweaveError(f"adam_rows: {name} is updated in place and must be contiguous.")
    if slot is not None and slot.dtype != torch.int64:
        raise UnweaveError(f"adam_rows: slot is {slot.dtype}, not torch.int64.")
    look = slot is not None and len(slot) and slot.device.type == "cpu"  # on a GPU, looking would make every call wait
    if slot is not None and look and (int(slot.min()) < -1 or int(slot.max()) >= len(grad)):
        raise UnweaveError(f"adam_rows: slot is out of range: not all are from -1 to {len(grad) - 1}.")
    if step < 1:
        raise UnweaveError(f"adam_rows: step counts from 1, got {step}.")
