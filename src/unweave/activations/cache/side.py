"""One side of a cache: its files are mapped, and rows are copied out of them as they are needed."""

from __future__ import annotations

import mmap
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from unweave.activations.cache.format import DTYPES, HEADER_BYTES, files_of, hash_of
from unweave.activations.cache.store import Column, Joined, check_range, checked_rows, chosen_hooks
from unweave.activations.tokenized.format import read_npy_header
from unweave.kernels import RowTable, gather_rows

_PAGE = mmap.ALLOCATIONGRANULARITY


class CacheSide:
    """One side of a cache as a `Store`: mapped files, of which rows are copied as they are needed.

    Args:
        cache: Folder of the cache.
        manifest: What its manifest holds.
        side: "train" or "held_out".
    """

    def __init__(self, cache: Path, manifest: Mapping[str, Any], side: str) -> None:
        self.name = f"the cache {cache}" if side == "train" else f"the held-out side of the cache {cache}"
        self.side, self._dtype = side, DTYPES[manifest["dtype"]][1]
        self.hooks: tuple[str, ...] = tuple(hook["name"] for hook in manifest["hooks"])
        self.context: int = manifest["made_from"]["config"]["context"]
        self.widths: Mapping[str, int] = {hook["name"]: hook["width"] for hook in manifest["hooks"]}
        read_as = torch.float32 if self._dtype == torch.int8 else self._dtype
        self.dtypes: Mapping[str, torch.dtype] = dict.fromkeys(self.hooks, read_as)
        about = manifest["sides"][side]
        self.n_rows: int = about["rows"]
        self.fingerprint = hash_of({"cache": manifest["hash"], "side": side, "rows": self.n_rows})
        special = manifest["special_ids"]
        self.special_ids = None if special is None else {int(i): token for i, token in special.items()}
        slugs = {hook["name"]: hook["file"] for hook in manifest["hooks"]}
        files: dict[str, list[_Mapped]] = {}
        for shard in about["shards"]:
            for name in files_of(slugs, manifest["dtype"], manifest["records"]):
                files.setdefault(name, []).append(_Mapped(cache / shard["folder"] / name))
        self._files = {hook: files[f"{slug}.npy"] for hook, slug in slugs.items()}
        self._parts = {hook: [part.tensor(self._dtype) for part in parts] for hook, parts in self._files.items()}
        self._scales: dict[str, list[Tensor]] | None = None
        if self._dtype == torch.int8:
            self._scales = {
                hook: [part.tensor(torch.float32) for part in files[f"{slug}.scale.npy"]]
                for hook, slug in slugs.items()
            }
        self._tables = {
            hook: RowTable(parts, None if self._scales is None else self._scales[hook])
            for hook, parts in self._parts.items()
        }
        self._starts = np.cumsum([0, *(shard["rows"] for shard in about["shards"])]).tolist()
        self.norms: Mapping[str, Column] = {hook: _join(files[f"{slug}.norms.npy"]) for hook, slug in slugs.items()}
        self.records: Mapping[str, Column] = {name: _join(files[f"{name}.npy"]) for name in manifest["records"]}

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, rows: Any) -> dict[str, Float[Tensor, "n d"]]:
        """Copies of rows given by their numbers, or by a slice."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self.n_rows)
            return self.read(start, max(start, stop)) if step == 1 else self.gather(torch.arange(start, stop, step))
        return self.gather(torch.as_tensor(rows))

    def read(
        self, start: int, stop: int, hooks: Sequence[str] | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Float[Tensor, "n d"]]:
        """See `Store.read`."""
        check_range(self, start, stop)
        return {hook: self._read(hook, start, stop, dtype or self.dtypes[hook]) for hook in chosen_hooks(self, hooks)}

    def _read(self, hook: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        out = torch.empty(stop - start, self.widths[hook], dtype=dtype)
        for i, (first, last) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            a, b = max(start, first), min(stop, last)
            if a < b:
                part = self._parts[hook][i][a - first : b - first]
                if self._scales is not None:
                    part = part * self._scales[hook][i][a - first : b - first, None]
                out[a - start : b - start] = part
        return out

    def gather(
        self,
        rows: Int64[Tensor, " n"],
        hooks: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        *,
        threads: int = 0,
    ) -> dict[str, Float[Tensor, "n d"]]:
        """See `Store.gather`."""
        rows = checked_rows(self, rows)
        return {
            hook: gather_rows(self._tables[hook], rows, dtype, threads=threads) for hook in chosen_hooks(self, hooks)
        }

    def prefetch(self, start: int, stop: int, hooks: Sequence[str] | None = None) -> None:
        """See `Store.prefetch`: asks the operating system to read the rows in."""
        i, stop = bisect_right(self._starts, start) - 1, min(stop, self.n_rows)
        while start < stop:
            first, last = self._starts[i], min(stop, self._starts[i + 1])
            for hook in self.hooks if hooks is None else hooks:
                self._files[hook][i].will_need(start - first, last - first)
            start, i = last, i + 1


class _Mapped:
    """A `.npy` file of ours in memory, read-only. Its pages are shared with all who map it."""

    def __init__(self, path: Path) -> None:
        dtype, shape = read_npy_header(path)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.array: NDArray[Any] = np.frombuffer(self._map, dtype, offset=HEADER_BYTES).reshape(shape)
        self._row = self.array.strides[0] if len(shape) > 1 else dtype.itemsize

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """The same memory as a tensor. Nothing may be written to it."""
        array = self.array.view(np.int16) if dtype == torch.bfloat16 else self.array
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(array).view(dtype)

    def will_need(self, start: int, stop: int) -> None:
        if hasattr(mmap, "MADV_WILLNEED"):  # not on Windows
            begin = (HEADER_BYTES + start * self._row) // _PAGE * _PAGE
            self._map.madvise(mmap.MADV_WILLNEED, begin, HEADER_BYTES + stop * self._row - begin)


def _join(parts: Sequence[_Mapped]) -> Column:
    return parts[0].array if len(parts) == 1 else Joined([part.array for part in parts])
