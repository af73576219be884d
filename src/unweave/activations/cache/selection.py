"""Which rows of a store are read: chosen by what is known of them, and by their length, in one vectorised sweep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray

from unweave._errors import UnweaveError
from unweave.activations.cache.store import Store, chosen_hooks
from unweave.activations.masks import MaskConfig, kept_positions
from unweave.models import TOKEN_KINDS

_CHUNK = 1 << 20
MEDIAN_ROWS = 1 << 20
"""The median norm is that of the first so many rows that everything else leaves."""


@dataclass(frozen=True)
class Selection:
    """Which rows to read; without arguments, all of them.

    A row is left out if any part says so. Norms come last: their median is over the rows that the rest leaves, and a
    row that is too long at one hook is left out at all, so that rows stay aligned.

    Raises:
        UnweaveError: A norm multiple that is not positive, a step of 0, or unknown kinds.
    """

    without_special: bool = False
    """Leave out the tokenizer's special tokens."""
    without_tokens: Sequence[int] = ()
    """Token ids to leave out."""
    only_tokens: Sequence[int] | None = None
    """Token ids to keep."""
    only_kinds: Sequence[str] | None = None
    """Of images: kinds of tokens to keep, out of "patch", "cls" and "register"."""
    only_labels: Sequence[int] | None = None
    """Patch labels to keep."""
    without_labels: Sequence[int] = ()
    """Patch labels to leave out."""
    only_documents: Sequence[int] | range | None = None
    """Numbers of documents or images to keep."""
    without_documents: Sequence[int] | range = ()
    """Numbers of documents or images to leave out."""
    positions: str | Sequence[int] | None = None
    """Positions to keep, as a slice with or without a step ("1:", "8:64:4") or one by one."""
    norm_multiple: float | None = None
    """Leave out rows whose activation is longer than this many times the median."""

    def __post_init__(self) -> None:
        for part in fields(self):  # so that equal selections are equal
            value = getattr(self, part.name)
            if isinstance(value, list | np.ndarray | torch.Tensor):
                object.__setattr__(self, part.name, tuple(np.asarray(value).tolist()))
        if self.norm_multiple is not None and not self.norm_multiple > 0:
            raise UnweaveError(f"norm_multiple={self.norm_multiple} is not positive; None switches it off.")
        if unknown := set(self.only_kinds or ()) - set(TOKEN_KINDS):
            raise UnweaveError(f"only_kinds holds {unknown.pop()!r}; there are {', '.join(TOKEN_KINDS)}.")

    @classmethod
    def of_masks(cls, masks: MaskConfig, store: Store) -> Selection:
        """What a live stream would keep of a store's rows with these masks."""
        return cls(
            without_special=masks.special_tokens and store.special_ids is not None,
            without_tokens=masks.token_ids,
            only_kinds=masks.token_kinds if "kinds" in store.records else None,
            positions=masks.positions,
            norm_multiple=masks.norm_multiple,
        )


@dataclass(frozen=True, eq=False)
class Selected:
    """What a selection leaves of a store.

    Attributes:
        keep: True on the rows that are kept; None: all of them.
        n_rows: How many are kept.
        report: How many rows each part of the selection left, one after the other.
    """

    keep: Bool[np.ndarray, " rows"] | None
    n_rows: int
    report: dict[str, int]


def select(store: Store, selection: Selection, hooks: Sequence[str] | None = None) -> Selected:
    """Apply a selection.

    Args:
        store: The rows.
        selection: Which to keep.
        hooks: The hooks whose norms count; None: all.

    Raises:
        UnweaveError: Nothing is left, with what each part of it left; or the store does not know what it asks for.
    """
    report = {"all rows": store.n_rows}
    if selection == Selection():
        if not store.n_rows:
            raise UnweaveError(f"{store.name} has no rows.")
        return Selected(None, store.n_rows, report)
    keep = np.ones(store.n_rows, dtype=np.bool_)
    for name, column, test in _tests(store, selection):
        for start in range(0, store.n_rows, _CHUNK):
            here = slice(start, min(start + _CHUNK, store.n_rows))
            keep[here] &= test(store.records[column][here])
        report[name] = int(np.count_nonzero(keep))
    if selection.norm_multiple is not None and keep.any():
        _by_norm(store, selection.norm_multiple, chosen_hooks(store, hooks), keep)
        report[f"norm_multiple={selection.norm_multiple}"] = int(np.count_nonzero(keep))
    n = int(np.count_nonzero(keep))
    if not n:
        steps = ", then ".join(f"{count:,} ({name})" for name, count in report.items())
        raise UnweaveError(f"the selection leaves no row of {store.name}: there were {steps}.")
    return Selected(keep, n, report)


def _tests(store: Store, selection: Selection) -> Iterator[tuple[str, str, Any]]:
    """Each part of a selection that is not of norms: its name, the record that it looks at, and what it asks."""
    special = selection.without_special
    if special and store.special_ids is None:
        raise UnweaveError(f"{store.name} does not say which tokens are special: name them in without_tokens.")
    parts: list[tuple[str, str, Any, bool]] = [
        ("without_special", "token_ids", tuple(store.special_ids or ()) if special else None, False),
        ("without_tokens", "token_ids", selection.without_tokens or None, False),
        ("only_tokens", "token_ids", selection.only_tokens, True),
        ("only_kinds", "kinds", _numbers(selection.only_kinds), True),
        ("only_labels", "labels", selection.only_labels, True),
        ("without_labels", "labels", selection.without_labels or None, False),
        ("only_documents", "documents", selection.only_documents, True),
        ("without_documents", "documents", selection.without_documents or None, False),
    ]
    for name, column, values, wanted in parts:
        if values is not None:
            _check_known(store, column, name)
            yield name, column, _among(values, wanted)
    if selection.positions is not None:
        _check_known(store, "positions", "positions")
        starts = range(0, store.n_rows, _CHUNK)
        context = getattr(store, "context", None) or 1 + max(
            (int(store.records["positions"][a : a + _CHUNK].max()) for a in starts), default=0
        )
        kept = kept_positions(selection.positions, context).numpy()
        yield f"positions={selection.positions!r}", "positions", lambda column: kept[column]


def _among(values: Sequence[int] | range, wanted: bool) -> Any:
    if isinstance(values, range) and values.step == 1:
        return lambda column: ((column >= values.start) & (column < values.stop)) == wanted
    numbers = np.asarray(list(values), dtype=np.int64)
    return lambda column: np.isin(column, numbers) == wanted


def _numbers(kinds: Sequence[str] | None) -> list[int] | None:
    return None if kinds is None else [[str(k) for k in TOKEN_KINDS].index(kind) for kind in kinds]


def _check_known(store: Store, column: str, part: str) -> None:
    if column not in store.records:
        known = ", ".join(store.records) or "nothing"
        raise UnweaveError(f"{part} asks for the {column} of rows, and {store.name} records {known}.")


def _by_norm(store: Store, multiple: float, hooks: Sequence[str], keep: NDArray[np.bool_]) -> None:
    """Leave out rows that are too long, in place."""
    before = keep.copy()
    for hook in hooks:
        limit = math.inf
        first, n = list[NDArray[Any]](), 0
        for start in range(0, store.n_rows, _CHUNK):
            stop = min(start + _CHUNK, store.n_rows)
            first.append(_norms(store, hook, start, stop)[before[start:stop]][: MEDIAN_ROWS - n])
            if (n := n + len(first[-1])) >= MEDIAN_ROWS:
                break
        # A median of 0 (a hook that is mostly silent) says nothing about which rows are too long.
        limit = float(torch.from_numpy(np.concatenate(first)).median()) * multiple or math.inf
        for start in range(0, store.n_rows, _CHUNK):
            stop = min(start + _CHUNK, store.n_rows)
            keep[start:stop] &= _norms(store, hook, start, stop) <= limit


def _norms(store: Store, hook: str, start: int, stop: int) -> NDArray[Any]:
    if hook in store.norms:
        return store.norms[hook][start:stop]
    norms = np.empty(stop - start, dtype=np.float32)
    step = max(1, (64 << 20) // (4 * store.widths[hook]))
    for at in range(start, stop, step):
        x = store.read(at, min(at + step, stop), [hook], torch.float32)[hook]
        norms[at - start : at - start + len(x)] = torch.linalg.vector_norm(x, dim=1).numpy()
    return norms
