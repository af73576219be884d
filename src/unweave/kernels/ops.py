"""The sparse products as PyTorch operators: checked, sent to a back-end, and differentiable by one another.

Registered with `torch.library`, so that autograd, autocast, `torch.compile` and meta tensors know them. The gradients
of the three are the three again, so they can be differentiated any number of times.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.kernels import cpu, reference
from unweave.kernels.dispatch import backend, check_devices
from unweave.kernels.reference import Transposed


def gather_sum(
    indices: Int64[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    offsets: Int64[Tensor, " n+1"],
    weight: Float[Tensor, "m d"],
) -> Float[Tensor, "n d"]:
    """`codes @ weight`: row i is the sum of `values[e] * weight[indices[e]]` over its entries e.

    Raises:
        UnweaveError: If an index is out of range, or shapes, dtypes or devices do not fit.
    """
    return _gather_sum(indices, values, offsets, weight)


def sddmm(
    indices: Int64[Tensor, " nnz"],
    offsets: Int64[Tensor, " n+1"],
    grad: Float[Tensor, "n d"],
    weight: Float[Tensor, "m d"],
) -> Float[Tensor, " nnz"]:
    """`(grad @ weight.T)` at the entries only: the dot products `grad[row of e] · weight[indices[e]]`.

    Raises:
        UnweaveError: If an index is out of range, or shapes, dtypes or devices do not fit.
    """
    return _sddmm(indices, offsets, grad, weight)


def scatter_outer(
    indices: Int64[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    offsets: Int64[Tensor, " n+1"],
    x: Float[Tensor, "n d"],
    m: int,
) -> Float[Tensor, "m d"]:
    """`codes.T @ x`: row j is the sum of `values[e] * x[row of e]` over the entries e of latent j, in the rows' order.

    Raises:
        UnweaveError: If an index is out of range, or shapes, dtypes or devices do not fit.
    """
    return _scatter_outer(indices, values, offsets, x, m)


def transpose(indices: Int64[Tensor, " nnz"], offsets: Int64[Tensor, " n+1"], m: int) -> Transposed:
    """The entries latent by latent, and within a latent row by row."""
    _check("transpose", indices, offsets, m=m)
    indices, offsets = indices.contiguous(), offsets.contiguous()
    if backend("transpose", indices, offsets) == "cpu":
        return cpu.transpose(indices, offsets, m)
    return reference.transpose(indices, offsets, m)


def _check(op: str, indices: Tensor, offsets: Tensor, *, m: int, n: int | None = None, **floats: Tensor) -> None:
    for name, tensor in (("indices", indices), ("offsets", offsets)):
        if tensor.dtype != torch.int64 or tensor.ndim != 1:
            raise UnweaveError(f"{op}: {name} must be int64 of one dimension, not {tensor.dtype} of {tensor.ndim}.")
    values = floats.get("values")
    if values is not None and values.shape != indices.shape:
        raise UnweaveError(f"{op}: there are {len(indices)} indices and values of shape {tuple(values.shape)}.")
    if len(offsets) < 1 or (n is not None and len(offsets) != n + 1):
        needed = "at least 1" if n is None else n + 1
        raise UnweaveError(f"{op}: offsets has {len(offsets)} elements, and {needed} are needed.")
    if m < 0:
        raise UnweaveError(f"{op}: m={m} is no number of latents.")
    kinds = {name: t.dtype for name, t in floats.items()}
    if len(set(kinds.values())) > 1 or not all(kind.is_floating_point for kind in kinds.values()):
        listed = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise UnweaveError(f"{op}: dtypes must be alike and real, and {listed}.")
    check_devices(op, indices, offsets, *floats.values())
    if indices.device.type == "cpu":  # on a GPU, looking would make every call wait
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= m):
            raise UnweaveError(f"{op}: indices are out of range: not all are from 0 to {m - 1}.")
        ends = int(offsets[0]), int(offsets[-1])
        if ends != (0, len(indices)) or (len(offsets) > 1 and int(offsets.diff().min()) < 0):
            raise UnweaveError(f"{op}: offsets must rise from 0 to the number of indices, {len(indices)}.")


def _check_matrix(op: str, name: str, matrix: Tensor, width: int | None = None) -> None:
    if matrix.ndim != 2 or (width is not None and matrix.shape[1] != width):
        wanted = "2 dimensions" if width is None else f"(., {width})"
        raise UnweaveError(f"{op}: {name} has the shape {tuple(matrix.shape)}, and {wanted} was expected.")


@torch.library.custom_op("unweave::gather_sum", mutates_args=())
def _gather_sum(indices: Tensor, values: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    _check_matrix("gather_sum", "weight", weight)
    _check("gather_sum", indices, offsets, m=len(weight), values=values, weight=weight)
    indices, values, offsets, weight = (t.contiguous() for t in (indices, values, offsets, weight))
    match backend("gather_sum", values, weight):
        case "cpu":
            return cpu.gather_sum(indices, values, offsets, weight)
        case "cuda":
            from unweave.kernels import triton

            return triton.gather_sum(indices, values, offsets, weight)
    return reference.gather_sum(indices, values, offsets, weight)


@torch.library.custom_op("unweave::sddmm", mutates_args=())
def _sddmm(indices: Tensor, offsets: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    _check_matrix("sddmm", "weight", weight)
    _check_matrix("sddmm", "grad", grad, weight.shape[1])
    _check("sddmm", indices, offsets, m=len(weight), n=len(grad), grad=grad, weight=weight)
    indices, offsets, grad, weight = (t.contiguous() for t in (indices, offsets, grad, weight))
    match backend("sddmm", grad, weight):
        case "cpu":
            return cpu.sddmm(indices, offsets, grad, weight)
        case "cuda":
            from unweave.kernels import triton

            return triton.sddmm(indices, offsets, grad, weight)
    return reference.sddmm(indices, offsets, grad, weight)


@torch.library.custom_op("unweave::scatter_outer", mutates_args=())
def _scatter_outer(indices: Tensor, values: Tensor, offsets: Tensor, x: Tensor, m: int) -> Tensor:
    _check_matrix("scatter_outer", "x", x)
    _check("scatter_outer", indices, offsets, m=m, n=len(x), values=values, x=x)
    indices, values, offsets, x = (t.contiguous() for t in (indices, values, offsets, x))
    match backend("scatter_outer", values, x):
        case "cpu":
            return cpu.scatter_outer(cpu.transpose(indices, offsets, m), values, x)
        case "cuda":
            from unweave.kernels import triton

            return triton.scatter_outer(indices, values, offsets, x, m)
    return reference.scatter_outer(reference.transpose(indices, offsets, m), values, x)


@_gather_sum.register_fake
def _(indices: Tensor, values: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    check_devices("gather_sum", indices, values, offsets, weight)  # one meta tensor brings the others here
    return weight.new_empty(offsets.shape[0] - 1, weight.shape[1])


@_sddmm.register_fake
def _(indices: Tensor, offsets: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    check_devices("sddmm", indices, offsets, grad, weight)
    return weight.new_empty(indices.shape[0])


@_scatter_outer.register_fake
def _(indices: Tensor, values: Tensor, offsets: Tensor, x: Tensor, m: int) -> Tensor:
    check_devices("scatter_outer", indices, values, offsets, x)
    return x.new_empty(m, x.shape[1])


def _gather_sum_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    indices, values, offsets, weight = ctx.saved_tensors
    _, needs_values, _, needs_weight = ctx.needs_input_grad
    return (
        None,
        _sddmm(indices, offsets, grad, weight) if needs_values else None,
        None,
        _scatter_outer(indices, values, offsets, grad, len(weight)) if needs_weight else None,
    )


def _sddmm_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    indices, offsets, rows, weight = ctx.saved_tensors
    _, _, needs_rows, needs_weight = ctx.needs_input_grad
    return (
        None,
        None,
        _gather_sum(indices, grad, offsets, weight) if needs_rows else None,
        _scatter_outer(indices, grad, offsets, rows, len(weight)) if needs_weight else None,
    )


def _scatter_outer_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    indices, values, offsets, x = ctx.saved_tensors
    _, needs_values, _, needs_x, _ = ctx.needs_input_grad
    return (
        None,
        _sddmm(indices, offsets, x, grad) if needs_values else None,
        None,
        _gather_sum(indices, values, offsets, grad) if needs_x else None,
        None,
    )


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*(i for i in inputs if isinstance(i, Tensor)))


_gather_sum.register_autograd(_gather_sum_backward, setup_context=_save)
_sddmm.register_autograd(_sddmm_backward, setup_context=_save)
_scatter_outer.register_autograd(_scatter_outer_backward, setup_context=_save)
for _op in (_gather_sum, _sddmm, _scatter_outer):
    for _device in ("cpu", "cuda"):
        _op.register_autocast(_device, torch.float32)  # sums of many products, and masters are fp32
