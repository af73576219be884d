"""Writing one shard: a temporary folder that rows are appended to, and that gets its name when it is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._files import atomic_folder, write_json
from unweave.activations.cache.format import DTYPES, RECORD_DTYPES, SHARD, as_stored
from unweave.activations.live import Pass
from unweave.activations.masks import lengths_of
from unweave.activations.tokenized.format import checksum, npy_header


class ShardWriter:
    """The open files of a shard.

    Args:
        folder: Where they are.
        hooks: File name of each hook.
        dtype: Type of the cache.
    """

    def __init__(self, folder: Path, hooks: Mapping[str, str], dtype: str) -> None:
        self.folder, self.hooks, self.dtype, self.rows = folder, hooks, dtype, 0
        self._files: dict[str, BinaryIO] = {}
        self._records: list[str] = []
        self._shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}

    def append(self, done: Pass, n: int) -> None:
        """Append the first `n` rows of a pass.

        Raises:
            UnweaveError: A number that the type cannot hold.
        """
        for hook, slug in self.hooks.items():
            x = done.activations[hook][:n]
            norms = lengths_of(x).float()
            stored, scales = as_stored(x, self.dtype)
            if self.dtype in ("float16", "bfloat16"):
                check_finite(x.to(DTYPES[self.dtype][1]), hook, done.records, f" as {self.dtype}, which ends before")
            self._write(f"{slug}.npy", stored)
            self._write(f"{slug}.norms.npy", norms.cpu().numpy())
            if scales is not None:
                self._write(f"{slug}.scale.npy", scales)
        self._records = list(done.records)
        for name, values in done.records.items():
            column = values[:n].numpy()
            self._write(f"{name}.npy", column.astype(RECORD_DTYPES.get(name, column.dtype.newbyteorder("<"))))
        self.rows += n

    def finish(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Close the files, note their sizes and checksums in `shard.json`, and return what it says."""
        files = {}
        for name, file in self._files.items():
            dtype, shape = self._shapes[name]
            file.seek(0)
            file.write(npy_header(dtype, (self.rows, *shape)))
            file.close()
            path = self.folder / name
            files[name] = {"bytes": path.stat().st_size, "blake2b": checksum(path)}
        widths = {hook: self._shapes[f"{slug}.npy"][1][0] for hook, slug in self.hooks.items() if files}
        records = {name: self._shapes[f"{name}.npy"][0].str for name in self._records}
        about = {"rows": self.rows, **extra, "widths": widths, "records": records, "files": dict(sorted(files.items()))}
        write_json(self.folder / SHARD, about)
        return about

    def close(self) -> None:
        """Close the files as they are."""
        for file in self._files.values():
            file.close()

    def _write(self, name: str, values: NDArray[Any]) -> None:
        if name not in self._files:
            self._files[name] = (self.folder / name).open("wb")
            self._shapes[name] = values.dtype, values.shape[1:]
            self._files[name].write(npy_header(values.dtype, (0, *values.shape[1:])))
        self._files[name].write(np.ascontiguousarray(values).data)


@contextmanager
def new_shard(folder: Path, hooks: Mapping[str, str], dtype: str) -> Iterator[ShardWriter]:
    """A shard that appears under its name if the block succeeds; nothing is left of it otherwise."""
    with on_disk(folder.parent), atomic_folder(folder) as temporary:
        writer = ShardWriter(temporary, hooks, dtype)
        try:
            yield writer
        finally:
            writer.close()


@contextmanager
def on_disk(folder: Path) -> Iterator[None]:
    """What an operating system says about a disk, in one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UnweaveError(
                f"the disk of {str(folder)!r} is full; its finished shards are not lost: free some space and resume."
            ) from error
        raise UnweaveError(f"the folder {str(folder)!r} cannot be written: {error.strerror or error}.") from error


def read_shard(folder: Path) -> dict[str, Any] | None:
    """What `shard.json` says, if there is such a shard and all of its files have their sizes."""
    try:
        about = json.loads((folder / SHARD).read_bytes())
        whole = all((folder / name).stat().st_size == file["bytes"] for name, file in about["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return about if whole else None


def size_below(folder: Path) -> int:
    """Bytes of the files in a folder and below it, of which other processes may rename or delete some meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def check_space(folder: Path, n_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if n_bytes > free:
        raise UnweaveError(
            f"the cache needs {n_bytes / 1e9:.3g} GB more, and the disk of {str(folder)!r} has {free / 1e9:.3g} GB: "
            "take fewer tokens or hooks, or a smaller dtype."
        )


def check_finite(x: Float[Tensor, "n d"], hook: str, records: Mapping[str, Tensor], how: str = "") -> None:
    """Refuse activations that are NaN or infinite, and say where they are."""
    if (bad := ~x.isfinite().all(1)).any():
        i = int(bad.nonzero()[0])
        where = ", ".join(f"{name.removesuffix('s')} {int(records[name][i])}" for name in ("documents", "positions"))
        raise UnweaveError(f"the activations at hook {hook} are NaN or infinite{how} ({where}).")
