"""Tensors in files, looked at without being read, and then copied piece by piece into memory of their own.

A mapped tensor must not outlive the reading: who writes the file anew changes it, or ends the process. `own` copies it
and gives the file's pages back as it goes, so that a file of 2 GB takes 2 GB and not 4.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from unweave._errors import UnweaveError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_PIECE = 1 << 18  # elements, which stay in the cache of a core
_BLOCK = (120, 1920)  # rows and columns of a matrix that are transposed at a time, which stay in cache too


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
        if entry["dtype"] not in _DTYPES:
            raise UnweaveError(f"{name} in {str(path)!r} is stored as {entry['dtype']}, which is not read.")
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = tensor_in(mapping, _DTYPES[entry["dtype"]], entry["shape"], start)
    return tensors


def is_own(tensor: Tensor) -> bool:
    """Whether a tensor is all of its memory, in order, and that is no file's."""
    storage = tensor.untyped_storage()
    return tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in _MAPPINGS


def own(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """A contiguous copy, and whether all of it is finite; a mapped tensor's pages are given back as they are copied."""
    made = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    if tensor.ndim == 2 and not tensor.is_contiguous():
        return made, _transpose(tensor.T, made)
    finite = True
    for source, target in zip(tensor.reshape(-1).split(_PIECE), made.view(-1).split(_PIECE), strict=True):
        target.copy_(source)
        finite = finite and _is_finite(target)  # while it is in cache
        _forget(source)
    return made, finite


def _transpose(matrix: Tensor, made: Tensor) -> bool:
    """Fill `made` with the transpose of a matrix, block by block, and say whether all of it is finite.

    PyTorch transposes fast only from contiguous to contiguous memory, and in one thread. So all threads copy a block
    out of the matrix, one transposes it in cache, and all copy it to its place.
    """
    finite = True
    for rows, columns in zip(matrix.split(_BLOCK[0]), made.split(_BLOCK[0], 1), strict=True):
        for source, target in zip(rows.split(_BLOCK[1], 1), columns.split(_BLOCK[1]), strict=True):
            block = source.to(made.dtype).contiguous()
            finite = finite and _is_finite(block)
            target.copy_(block.T.contiguous())
        _forget(rows)
    return finite


def _forget(tensor: Tensor) -> None:
    """Give the pages back that lie wholly in a contiguous tensor, if it is mapped; they can be read again."""
    mapping = _MAPPINGS.get(tensor.untyped_storage().data_ptr())
    if mapping is None or not tensor.is_contiguous() or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = tensor.data_ptr() - mapping.address
    first, last = -(-start // mmap.PAGESIZE), (start + tensor.nbytes) // mmap.PAGESIZE
    if last > first:
        mapping.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a contiguous tensor are; in pieces, because the obvious way makes a copy."""
    return all(_is_finite(piece) for piece in tensor.view(-1).split(_PIECE))


def _is_finite(piece: Tensor) -> bool:
    return bool(piece.sum().isfinite()) or bool(piece.isfinite().all())  # a sum may overflow, which is fine
