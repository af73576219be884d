"""What `torch.save` wrote: read as data and never run, and mapped like every other file."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._mapped import Mapping, map_file, tensor_in

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip entry: lengths of its name and of its extra field
_PLACE = "_checkpoint_offset"
"""Of a storage that was loaded as a shape: where its bytes lie in the file."""


def read_torch(path: Path, start: int = 0) -> Any:
    """Tensors, numbers, texts, lists and dictionaries of a PyTorch file; tensors are mapped if it is of the zip kind.

    Args:
        path: The file.
        start: Where it begins, if something else comes before it.

    Raises:
        UnweaveError: If it is damaged, or a pickle with code in it.
    """
    try:
        with path.open("rb") as file:
            tail = Tail(file, start)
            is_zip = tail.read(2) == b"PK"
            tail.seek(0)
            if is_zip:
                shapes = torch.load(cast(Any, tail), map_location="meta", weights_only=True)
                if all(hasattr(tensor.untyped_storage(), _PLACE) for tensor in _tensors(shapes)):
                    return _mapped(shapes, map_file(path), start)
                tail.seek(0)  # this version of PyTorch does not say where tensors lie
            return torch.load(cast(Any, tail if is_zip else file), map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UnweaveError(
            f"{str(path)!r} is a pickle with code in it (or damaged), which could do anything and is never run: ask "
            "for the weights alone."
        ) from error
    except (RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UnweaveError(f"{str(path)!r} is damaged: {reason}.") from error


def _mapped(value: Any, mapping: Mapping, start: int) -> Any:
    """The same value with tensors that lie in the file, whose pages can be given back while they are copied."""
    if isinstance(value, dict | list | tuple):
        if isinstance(value, dict):
            return {key: _mapped(inner, mapping, start) for key, inner in value.items()}
        return type(value)(_mapped(inner, mapping, start) for inner in value)
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    place, count = start + getattr(storage, _PLACE), storage.nbytes() // value.itemsize
    return tensor_in(mapping, value.dtype, (count,), place).as_strided(
        value.shape, value.stride(), value.storage_offset()
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def start_of(entry: zipfile.ZipInfo, file: BinaryIO) -> int:
    """Where the bytes of an entry begin in its archive; the file is left standing there."""
    file.seek(entry.header_offset)
    lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return file.seek(sum(lengths), io.SEEK_CUR)


class Tail(io.RawIOBase):
    """A file without its first bytes, to readers that start at 0."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file, self._start = file, start
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)  # type: ignore[attr-defined]

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset + (self._start if whence == io.SEEK_SET else 0), whence) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start
