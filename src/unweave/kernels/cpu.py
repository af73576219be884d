"""The C++ kernels, called on plain tensors. Arguments come checked: float32, int64, contiguous, indices in range."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave.kernels.library import load, targets
from unweave.kernels.reference import RowErrors, Transposed
from unweave.kernels.screen import Images
from unweave.kernels.select import Selection

_IN_MEMORY = (ctypes.Structure, ctypes.Array)
_LETTERS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "u": ctypes.c_uint64, "f": ctypes.c_float, "d": ctypes.c_double}
_SIGNATURES = {  # p: pointer or None, i: int64, u: uint64, f: float, d: double; after the colon, what is returned
    "gather_sum": "pppipip",
    "sddmm": "ppippip",
    "transpose": "ppiippp",
    "sum_by_latent": "ppipp",
    "scatter_outer": "pipppppiippppipp",
    "sum_rows": "ppiiip",
    "squared_distances": "piip:d",
    "total": "pi:d",
    "keep_largest": "piiii",
    "squared_error_rows": "pppiippppipppp",
    "images": "piip",
    "collector": "i:p",
    "discard": "p",
    "not_finite": "p:i",
    "certain": "p:i",
    "pick_topk": "piiippiif",
    "pick_above": "piiipppi",
    "pick_groups": "piiippi",
    "scan_topk": "ppiiipiif",
    "finish_topk": "pppiipiiipp",
    "scan_above": "ppiiipp",
    "finish_above": "pppiippp",
    "scan_groups": "ppiiipi",
    "finish_groups": "pppipiipp",
    "add_halves": "ppi",
    "dense_codes": "piiipppp:i",
    "dense_back": "ppiiippfppp",
    "largest_of_batch": "pippi",
    "take": "ppp",
    "adam_rows": "piippppiffffffuip",
    "gather_rows": "piippiiipi",
    "attention": "ppppiiiiipfi:i",
    "copy_matrix": "piiiiiipiiii:i",
}


@functools.cache
def _function(name: str, target: str | None = None) -> Any:
    library = load()
    if library is None:
        raise RuntimeError("the C++ kernels are not installed.")
    arguments, _, result = _SIGNATURES[name].partition(":")
    function = getattr(library, f"uw_{name}_{target or targets(library)[0]}")
    function.argtypes = [_LETTERS[letter] for letter in arguments]
    function.restype = _LETTERS[result] if result else None
    return function


_forced: list[str] = []


@contextmanager
def forced_target(target: str) -> Iterator[None]:
    """Use the kernels of one instruction set, which must be among `library.targets`, instead of the best one."""
    _forced.append(target)
    try:
        yield
    finally:
        _forced.pop()


def available() -> bool:
    """Whether the C++ kernels can be used here."""
    return load() is not None


def has(name: str) -> bool:
    """Whether there is a kernel here: some need what the processor has not."""
    library = load()
    return library is not None and hasattr(library, f"uw_{name}_{_forced[-1] if _forced else targets(library)[0]}")


def picks() -> bool:
    """Whether the kernels make int8 products themselves, and pick candidates from them as they are made."""
    return has("pick_topk")


def call(name: str, *arguments: Any) -> Any:
    if any(isinstance(a, Tensor) and a.device.type != "cpu" for a in arguments):
        raise RuntimeError(f"{name}: a tensor is not on the CPU.")  # its pointer would be read as one that is
    converted = [
        a.data_ptr() if isinstance(a, Tensor) else ctypes.addressof(a) if isinstance(a, _IN_MEMORY) else a
        for a in arguments
    ]
    return _function(name, _forced[-1] if _forced else None)(*converted)


def make_images(weight: Float[Tensor, "m d"], into: Images) -> Images:
    """Fill the images of a matrix that there is room for."""
    call("images", weight, *weight.shape, into.struct())
    return into


def gather_sum(indices: Tensor, values: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """See `unweave.kernels.gather_sum`."""
    out = weight.new_empty(len(offsets) - 1, weight.shape[1])
    call("gather_sum", indices, values, offsets, len(out), weight, weight.shape[1], out)
    return out


def sddmm(indices: Tensor, offsets: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """See `unweave.kernels.sddmm`."""
    out = weight.new_empty(len(indices))
    call("sddmm", indices, offsets, len(offsets) - 1, grad, weight, weight.shape[1], out)
    return out


def transpose(indices: Tensor, offsets: Tensor, m: int) -> Transposed:
    """See `unweave.kernels.transpose`."""
    order, rows, ends = torch.empty_like(indices), torch.empty_like(indices), offsets.new_empty(m + 1)
    call("transpose", indices, offsets, len(offsets) - 1, m, order, rows, ends)
    return Transposed(order, rows, ends)


def sum_by_latent(by_latent: Transposed, values: Float[Tensor, " nnz"]) -> Float[Tensor, " m"]:
    """The sum of each latent's values, in the order of its entries."""
    out = values.new_empty(len(by_latent.offsets) - 1)
    call("sum_by_latent", by_latent.order, by_latent.offsets, len(out), values, out)
    return out


def scatter_outer(
    by_latent: Transposed,
    values: Tensor,
    x: Tensor,
    *,
    latents: Tensor | None = None,
    rows_per_x: int = 1,
    start: tuple[Tensor, Tensor] | None = None,
    weight: Tensor | None = None,
    along: Tensor | None = None,
    project: bool = False,
    out: Tensor | None = None,
    squares: Tensor | None = None,
) -> Tensor:
    """`codes.T @ x`, for some latents and with what else a gradient has, in one pass; see csrc/sparse.h.

    Args:
        by_latent: The entries.
        values: Of the entries.
        x: Rows to add up.
        latents: Those of the result's rows; None: all.
        rows_per_x: Rows of codes for each row of `x`.
        start: Rows that are added, and their latents.
        weight: What the next two refer to.
        along: This much of each latent's weight is added.
        project: Whether the part along the latent's weight, of norm 1, is taken out.
        out: Memory for the result.
        squares: Takes the squared norm of each row of the result.
    """
    count = len(by_latent.offsets) - 1 if latents is None else len(latents)
    out = x.new_empty(count, x.shape[1]) if out is None else out
    begin, slot = (None, None) if start is None else (start[0], slots(start[1], len(by_latent.offsets) - 1))
    call(
        "scatter_outer", latents, count, *by_latent, values, x, x.shape[1], rows_per_x, begin, slot,
        weight, along, project, out, squares,
    )  # fmt: skip
    return out


def slots(latents: Int64[Tensor, " c"], m: int) -> Int64[Tensor, " m"]:
    """The place of each of `m` latents among some of them, -1 for those that are not."""
    slot = latents.new_full((m,), -1)
    slot[latents] = torch.arange(len(latents), device=latents.device)
    return slot


def sum_rows(x: Float[Tensor, "n d"], weights: Float[Tensor, " n"] | None = None) -> Float[Tensor, " d"]:
    """The sum of the rows, each times its weight, in one order whatever the number of threads."""
    out = x.new_empty(x.shape[1])
    call("sum_rows", weights, x, len(x), x.shape[1], x.stride(0), out)
    return out


def squared_distances(x: Float[Tensor, "n d"], center: Float[Tensor, " d"] | None) -> Tensor:
    """The sum of the rows' squared distances from a point (None: 0) in float64, likewise."""
    return x.new_tensor(call("squared_distances", x, *x.shape, center), dtype=torch.float64)


def total(values: Tensor) -> Tensor:
    """The sum of all values in float64, in one order whatever the number of threads."""
    return values.new_tensor(call("total", values, values.numel()), dtype=torch.float64)


def keep_largest_(values: Float[Tensor, "n c"], k: int) -> None:
    """Make everything 0, in place, but the k largest positive values of each row (float32 or bfloat16)."""
    call("keep_largest", values, values.dtype == torch.bfloat16, *values.shape, k)


def squared_error_rows(
    indices: Tensor,
    values: Tensor,
    offsets: Tensor,
    scales: Tensor,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    residual: Tensor | None = None,
    grad: Tensor | None = None,
) -> RowErrors:
    """Decode, residual, loss and the gradients of output and codes, row by row; see `unweave.kernels.reference`."""
    n, d, p = len(x), x.shape[1], len(scales)
    errors, code_grad = x.new_empty(n, p), torch.empty_like(values)
    grad = x.new_empty(n * p, d) if grad is None else grad
    call(
        "squared_error_rows",
        indices, values, offsets, n, p, scales, weight, bias, x, d, errors, grad, residual, code_grad,
    )  # fmt: skip
    return RowErrors(errors, grad, code_grad)


def adam_rows(
    weight: Tensor,
    grad: Tensor,
    slot: Tensor | None,
    first: Tensor,
    second: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    grad_scale: float,
    unit: bool,
    into: Images | None,
) -> None:
    """One Adam update of the rows of a matrix; see `unweave.kernels.adam_rows`."""
    beta1, beta2 = betas
    call(
        "adam_rows",
        weight, *weight.shape, grad, slot, first, second, first.dtype == torch.bfloat16,
        lr / (1 - beta1**step), beta1, beta2, eps, (1 - beta2**step) ** -0.5, grad_scale, step, unit,
        None if into is None else into.struct(),
    )  # fmt: skip


def add_halves_(into: Float[Tensor, "*n"], halves: Tensor) -> None:
    """Add bfloat16 numbers, in place."""
    call("add_halves", into, halves, into.numel())


def dense_codes(
    pre: Float[Tensor, "n m"], theta: Float[Tensor, " m"], codes: Tensor, active: Tensor, sums: Tensor
) -> bool:
    """Codes of dense pre-activations (float32 or bfloat16), their column sums, and whether all of them are finite."""
    return bool(call("dense_codes", pre, pre.dtype == torch.bfloat16, *pre.shape, theta, codes, active, sums))


def dense_back(
    back: Float[Tensor, "n m"],
    pre: Float[Tensor, "n m"],
    theta: Tensor,
    add: Tensor,
    half_width: float,
    bias: Tensor,
    windows: Tensor,
    towards: Tensor,
) -> None:
    """From the gradient of codes to that of pre-activations, in place, and its column sums; see csrc/dense.h."""
    low = back.dtype == torch.bfloat16
    call("dense_back", back, pre, low, *pre.shape, theta, add, half_width, bias, windows, towards)


def largest_of_batch_(candidates: Selection, budget: int) -> Selection:
    """See `unweave.kernels.select.largest_of_batch`; the candidates, which are more than `budget`, are overwritten."""
    call("largest_of_batch", candidates.counts, len(candidates.counts), candidates.indices, candidates.values, budget)
    kept = candidates._replace(indices=candidates.indices[:budget], values=candidates.values[:budget])
    # A few candidates too many may stay behind the selection's; many are not to be held by it.
    return kept if len(candidates.values) < 1.25 * budget else Selection(*(column.clone() for column in kept))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor | None:
    """See `unweave.kernels.attention`; None where there is no such kernel."""
    if not has("attention"):
        return None
    b, h, n, d = q.shape
    out = q.new_empty(b, n, h, d)
    strides = (ctypes.c_int64 * 9)(*(step for x in (q, k, v) for step in x.stride()[:3]))
    status = call("attention", q, k, v, out, b, h, h // k.shape[1], n, d, strides, scale, causal)
    if status == 2:
        raise MemoryError(f"there is no memory for what attention over rows of {n} positions works with.")
    return None if status else out
