"""The documents of one side of the held-out split, in a seeded order, without ever holding all of them.

The parts are read in a random order, and their documents shuffled within windows of 8192 documents or 64 MB. The order
is a function of the seed and the epoch alone. A position is the place where the open window begins and the number of
documents taken from it, so resuming reads one window again, whatever came before.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from unweave._errors import UnweaveError
from unweave.activations.config import DataConfig
from unweave.activations.documents import Documents
from unweave.activations.records import Document, Unreadable, content_of, size_of
from unweave.activations.split import held_out_cutoff, held_out_score

WINDOW_DOCUMENTS = 8192
WINDOW_BYTES = 64 << 20


class DocumentReader:
    """Iterator over the documents of one side of the held-out split, in the order of one epoch.

    Args:
        documents: What to read.
        config: `seed` decides the order, `held_out` the split, `max_bad` how many unreadable documents are left out.
        held_out: Which side to read.

    Attributes:
        skipped: What was left out because it cannot be read, with the reason; each is named in a warning, too.

    Raises:
        UnweaveError: While iterating: more documents than `max_bad` cannot be read.
    """

    epoch: int

    def __init__(self, documents: Documents, config: DataConfig, *, held_out: bool) -> None:
        self._documents, self._seed = documents, config.seed
        self._fraction, self._held_out = config.held_out, held_out
        self._cutoff: float | None = None
        self.skipped, self._max_bad = list[str](), config.max_bad
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self._seek({"epoch": epoch, "part": 0, "skip": 0, "window": -1, "taken": 0, "cutoff": self._cutoff})
        self._window: list[Document] = []

    def __iter__(self) -> DocumentReader:
        return self

    def __next__(self) -> Document:
        while self._taken >= len(self._window):
            if not self._load_window():
                raise StopIteration
        self._taken += 1
        return self._window[self._taken - 1]

    def state_dict(self) -> dict[str, Any]:
        """Position, as plain numbers."""
        part, skip = self._window_start
        position = {"part": part, "skip": skip, "window": self._window_number, "taken": self._taken}
        return {"epoch": self.epoch, "cutoff": self._cutoff, "skipped": list(self.skipped)} | position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; reads the window that was open."""
        self._seek(state)
        self.skipped = list(state["skipped"])
        self._window = []
        if state["window"] >= 0:
            self._window_number -= 1
            self._load_window()
            self._taken = state["taken"]

    def _seek(self, state: dict[str, Any]) -> None:
        self.epoch, self._cutoff = state["epoch"], state["cutoff"]
        self._window_start = self._position = (state["part"], state["skip"])
        self._window_number, self._taken = state["window"], 0
        order = np.random.default_rng([self._seed, self.epoch, 0]).permutation(len(self._documents.parts))
        self._stream = self._read(order.tolist(), *self._position)

    def _read(self, order: list[int], first: int, skip: int) -> Iterator[Document | Unreadable]:
        for i in range(first, len(order)):
            position = skip if i == first else 0
            for document in self._documents.parts[order[i]].read(position):
                position += 1
                self._position = (i, position)
                yield document

    def _load_window(self) -> bool:
        start, window, size, ended = self._position, list[Document](), 0, True
        for document in self._stream:
            if isinstance(document, Unreadable):
                self._skip(document.reason)
                continue
            window.append(document)
            size += size_of(document)
            if len(window) >= WINDOW_DOCUMENTS or size >= WINDOW_BYTES:
                ended = False
                break
        if not window:
            return False
        self._window_start, self._window_number, self._taken = start, self._window_number + 1, 0
        if self._fraction:
            window = self._on_our_side(window, everything=ended and self._window_number == 0)
        order = np.random.default_rng([self._seed, self.epoch, self._window_number + 1]).permutation(len(window))
        self._window = [window[i] for i in order]
        return True

    def _skip(self, reason: str) -> None:
        if reason in self.skipped:  # in an earlier epoch
            return
        self.skipped.append(reason)
        if len(self.skipped) > self._max_bad:
            allowed = f" (max_bad={self._max_bad} others were left out)" if self._max_bad else ""
            raise UnweaveError(f"{reason.rstrip('.')}{allowed}.")
        warnings.warn(f"left out: {reason}", stacklevel=2)

    def _on_our_side(self, window: list[Document], *, everything: bool) -> list[Document]:
        if self._cutoff is None:
            self._cutoff = cutoff_of(window, self._fraction, everything=everything)
        return [document for document in window if (score_of(document) < self._cutoff) == self._held_out]


def score_of(document: Document) -> int:
    """What decides on a document's side. With no seed, so that all runs are compared on the same held-out text."""
    return held_out_score(content_of(document))


def cutoff_of(window: list[Document], fraction: float, *, everything: bool) -> float:
    """The score below which documents are held out.

    Args:
        window: The first documents.
        fraction: Part to hold out; may be 0.
        everything: They are all there are, fewer than a window holds, so that no side may stay empty.
    """
    if not (everything and fraction):
        return fraction * 2**64
    return held_out_cutoff(((score_of(document), size_of(document)) for document in window), fraction)
