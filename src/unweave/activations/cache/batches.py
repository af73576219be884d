"""Shuffled batches out of a store, at the speed of memory.

Blocks of 64 rows come in a random order, which is that of the seed and the epoch, and put the numbers of their rows
into a ring; batches are drawn from the ring. A row itself is copied once, from the mapped file into its batch, and by
threads of their own, several batches ahead. Which rows a batch holds is decided before, in one place, so the order does
not depend on the threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations.cache.selection import Selected, Selection, select
from unweave.activations.cache.store import Store, chosen_hooks
from unweave.activations.ring import ShuffleRing

BLOCK_ROWS = 64
_ROWS = "rows"


class StoreBatches(Iterator[dict[str, Tensor]]):
    """Iterator of `{hook: (batch_size, d)}` in random order; every chosen row is served once in each epoch.

    Epochs follow one another without a gap: an epoch's last rows and the next one's first can share a batch, and only
    the very last batch may be shorter.

    Args:
        store: The rows, for example `open_cache(folder).train`.
        batch_size: Rows per batch.
        capacity: Rows in the ring, at least `batch_size`; the larger, the better mixed. They cost 8 bytes each, and as
            many rows of the store should fit into memory, for the ring's rows to be read from disk once only.
        seed: Seed of the order.
        selection: Which rows to read; None: all.
        hooks: Which hooks; None: all. Rows of all hooks are of the same tokens.
        epochs: How many times to go through the rows, each time in another order; None: without end.
        workers: Threads that copy batches ahead; 0: the caller's own.
        dtype: Type of the batches; None: the store's own.
        device: Where batches go; to a GPU they are copied from pinned memory.
        drop_last: Leave out a last batch that is shorter than `batch_size`.

    Attributes:
        selected: What the selection left, and how many rows each part of it left.
        served: Rows served so far.
        ahead: Batches that are copied ahead.

    Raises:
        UnweaveError: A batch size, number of epochs or of workers that cannot be, a ring smaller than one batch, hooks
            that the store does not have, or a selection that leaves nothing.
    """

    def __init__(
        self,
        store: Store,
        batch_size: int,
        capacity: int = 524_288,
        seed: int = 0,
        *,
        selection: Selection | None = None,
        hooks: Sequence[str] | None = None,
        epochs: int | None = 1,
        workers: int = 1,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1 or workers < 0 or (epochs is not None and epochs < 1):
            raise UnweaveError(f"batch_size={batch_size}, epochs={epochs} or workers={workers} is too small.")
        if capacity < batch_size:
            raise UnweaveError(f"a ring of {capacity} rows is smaller than one batch of {batch_size}.")
        self.store, self.batch_size, self.epochs, self.drop_last = store, batch_size, epochs, drop_last
        self.hooks = chosen_hooks(store, hooks)
        self.selection = selection or Selection()
        self.selected: Selected = select(store, self.selection, self.hooks)
        self.device, self.served = torch.device(device), 0
        self._seed, self._dtype = seed, dtype
        self._ring = ShuffleRing(capacity, torch.Generator().manual_seed(seed))
        self._epoch, self._block = 0, 0
        self._order = self._order_of(0)
        self._waiting = torch.empty(0, dtype=torch.int64)  # the rest of a block that did not fit into the ring
        self._workers, self.ahead = workers, 2 * workers
        self._pool: ThreadPoolExecutor | None = None
        self._planned: deque[tuple[Tensor, Future[dict[str, Tensor]] | None]] = deque()

    @property
    def epoch(self) -> int:
        """Epochs that were served whole."""
        return self.served // self.selected.n_rows

    def __len__(self) -> int:
        """Batches from the beginning to the end."""
        if self.epochs is None:
            raise TypeError("batches without end have no length")
        n = self.selected.n_rows * self.epochs
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __next__(self) -> dict[str, Float[Tensor, "batch_size d"]]:
        while len(self._planned) <= self.ahead and len(rows := self._plan()):
            self._submit(rows)
        if not self._planned:
            self.close()
            raise StopIteration
        rows, copied = self._planned.popleft()
        self.served += len(rows)
        return self._copy(rows, 0) if copied is None else copied.result()

    def next_rows(self) -> Int64[Tensor, " n"]:
        """The numbers of the rows of the next batch, which is passed over; none at the end. Nothing is copied."""
        rows = self._planned.popleft()[0] if self._planned else self._plan()
        self.served += len(rows)
        return rows

    def peek(self, n: int) -> dict[str, Float[Tensor, "n d"]]:
        """Copies of up to `n` rows, spread evenly over those that come next. The batches stay what they are."""
        self._fill()
        planned = [rows for rows, _ in self._planned]
        held = torch.cat([*planned, *self._ring.peek(self._ring.capacity).values()])
        chosen = torch.linspace(0, len(held) - 1, min(n, len(held)), dtype=torch.float64).round().long()
        return self._copy(held[chosen], 0)

    def close(self) -> None:
        """End the threads. Batches that were copied ahead stay, and iterating starts threads anew."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=False)
            self._pool = None

    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """The reading position: numbers of rows, 8 bytes for each in the ring, and a few settings.

        Args:
            copy: Whether the ring's row numbers are a copy. If not, write them down before the next batch.
        """
        return {
            "identity": self._identity(),
            "epoch": self._epoch,
            "block": self._block,
            "served": self.served,
            "waiting": self._waiting.clone(),
            "planned": [rows.clone() for rows, _ in self._planned],
            "ring": self._ring.state_dict(copy=copy),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved.

        Raises:
            UnweaveError: It was saved for other rows, another order, or another batch size.
        """
        for name, value in self._identity().items():
            if state["identity"][name] != value:
                was = state["identity"][name]
                raise UnweaveError(f"the saved position has {name} {was!r}, and this is {value!r}.")
        self._epoch, self._block, self.served = state["epoch"], state["block"], state["served"]
        self._order = self._order_of(self._epoch)
        self._waiting = state["waiting"].cpu().clone()
        self._ring.load_state_dict(state["ring"])
        self._planned.clear()
        for rows in state["planned"]:
            self._submit(rows.cpu().clone())

    def _identity(self) -> dict[str, Any]:
        return {
            "store": self.store.fingerprint,
            "selection": repr(self.selection),
            "rows": self.selected.n_rows,
            "batch_size": self.batch_size,
            "capacity": self._ring.capacity,
            "seed": self._seed,
        }

    # --- which rows --------------------------------------------------------------------------------------------------

    def _order_of(self, epoch: int) -> Int64[Tensor, " blocks"]:
        n_blocks = -(-self.store.n_rows // BLOCK_ROWS)
        return torch.from_numpy(np.random.default_rng([self._seed, epoch]).permutation(n_blocks))

    def _plan(self) -> Int64[Tensor, " n"]:
        """The rows of the next batch; none at the end."""
        drawn, missing = list[Tensor](), self.batch_size
        while missing:
            self._fill()
            if n := min(missing, self._ring.size):
                drawn.append(self._ring.take(n)[_ROWS])
                missing -= n
            elif self.epochs is not None and self._epoch + 1 >= self.epochs:
                break
            else:
                self._epoch, self._block = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
        if not drawn or (missing and self.drop_last):
            return torch.empty(0, dtype=torch.int64)
        return drawn[0] if len(drawn) == 1 else torch.cat(drawn)

    def _fill(self) -> None:
        """Fill the ring with the rows of this epoch, as far as there are any."""
        while self._ring.free and (len(self._waiting) or self._block < len(self._order)):
            if not len(self._waiting):
                self._waiting = self._next_blocks(self._ring.free)
            n = min(self._ring.free, len(self._waiting))
            if n:
                self._ring.put({_ROWS: self._waiting[:n]})
            self._waiting = self._waiting[n:]

    def _next_blocks(self, n: int) -> Int64[Tensor, " rows"]:
        """The chosen rows of the next blocks, enough for `n` rows if nothing is left out."""
        blocks = self._order[self._block : self._block + -(-n // BLOCK_ROWS)]
        self._block += len(blocks)
        for first, last in _runs(blocks):  # few calls, and in the order of the file
            self.store.prefetch(first * BLOCK_ROWS, min((last + 1) * BLOCK_ROWS, self.store.n_rows), self.hooks)
        rows = (blocks[:, None] * BLOCK_ROWS + torch.arange(BLOCK_ROWS)).flatten()
        rows = rows[rows < self.store.n_rows]
        return rows if self.selected.keep is None else rows[torch.from_numpy(self.selected.keep)[rows]]

    # --- the rows themselves -----------------------------------------------------------------------------------------

    def _submit(self, rows: Tensor) -> None:
        if not self._workers:
            self._planned.append((rows, None))
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="unweave-batches")
        self._planned.append((rows, self._pool.submit(self._copy, rows, 1)))

    def _copy(self, rows: Tensor, threads: int) -> dict[str, Tensor]:
        batch = self.store.gather(rows, self.hooks, self._dtype, threads=threads)
        if self.device.type == "cpu":
            return batch
        return {
            name: (x.pin_memory() if self.device.type == "cuda" else x).to(self.device, non_blocking=True)
            for name, x in batch.items()
        }


def _runs(numbers: Int64[Tensor, " n"]) -> Iterator[tuple[int, int]]:
    """The first and the last of each run of neighbouring numbers."""
    ordered = np.sort(numbers.numpy())
    gaps = np.flatnonzero(np.diff(ordered) != 1)
    firsts, lasts = np.append(ordered[:1], ordered[gaps + 1]), np.append(ordered[gaps], ordered[-1:])
    return zip(firsts.tolist(), lasts.tolist(), strict=True)
