"""What the readers of other libraries' caches share: rows in mapped arrays, and columns that are computed."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations.cache.store import Column, check_range, checked_rows, chosen_hooks
from unweave.kernels import RowTable, gather_rows

_SAMPLES = 64
"""So many rows, evenly spread, go into a fingerprint."""
_NORM_ROWS = 1 << 13
"""So many rows are read at a time when their lengths are computed."""


class Computed:
    """A `Column` whose values follow from the number of the row.

    Args:
        n: Number of rows.
        dtype: Type of the values.
        value: Of row numbers, the values.
    """

    def __init__(self, n: int, dtype: Any, value: Callable[[NDArray[np.int64]], NDArray[Any]]) -> None:
        self._n, self._dtype, self._value = n, np.dtype(dtype), value

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._dtype

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, rows: Any, /) -> NDArray[Any]:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(self._n))
        return self._value(np.asarray(rows, dtype=np.int64)).astype(self._dtype, copy=False)


class _Norms:
    """The lengths of a hook's activations as a `Column`: computed when they are first asked for, and kept."""

    dtype = np.dtype(np.float32)

    def __init__(self, store: MappedStore, hook: str) -> None:
        self._store, self._hook = store, hook
        self._known = np.full(store.n_rows, np.nan, dtype=np.float32)

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, rows: Any, /) -> NDArray[np.float32]:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            for at in range(start, stop, _NORM_ROWS):
                here = slice(at, min(at + _NORM_ROWS, stop))
                if np.isnan(self._known[here]).any():
                    self._known[here] = self._of(self._store.read(here.start, here.stop, [self._hook], torch.float32))
            return self._known[start : max(start, stop)]
        rows = np.asarray(rows, dtype=np.int64)
        missing = np.unique(rows[np.isnan(self._known[rows])])
        for at in range(0, len(missing), _NORM_ROWS):
            some = missing[at : at + _NORM_ROWS]
            self._known[some] = self._of(self._store.gather(torch.from_numpy(some), [self._hook], torch.float32))
        return self._known[rows]

    def _of(self, rows: dict[str, Tensor]) -> NDArray[np.float32]:
        norms: NDArray[np.float32] = torch.linalg.vector_norm(rows[self._hook], dim=1).numpy()
        return norms


class MappedStore:
    """A `Store` of rows that lie in mapped arrays. Rows are copied once, from the map into the result.

    Args:
        name: What error messages call it.
        parts: By hook, the arrays that `RowTable` takes, one behind the other.
        records: What is known of each row.
        identity: What the format says of the content, for the fingerprint; nothing about where it lies.
        special_ids: The tokenizer's special tokens, if they are known.
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[str, Sequence[Tensor]],
        records: Mapping[str, Column],
        identity: Any,
        special_ids: Mapping[int, str] | None = None,
    ) -> None:
        self.name, self.special_ids = name, special_ids
        self._tables = {hook: RowTable(of_hook) for hook, of_hook in parts.items()}
        self._parts = {hook: [part if part.ndim == 3 else part[None] for part in parts[hook]] for hook in parts}
        self._records, self._identity = dict(records), identity

    @cached_property
    def fingerprint(self) -> str:
        """128 bits over the format's own description and a few rows of each hook."""
        digest = hashlib.blake2b(json.dumps(self._identity, sort_keys=True).encode(), digest_size=16)
        rows = torch.linspace(0, self.n_rows - 1, min(_SAMPLES, self.n_rows), dtype=torch.float64).long()
        for hook, x in self.gather(rows).items():
            digest.update(hook.encode() + x.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def hooks(self) -> tuple[str, ...]:
        return tuple(self._tables)

    @property
    def widths(self) -> Mapping[str, int]:
        return {hook: table.d for hook, table in self._tables.items()}

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {hook: table.dtype for hook, table in self._tables.items()}

    @property
    def n_rows(self) -> int:
        return len(next(iter(self._tables.values())))

    @property
    def records(self) -> Mapping[str, Column]:
        return self._records

    @cached_property
    def norms(self) -> Mapping[str, Column]:
        """These formats store none: they are computed when they are asked for, once."""
        return {hook: _Norms(self, hook) for hook in self.hooks}

    def read(
        self, start: int, stop: int, hooks: Sequence[str] | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Float[Tensor, "n d"]]:
        """See `Store.read`."""
        check_range(self, start, stop)
        return {hook: self._read(hook, start, stop, dtype) for hook in chosen_hooks(self, hooks)}

    def _read(self, hook: str, start: int, stop: int, dtype: torch.dtype | None) -> Tensor:
        table = self._tables[hook]
        out = torch.empty(stop - start, table.d, dtype=dtype or table.dtype)
        for part, at in self._overlapping(hook, start, stop):
            first = max(start - at, 0)
            _copy(part, first, out[max(at - start, 0) :][: part.shape[0] * part.shape[1] - first])
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
        names, rows = chosen_hooks(self, hooks), checked_rows(self, rows)
        return {hook: gather_rows(self._tables[hook], rows, dtype, threads=threads) for hook in names}

    def prefetch(self, start: int, stop: int, hooks: Sequence[str] | None = None) -> None:
        """Ask the system to read these rows ahead, where it can be asked."""
        check_range(self, start, stop)
        for hook in chosen_hooks(self, hooks):
            for part, at in self._overlapping(hook, start, stop):
                _will_need(part, max(start - at, 0), min(stop - at, part.shape[0] * part.shape[1]))

    def _overlapping(self, hook: str, start: int, stop: int) -> Iterator[tuple[Tensor, int]]:
        """The parts that hold any of these rows, and the number of each one's first row."""
        starts = self._tables[hook].starts
        for i in range(int(torch.searchsorted(starts, start, right=True)) - 1, len(self._parts[hook])):
            if (at := int(starts[i])) >= stop:
                return
            if int(starts[i + 1]) > at:
                yield self._parts[hook][i], at


def _copy(part: Tensor, start: int, out: Tensor) -> None:
    """Copy the rows of a part from `start` on, whole groups at once."""
    per_group, done = part.shape[1], 0
    while done < len(out):
        group, within = divmod(start + done, per_group)
        groups = 0 if within else (len(out) - done) // per_group
        if groups:
            n = groups * per_group
            out[done : done + n].view(groups, per_group, -1).copy_(part[group : group + groups])
        else:
            n = min(per_group - within, len(out) - done)
            out[done : done + n].copy_(part[group, within : within + n])
        done += n


def _will_need(part: Tensor, start: int, stop: int) -> None:
    """Rows of a part, of which each group lies by itself."""
    per_group, size = part.shape[1], part.element_size()
    for group in range(start // per_group, -(-stop // per_group)):
        begin, end = max(start - group * per_group, 0), min(stop - group * per_group, per_group)
        at = part.data_ptr() + (group * part.stride(0) + begin * part.stride(1)) * size
        aligned = at - at % mmap.PAGESIZE
        if _MADVISE is not None:
            _MADVISE(aligned, at - aligned + (end - begin) * part.stride(1) * size, mmap.MADV_WILLNEED)


def _find_madvise() -> Any:
    if not hasattr(mmap, "MADV_WILLNEED"):
        return None  # Windows
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


_MADVISE = _find_madvise()


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor that shares the memory of an array which may not be written to, and so must never be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UnweaveError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UnweaveError(f"{path} cannot be read: {error}.") from error


def counted(path: Path, values: Mapping[str, Any], *, least: int = 1) -> None:
    """Refuse what should be whole numbers of at least `least` and isn't."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UnweaveError(f"{path} says {name}={value!r}, which is not a whole number of at least {least}.")
