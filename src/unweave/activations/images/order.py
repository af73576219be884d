"""Which image comes when: the order of an epoch, or a part of it, without decoding any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from unweave.activations.images.prepare import Preparation
from unweave.activations.images.source import UNREADABLE, Entry, Images

_WINDOW = 256
"""Images that are sorted by their grid, where aspect ratios are kept."""


class Order:
    """The order of some images in each epoch. A place in it is the number of images in front of it.

    Args:
        source: The images. A stream keeps its order; others come in another one in each epoch.
        preparation: What is done to them, which decides where equal grids come together.
        seed: Of the orders.

    Attributes:
        n_places: Images of an epoch, bad ones and those of both sides; None of a stream that was not read to its end.
        streamed: Images that were taken from a stream since it was opened.
    """

    def __init__(self, source: Images, preparation: Preparation, seed: int) -> None:
        self._source, self._preparation, self._seed = source, preparation, seed
        self.n_places: int | None = None if source.entry is None else len(source)
        self.streamed = 0
        self._stream: Iterator[Callable[[], Entry]] | None = None

    def between(
        self, epoch: int, start: int, stop: int | None = None
    ) -> Iterator[tuple[int, int, Callable[[], Entry]]]:
        """Of each image from one place to another: the place behind it, its number, and what gets it."""
        entry = self._source.entry
        if entry is None:
            yield from self._streamed_between(start, stop)
            return
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._source))
        stop = len(order) if stop is None else min(stop, len(order))
        for window in range(start // _WINDOW * _WINDOW, stop, _WINDOW):
            for behind, i in enumerate(self._by_grid(order[window : window + _WINDOW].tolist()), window + 1):
                if start < behind <= stop:
                    yield behind, i, partial(entry, i)

    def _streamed_between(self, start: int, stop: int | None) -> Iterator[tuple[int, int, Callable[[], Entry]]]:
        """Goes on with the stream as it was opened, if that did not go beyond `start`."""
        if self._stream is None or start < self.streamed:
            assert self._source.stream is not None
            self._stream, self.streamed = self._source.stream(), 0
        while stop is None or self.streamed < stop:
            get = next(self._stream, None)
            if get is None:
                self.n_places = self.streamed
                return
            number, self.streamed = self.streamed, self.streamed + 1
            if number >= start:
                yield number + 1, number, get
            else:
                self._register(number, get)

    def _register(self, number: int, get: Callable[[], Entry]) -> None:
        """Note what is known of an image that is passed over; it is not decoded."""
        try:
            entry = get()
            self._source.register(number, entry.name, entry.label)
        except UNREADABLE:
            self._source.register(number, f"image {number}", None)

    def _by_grid(self, numbers: list[int]) -> list[int]:
        """Images of equal grids together, where aspect ratios are kept; otherwise as they come."""
        if not self._preparation.keeps_aspect or self._source.size_of is None:
            return numbers
        grids = {}
        for i in numbers:
            try:
                grids[i] = self._preparation.grid_for(*self._source.size_of(i))
            except UNREADABLE:
                grids[i] = (0, 0)
        return sorted(numbers, key=grids.__getitem__)
