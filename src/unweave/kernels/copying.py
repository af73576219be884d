"""Vectors and matrices, out of memory or files, copied into fresh memory and checked: in PyTorch and in C++.

What takes longest is the first touch of fresh memory, which threads do side by side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from unweave.kernels import cpu, dispatch

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_PIECE = 30_720  # elements: they stay in the cache of a core, and PyTorch works on fewer than 32 768 in one thread
_RUN = 32  # pieces or blocks that a thread does in a row
_BLOCK = (240, 120)  # rows and columns of a matrix that are transposed at a time, which are as few


class Mapped(NamedTuple):
    """That a tensor lies in a mapped file."""

    file: int
    """Its open descriptor."""
    offset: int
    """Bytes before the tensor's first value."""
    forget: Callable[[Tensor], None]
    """Gives the pages back that a part of the tensor lies in."""


def copy_checked(source: Tensor, target: Tensor, mapped: Mapped | None = None, *, factor: float = 1.0) -> bool:
    """Fill a tensor with another, or its product with a factor, and say whether all of it is finite.

    Args:
        source: What is copied.
        target: What is filled, of the same shape; contiguous, or columns of a wider matrix.
        mapped: If the source is a file's, where it lies there. It is read from there rather than through the mapping,
            where the compiled kernels know the types and there is no factor; else its pages are given back.
        factor: What the source is multiplied with, in its own type.

    Raises:
        OSError: The file ends before the tensor does, or cannot be read.
        MemoryError: There is none for a block of the matrix.
    """
    if source.numel() == 0:
        return True
    if source.ndim > 2 and not source.is_contiguous():
        source, mapped = source.contiguous(), None  # rare, and through the mapping
    if source.ndim < 2 or (source.is_contiguous() and target.is_contiguous()):
        source, target = source.reshape(1, -1), target.view(1, -1)
    turned = source.stride(1) != 1 and source.stride(0) == 1
    if factor == 1 and _is_compiled(source, target):
        return _compiled(source.T if turned else source, target, mapped, turned)
    forget = mapped.forget if mapped else _nothing
    if factor == 1 and turned:
        return _transpose(source.T, target, forget)
    return _copy(source, target, factor, forget)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a contiguous tensor are; in pieces, because the obvious way makes a copy."""
    return all(_is_finite(piece) for piece in tensor.view(-1).split(_PIECE))


def _is_compiled(source: Tensor, target: Tensor) -> bool:
    """Whether the compiled kernel knows the types and strides of two matrices, and is there."""
    known = source.dtype in _KINDS and 1 in source.stride() and target.stride(1) == 1
    widened = source.itemsize == 2 and target.dtype == torch.float32
    here = source.device.type == target.device.type == "cpu" and dispatch.forced() in (None, "cpu")
    return known and (source.dtype == target.dtype or widened) and here and cpu.available()


def _compiled(matrix: Tensor, target: Tensor, mapped: Mapped | None, turned: bool) -> bool:
    """Fill the target with a matrix, or its transpose."""
    read = hasattr(os, "pread")  # Windows has none, and reads through the mapping
    memory, file, offset = (None, mapped.file, mapped.offset) if mapped and read else (matrix, 0, 0)
    wide, kind, row = matrix.dtype != target.dtype, _KINDS[matrix.dtype], matrix.stride(0) * matrix.itemsize
    threads = torch.get_num_threads()
    found: int = cpu.call(
        "copy_matrix", memory, file, offset, *matrix.shape, row, kind, target, target.stride(0), wide, turned, threads
    )
    if found == 2:
        raise OSError("it ends before its tensors do, or the disk fails")
    if found == 3:
        raise MemoryError("there is no memory for a block of a matrix.")
    return found == 0


def _nothing(part: Tensor) -> None:
    pass


def _copy(source: Tensor, target: Tensor, factor: float, forget: Callable[[Tensor], None]) -> bool:
    """The same in PyTorch, some rows at a time."""
    rows = max(1, _PIECE // source.shape[1])

    def work(job: tuple[Tensor, Tensor]) -> bool:
        finite = True
        for sources, targets in zip(*(part.split(rows) for part in job), strict=True):
            for piece, place in zip(sources.split(_PIECE, -1), targets.split(_PIECE, -1), strict=True):
                place.copy_(piece if factor == 1 else piece * factor)
                finite = finite and _is_finite(place)  # while it is in cache
        forget(job[0])
        return finite

    axis, run = (1, _RUN * _PIECE) if len(source) == 1 else (0, _RUN * rows)
    return _all(work, list(zip(source.split(run, axis), target.split(run, axis), strict=True)))


def _transpose(matrix: Tensor, target: Tensor, forget: Callable[[Tensor], None]) -> bool:
    """Fill the target with the transpose of a matrix, block by block, in PyTorch.

    It transposes fast only from contiguous to contiguous memory. So a block is copied out of the matrix, transposed in
    cache, and copied to its place. All threads work on the same rows, which are given back after them.
    """

    def work(job: tuple[Tensor, Tensor]) -> bool:
        finite = True
        for source, place in zip(job[0].split(_BLOCK[1], 1), job[1].split(_BLOCK[1]), strict=True):
            block = source.to(target.dtype).contiguous()
            finite = finite and _is_finite(block)
            place.copy_(block.T.contiguous())
        return finite

    finite, run = True, _RUN * _BLOCK[1]
    for rows, columns in zip(matrix.split(_BLOCK[0]), target.split(_BLOCK[0], 1), strict=True):
        finite = _all(work, list(zip(rows.split(run, 1), columns.split(run), strict=True))) and finite
        forget(rows)
    return finite


def _all(work: Callable[[tuple[Tensor, Tensor]], bool], jobs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether all pieces of work are true, done by as many threads as PyTorch has.

    Each thread goes through pieces that are too small for PyTorch to share out.
    """
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad  # threads start without

    def done(job: tuple[Tensor, Tensor]) -> bool:
        with mode():
            return work(job)

    threads = min(torch.get_num_threads(), len(jobs))
    if threads < 2:
        return all(list(map(done, jobs)))
    with ThreadPoolExecutor(threads) as pool:
        return all(list(pool.map(done, jobs)))


def _is_finite(piece: Tensor) -> bool:
    if piece.is_meta:
        return True
    return bool(piece.sum().isfinite()) or bool(piece.isfinite().all())  # a sum may overflow, which is fine
