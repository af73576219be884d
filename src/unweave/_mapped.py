"""Tensors in files, looked at without being read, and then copied piece by piece into memory of their own.

A mapped tensor must not outlive the reading: who writes the file anew changes it, or ends the process. `own` copies it
and gives the file's pages back as it goes, so that a file of 2 GB takes 2 GB and not 4.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from unweave._errors import UnweaveError

DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types of a safetensors file, in the order in which it holds its tensors."""
_PIECE = 30_720  # elements: they stay in the cache of a core, and PyTorch works on fewer than 32 768 in one thread
_RUN = 32  # pieces or blocks that a thread does in a row
_WRITTEN_BYTES = 2 << 20  # that are copied at a time on their way to a file
_BLOCK = (240, 120)  # rows and columns of a matrix that are transposed at a time, which are as few


class Mapping(mmap.mmap):
    """A file in memory; what is written to it stays there."""

    address: int


_MAPPINGS: WeakValueDictionary[int, Mapping] = WeakValueDictionary()
"""By the address of each tensor's storage."""


def map_file(path: Path) -> Mapping:
    """A file, mapped."""
    with path.open("rb") as file:
        mapping = Mapping(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapping.address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
    return mapping


def tensor_in(mapping: Mapping, dtype: torch.dtype, shape: Sequence[int], offset: int) -> Tensor:
    """A tensor that lies in a mapped file, in row-major order."""
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    found = torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset).view(tuple(shape))
    _MAPPINGS[found.untyped_storage().data_ptr()] = mapping
    return found


def map_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped and not read: what is never looked at costs nothing.

    Raises:
        UnweaveError: If the file is damaged, or holds a type that PyTorch does not have.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with safe_open(path, "pt"):  # checks the header and the file's length
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise UnweaveError(f"{str(path)!r} is damaged: {error}.") from error
    header.pop("__metadata__", None)
    mapping, tensors = map_file(path), {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UnweaveError(f"{name} in {str(path)!r} is stored as {entry['dtype']}, which is not read.")
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = tensor_in(mapping, DTYPES[entry["dtype"]], entry["shape"], start)
    return tensors


def is_own(tensor: Tensor) -> bool:
    """Whether a tensor is all of its memory, in order, and that is no file's."""
    storage = tensor.untyped_storage()
    return tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in _MAPPINGS


def own(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """A contiguous copy, and whether all of it is finite; a mapped tensor's pages are given back as they are copied."""
    made = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    if tensor.ndim == 2 and not tensor.is_contiguous():
        return made, fill(made, tensor)
    return made, _copy(tensor.reshape(-1), made.view(-1), _PIECE)


def fill(made: Tensor, matrix: Tensor, factor: float = 1.0) -> bool:
    """Copy a matrix, or the product with a factor, as `own` does, into (columns of) another; whether all is finite."""
    if matrix.stride(1) != 1 and matrix.stride(0) == 1 and factor == 1:
        return _transpose(matrix.T, made)
    return _copy(matrix, made, max(1, _PIECE // max(1, matrix.shape[1])), factor)


def _copy(source: Tensor, target: Tensor, rows: int, factor: float = 1.0) -> bool:
    """Copy a vector or a matrix, so many rows at a time, and say whether all of it is finite."""

    def work(job: tuple[Tensor, Tensor]) -> bool:
        finite = True
        for sources, targets in zip(*(part.split(rows) for part in job), strict=True):
            for piece, place in zip(sources.split(_PIECE, -1), targets.split(_PIECE, -1), strict=True):
                place.copy_(piece if factor == 1 else piece * factor)
                finite = finite and _is_finite(place)  # while it is in cache
        _forget(job[0])
        return finite

    return _all(work, list(zip(source.split(_RUN * rows), target.split(_RUN * rows), strict=True)))


def blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order: all at once where they lie so in memory, else a few rows at a time."""
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous() and tensor.device.type == "cpu":
        yield _bytes(tensor)
        return
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    for part in rows.split(max(1, _WRITTEN_BYTES * len(rows) // tensor.nbytes)):
        if part.ndim == 2 and part.stride(0) == 1:  # PyTorch transposes fast from contiguous to contiguous memory
            part = part.T.contiguous().T
        yield _bytes(part.contiguous().cpu())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _transpose(matrix: Tensor, made: Tensor) -> bool:
    """Fill `made` with the transpose of a matrix, block by block, and say whether all of it is finite.

    PyTorch transposes fast only from contiguous to contiguous memory. So a block is copied out of the matrix,
    transposed in cache, and copied to its place. All threads work on the same rows, which are given back after them.
    """

    def work(job: tuple[Tensor, Tensor]) -> bool:
        finite = True
        for source, target in zip(job[0].split(_BLOCK[1], 1), job[1].split(_BLOCK[1]), strict=True):
            block = source.to(made.dtype).contiguous()
            finite = finite and _is_finite(block)
            target.copy_(block.T.contiguous())
        return finite

    finite, run = True, _RUN * _BLOCK[1]
    for rows, columns in zip(matrix.split(_BLOCK[0]), made.split(_BLOCK[0], 1), strict=True):
        finite = _all(work, list(zip(rows.split(run, 1), columns.split(run), strict=True))) and finite
        _forget(rows)
    return finite


def _all(work: Callable[[tuple[Tensor, Tensor]], bool], jobs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether all pieces of work are true, done by as many threads as PyTorch has.

    Each thread goes through pieces that are too small for PyTorch to share out: what takes longest is the first touch
    of fresh memory, which threads do side by side where nothing makes them wait for each other.
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


def _forget(tensor: Tensor) -> None:
    """Give the pages back that lie wholly in or between a mapped tensor's rows; they can be read again."""
    mapping = _MAPPINGS.get(tensor.untyped_storage().data_ptr())
    if mapping is None or tensor.numel() == 0 or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = tensor.data_ptr() - mapping.address
    length = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first, last = -(-start // mmap.PAGESIZE), (start + length * tensor.itemsize) // mmap.PAGESIZE
    if last > first:
        mapping.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a contiguous tensor are; in pieces, because the obvious way makes a copy."""
    return all(_is_finite(piece) for piece in tensor.view(-1).split(_PIECE))


def _is_finite(piece: Tensor) -> bool:
    if piece.is_meta:
        return True
    return bool(piece.sum().isfinite()) or bool(piece.isfinite().all())  # a sum may overflow, which is fine
