"""Tensors in files, looked at without being read, and then copied into memory of their own.

A mapped tensor must not outlive the reading: who writes the file anew changes it, or ends the process. `own` reads it
past the mapping, or gives the mapping's pages back as it goes, so that a file of 2 GB takes 2 GB and not 4.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.kernels import Mapped, copy_checked

DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types of a safetensors file, in the order in which it holds its tensors."""
_WRITTEN_BYTES = 2 << 20  # that are copied at a time on their way to a file


class Mapping(mmap.mmap):
    """A file in memory, which is not to be written to there."""

    path: Path
    address: int
    file: int
    """Descriptor, open as long as the mapping is there."""
    state: tuple[int, int]

    def check(self) -> None:
        """Refuse a file that is no longer what was mapped.

        Raises:
            UnweaveError: Something was written to it, or cut off.
        """
        if _state(self.file) != self.state:
            raise UnweaveError(f"{str(self.path)!r} was changed while it was read: read it again.")

    def forget(self, tensor: Tensor) -> None:
        """Give the pages back that lie wholly in or between a mapped tensor's rows; they can be read again."""
        if tensor.numel() == 0 or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = tensor.data_ptr() - self.address
        length = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        first, last = -(-start // mmap.PAGESIZE), (start + length * tensor.itemsize) // mmap.PAGESIZE
        if last > first:
            self.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def _state(file: int) -> tuple[int, int]:
    """What changes when a file is written to."""
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns


_MAPPINGS: WeakValueDictionary[int, Mapping] = WeakValueDictionary()
"""By the address of each tensor's storage."""


def map_file(path: Path) -> Mapping:
    """A file, mapped."""
    with path.open("rb") as file:
        mapping = Mapping(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapping.path, mapping.file, mapping.state = path, os.dup(file.fileno()), _state(file.fileno())
    finalize(mapping, os.close, mapping.file)
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
    """A contiguous copy, and whether all of it is finite.

    Raises:
        UnweaveError: If the tensor lies in a file that was changed since it was mapped, or cannot be read.
    """
    made = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    return made, fill(made, tensor)


def fill(made: Tensor, tensor: Tensor, factor: float = 1.0) -> bool:
    """Copy a tensor, or its product with a factor, into (columns of) another; whether all of it is finite.

    Raises:
        UnweaveError: Likewise.
    """
    mapping = _MAPPINGS.get(tensor.untyped_storage().data_ptr())
    if mapping is None:
        return copy_checked(tensor, made, factor=factor)
    mapping.check()  # what is no longer in the file must not be looked at
    place = Mapped(mapping.file, tensor.data_ptr() - mapping.address, mapping.forget)
    try:
        return copy_checked(tensor, made, place, factor=factor)
    except OSError as error:
        raise UnweaveError(f"{str(mapping.path)!r} cannot be read: {error}.") from error
    finally:
        mapping.check()


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
