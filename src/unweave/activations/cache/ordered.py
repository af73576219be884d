"""Reading a store in its own order, with what is known of each row: for whatever looks at neighbours in time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64

from unweave._errors import UnweaveError
from unweave.activations.cache.selection import Selected, Selection, select
from unweave.activations.cache.store import Store, chosen_hooks
from unweave.activations.live import Pass

_CHUNK = 1 << 16


class OrderedBatches(Iterator[Pass]):
    """Iterator of `Pass(activations, records)`, rows in the order in which they are stored.

    Args:
        store: The rows.
        batch_size: Rows per batch.
        by: What a batch consists of. "rows": exactly `batch_size` rows but for the last batch. "documents": whole
            documents, as many as fit into `batch_size`, and at least one, however long it is.
        selection: Which rows to read; None: all.
        hooks: Which hooks; None: all.
        workers: Threads that copy batches ahead; 0: the caller's own.
        dtype: Type of the activations; None: the store's own.

    Attributes:
        selected: What the selection left.

    Raises:
        UnweaveError: A batch size below 1, hooks that the store does not have, a selection that leaves nothing, or
            documents asked for where they are not known.
    """

    def __init__(
        self,
        store: Store,
        batch_size: int,
        *,
        by: Literal["rows", "documents"] = "rows",
        selection: Selection | None = None,
        hooks: Sequence[str] | None = None,
        workers: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise UnweaveError(f"batch_size={batch_size} or workers={workers} is too small.")
        if by not in ("rows", "documents"):
            raise UnweaveError(f'by={by!r} is neither "rows" nor "documents".')
        if by == "documents" and "documents" not in store.records:
            raise UnweaveError(f"{store.name} does not say which document a row is of.")
        self.store, self.batch_size, self.by = store, batch_size, by
        self.hooks, self._dtype = chosen_hooks(store, hooks), dtype
        self.selected: Selected = select(store, selection or Selection(), self.hooks)
        self._workers = workers
        self._batches = self._rows() if by == "rows" else self._documents()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="unweave-ordered") if workers else None
        self._planned: deque[Future[Pass]] = deque()

    def __next__(self) -> Pass:
        if self._pool is None:
            return self._copy(next(self._batches))
        while len(self._planned) <= 2 * self._workers and (rows := next(self._batches, None)) is not None:
            self._planned.append(self._pool.submit(self._copy, rows))
        if not self._planned:
            self._pool.shutdown()
            raise StopIteration
        return self._planned.popleft().result()

    def _copy(self, rows: slice | Int64[np.ndarray, " n"]) -> Pass:
        if isinstance(rows, slice):
            found = self.store.read(rows.start, rows.stop, self.hooks, self._dtype)
        else:
            threads = 1 if self._workers else 0
            found = self.store.gather(torch.from_numpy(rows), self.hooks, self._dtype, threads=threads)
        return Pass(found, {name: torch.from_numpy(_copied(c[rows])) for name, c in self.store.records.items()})

    def _rows(self) -> Iterator[slice | Int64[np.ndarray, " n"]]:
        if self.selected.keep is None:
            for start in range(0, self.store.n_rows, self.batch_size):
                yield slice(start, min(start + self.batch_size, self.store.n_rows))
            return
        waiting = np.empty(0, dtype=np.int64)
        for start in range(0, self.store.n_rows, _CHUNK):
            here = np.flatnonzero(self.selected.keep[start : start + _CHUNK]) + start
            waiting = np.concatenate([waiting, here])
            whole = len(waiting) // self.batch_size * self.batch_size
            yield from waiting[:whole].reshape(-1, self.batch_size)
            waiting = waiting[whole:]
        if len(waiting):
            yield waiting

    def _documents(self) -> Iterator[slice | Int64[np.ndarray, " n"]]:
        batch, n = list[Any](), 0
        for document in self._each_document():
            if batch and n + len(document) > self.batch_size:
                yield np.concatenate(batch)
                batch, n = [], 0
            batch.append(document)
            n += len(document)
        if batch:
            yield np.concatenate(batch)

    def _each_document(self) -> Iterator[Int64[np.ndarray, " n"]]:
        """The chosen rows of each document; one that lies in several places comes several times."""
        column, begun, last = self.store.records["documents"], list[Any](), -1
        for start in range(0, self.store.n_rows, _CHUNK):
            stop = min(start + _CHUNK, self.store.n_rows)
            rows = np.arange(start, stop)
            if self.selected.keep is not None:
                rows = rows[self.selected.keep[start:stop]]
            if not len(rows):
                continue
            numbers = column[start:stop][rows - start].astype(np.int64)
            pieces = np.split(rows, np.flatnonzero(np.diff(numbers)) + 1)
            if begun and numbers[0] != last:
                yield np.concatenate(begun)
                begun = []
            begun.append(pieces[0])
            for piece in pieces[1:]:
                yield np.concatenate(begun)
                begun = [piece]
            last = int(numbers[-1])
        if begun:
            yield np.concatenate(begun)


def _copied(column: Any) -> Any:
    """A copy that PyTorch takes: in the machine's byte order, and of a type that it knows."""
    return np.array(column, dtype=column.dtype.newbyteorder("="))
