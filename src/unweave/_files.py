"""Files appear whole or not at all: everything is written under a temporary name, flushed, and renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unweave._errors import UnweaveError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, delete it if it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file at `path` as it is, byte for byte as the safetensors package does.

    Nothing is copied: each tensor is written from where it lies. One that is not contiguous, or not in the CPU's
    memory, is copied block by block, and tensors that share memory are written as if they did not.

    Raises:
        UnweaveError: If it could not be written, for want of space above all.
    """
    from unweave._mapped import DTYPES, blocks

    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise UnweaveError(f"{name} is of type {tensor.dtype}, which a safetensors file cannot hold.")
    order = list(names)  # the widest first, so that each tensor is aligned to its own type
    ordered = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    header, end = dict[str, Any](), 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in ordered:
                for block in blocks(tensor):
                    file.write(block)
    except OSError as error:
        raise UnweaveError(f"{str(path)!r} could not be written: {error.strerror or error}.") from error


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes `path`'s place if the block succeeds, and vanishes otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    retired = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        if path.exists():
            os.replace(path, retired)
        try:
            os.replace(temporary, path)
        except BaseException:
            if retired.exists():
                os.replace(retired, path)
            raise
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: str | Path) -> None:
    """Delete a folder, if it is there. Killed at any moment, it leaves the whole of it or nothing under its name."""
    path = Path(path)
    retired = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        shutil.rmtree(retired, ignore_errors=True)
        os.replace(path, retired)
        shutil.rmtree(retired, ignore_errors=True)


_LEFT = re.compile(r"\..+\.\d+\.tmp|\.DS_Store")
"""What a killed process may have left, and what macOS puts into folders."""


def refuse_foreign(folder: Path, names: Iterable[str], ours: re.Pattern[str]) -> None:
    """Before files and folders of ours are replaced: refuse if what is called so, or lies in it, is somebody else's.

    Args:
        folder: What they lie in.
        names: The files and folders that are to be replaced.
        ours: Fits the names of the files that we write, and no others.

    Raises:
        UnweaveError: It names the first foreign file.
    """
    for name in names:
        path = folder / name
        files = sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else [path]
        for file in files:
            known = ours.fullmatch(file.name) or _LEFT.fullmatch(file.name)
            if file.is_symlink() or (file.is_file() and not known):
                what = "is not of the run that is to be replaced: move it, or name another folder."
                raise UnweaveError(f"{str(file)!r} {what}")


def remove_leftovers(folder: Path, ours: Callable[[str], bool] = lambda name: True) -> None:
    """Delete what killed processes left under temporary names of the files and folders in `folder` that are `ours`."""
    for path in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        name, _, process = path.stem[1:].rpartition(".")
        if ours(name) and process.isdigit() and not _lives(int(process)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def claimed(lock: Path) -> Iterator[bool]:
    """Hold a lock file for the length of the block; yields False at once if another process holds it.

    The lock of a process that is killed is free. The file stays.

    Raises:
        UnweaveError: The system or the disk has no locks.
    """
    try:
        import fcntl
    except ImportError:
        raise UnweaveError("several processes share images out by file locks, which this system lacks.") from None
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise UnweaveError(
                f"several processes share images out by file locks, and {str(lock)!r} cannot be locked: "
                f"{error.strerror or error}."
            ) from error
        yield True


def _lives(process: int) -> bool:
    """Whether a process of this number is running here, and is not this one.

    One that has ended, and that whoever started it has not asked about yet, does not run, but can be signalled.
    """
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:
        return b") Z " not in Path(f"/proc/{process}/stat").read_bytes()
    except OSError:  # not every system tells
        return True


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON (NaN refused), atomically."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
