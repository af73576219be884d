"""What a cache looks like to whoever reads it: rows of activations that lie ready, and what is known of each row.

`Store` is the interface of our own caches, side by side with readers for other people's. The batches that are drawn
from a store (`StoreBatches`, `OrderedBatches`) and the rows that a `Selection` leaves need nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from unweave._errors import UnweaveError, nearest


class Column(Protocol):
    """One value for each row of a store. Any one-dimensional numpy array is one; a mapped array costs no memory."""

    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> NDArray[Any]:
        """The values of a slice of rows, or of some rows given as an int64 array."""
        ...


@runtime_checkable
class Store(Protocol):
    """Rows of activations at one or more hooks. Row `i` is the same position of the same document at every hook."""

    @property
    def name(self) -> str:
        """What error messages call it."""
        ...

    @property
    def fingerprint(self) -> str:
        """The same for the same content wherever it lies. A saved reading position is only good for an equal one."""
        ...

    @property
    def hooks(self) -> tuple[str, ...]: ...

    @property
    def widths(self) -> Mapping[str, int]:
        """Size of an activation at each hook."""
        ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Type in which each hook is read unless another is asked for (of int8 rows with scales: float32)."""
        ...

    @property
    def n_rows(self) -> int: ...

    @property
    def records(self) -> Mapping[str, Column]:
        """What is known of each row, in the order of the rows.

        "documents" (number of the document or image) and "positions" (place in its row of tokens or image) wherever
        they are known; of text "token_ids"; of images "kinds" and "labels".
        """
        ...

    @property
    def norms(self) -> Mapping[str, Column]:
        """Length of each activation, by hook. Empty if they were not stored: then they are computed where needed."""
        ...

    @property
    def special_ids(self) -> Mapping[int, str] | None:
        """The tokenizer's special tokens; None if that is not known, or if the rows are not of text."""
        ...

    def read(
        self, start: int, stop: int, hooks: Sequence[str] | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Float[Tensor, "n d"]]:
        """Copies of the rows from `start` to before `stop`.

        Args:
            start: First row, from 0.
            stop: At most `n_rows`.
            hooks: Which hooks; None: all.
            dtype: Type of the result; None: that of `dtypes`.

        Raises:
            UnweaveError: Rows or hooks that there are not.
        """
        ...

    def gather(
        self,
        rows: Int64[Tensor, " n"],
        hooks: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        *,
        threads: int = 0,
    ) -> dict[str, Float[Tensor, "n d"]]:
        """Copies of some rows in the order asked for; otherwise as `read`.

        `threads` are those that the copying may use, 0: as many as PyTorch does. May be called by several threads at
        once.
        """
        ...

    def prefetch(self, start: int, stop: int, hooks: Sequence[str] | None = None) -> None:
        """Say that these rows will be gathered soon. A store that has nothing to do for that does nothing."""
        ...


class Joined:
    """Some arrays one behind the other, as one column, without copying them."""

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._parts[0].dtype

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: Any, /) -> NDArray[Any]:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            ends = np.searchsorted(self._starts, (start, max(stop - 1, start)), "right").tolist()
            pieces = [
                self._parts[i][max(start - self._starts[i], 0) : max(stop - self._starts[i], 0)]
                for i in range(ends[0] - 1, min(ends[1], len(self._parts)))
            ]
            return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.empty(0, self.dtype)])
        rows = np.asarray(rows, dtype=np.int64)
        out = np.empty(len(rows), dtype=self.dtype)
        part_of = np.searchsorted(self._starts, rows, "right") - 1
        for i in np.unique(part_of).tolist():
            here = part_of == i
            out[here] = self._parts[i][rows[here] - self._starts[i]]
        return out


def chosen_hooks(store: Store, hooks: Sequence[str] | None) -> tuple[str, ...]:
    """The hooks that are meant; None: all of them.

    Raises:
        UnweaveError: One that the store does not have.
    """
    if hooks is None:
        return store.hooks
    for hook in hooks:
        if hook not in store.hooks:
            hint = nearest(hook, store.hooks) or f"; it has {', '.join(map(repr, store.hooks))}."
            raise UnweaveError(f"{store.name} holds no activations at {hook!r}{hint}")
    return tuple(hooks)


def check_range(store: Store, start: int, stop: int) -> None:
    """Refuse rows that a store does not have."""
    if not 0 <= start <= stop <= store.n_rows:
        raise UnweaveError(f"rows {start} to {stop} were asked for, and {store.name} has {store.n_rows:,}.")


def checked_rows(store: Store, rows: Any) -> Int64[Tensor, " n"]:
    """Row numbers as an int64 tensor on the CPU.

    Raises:
        UnweaveError: They are not whole numbers in one dimension, or some are out of range.
    """
    numbers = torch.as_tensor(rows)
    if numbers.ndim != 1 or numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise UnweaveError(f"row numbers are a list of whole numbers, not {tuple(numbers.shape)} {numbers.dtype}.")
    numbers = numbers.to("cpu", torch.int64).contiguous()
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < store.n_rows:
        raise UnweaveError(
            f"rows {int(numbers.min())} to {int(numbers.max())} were asked for, and {store.name} has {store.n_rows:,}."
        )
    return numbers
