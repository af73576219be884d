"""Rows of image tokens: images of one side of the held-out split, decoded ahead by threads, in a seeded order.

Which images a run sees, and in which order, is a function of the data and the config alone: threads decode ahead, but
are waited for in order. The position of a run is a place in an epoch's order, so resuming decodes nothing twice, and
processes can share an epoch out by its places.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations.images.bad import BadImages
from unweave.activations.images.batch import ImageBatch
from unweave.activations.images.config import ImageConfig
from unweave.activations.images.listing import ImageData, open_images
from unweave.activations.images.order import Order
from unweave.activations.images.prepare import Preparation, Prepared
from unweave.activations.images.source import UNREADABLE, Entry, digest
from unweave.activations.split import held_out_cutoff, held_out_score
from unweave.models import LoadedModel, describe

_FEW = 512
"""So many images can leave a side of the split empty: all of them are hashed first."""
_KEPT_BYTES = 256 << 20
"""Memory for prepared images, so that small data are decoded once and not in every epoch."""


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What became of one image: prepared, of the other side (neither), or bad."""

    name: str
    label: int | None = None
    prepared: Prepared | None = None
    bad: str | None = None


@dataclass(frozen=True, eq=False)
class _Row:
    prepared: Prepared
    number: int
    epoch: int
    behind: int
    """Place in the epoch's order behind this image."""


class ImageRows:
    """The training images, or the held-out ones, as a model's rows. Satisfies `Rows`.

    Args:
        data: Anything that `open_images` takes.
        model: The model that they are for, with its processor.
        config: What to read, and how to resize it.
        held_out: Serve the held-out images instead of the training ones.
        repeat: Start another epoch, in another order, when the images are exhausted. Streams keep their order.

    Attributes:
        source: The opened data: names, classes and labels of the images by number.
        bad: Names of the images that could not be read, and why.
        epoch: Number of times the images were read to their end.

    Raises:
        UnweaveError: No images, or a model or processor that does not fit; from `next_rows`: more than
            `config.max_bad` unreadable images, or none at all on this side of the split.
    """

    def __init__(
        self, data: ImageData, model: LoadedModel, config: ImageConfig | None = None, *, held_out: bool,
        repeat: bool = False,
    ) -> None:  # fmt: skip
        config = config or ImageConfig()
        if held_out and not config.held_out:
            raise UnweaveError("held-out images were asked for, but held_out=0 keeps none.")
        self.source = open_images(data, config)
        self.config, self.held_out, self.repeat = config, held_out, repeat
        self._preparation = Preparation(model, config, ready=self.source.ready, label_dtype=self.source.label_dtype)
        self._processor = "" if self.source.ready or model.processor is None else describe(model.processor)
        self.bad = BadImages(self.source.name, config.max_bad)
        self._order = Order(self.source, self._preparation, config.seed)
        self.epoch = 0
        self._done = 0
        self._cutoff = config.held_out * 2.0**64
        if self.source.entry is not None and config.held_out and len(self.source) <= _FEW:
            self._cutoff = held_out_cutoff(self._scores(), config.held_out)
        self._kept: dict[int, _Outcome] = {}
        self._n_kept_bytes = 0
        self._pool = ThreadPoolExecutor(config.workers, "unweave-images") if config.workers else None
        self._seek(0, 0)
        self._context = 0
        self._context = self.example().real.shape[1] if self.source.ready else self._preparation.n_positions()

    @property
    def context(self) -> int:
        """Positions of an image: CLS token, registers and patches; of images with grids of their own, at most."""
        return self._context

    def next_rows(self, n: int) -> ImageBatch:
        """The next `n` images; fewer when they end, or where the next one has another shape; none once exhausted."""
        batch = self.peek(n)
        for _ in range(len(batch)):
            row = self._ready.popleft()
            self.epoch, self._done = row.epoch, row.behind
        return batch

    def peek(self, n: int) -> ImageBatch:
        """The images that `next_rows(n)` would give, without moving on."""
        while len(self._ready) < n and self._read_more():
            pass
        rows: list[_Row] = []
        for row in islice(self._ready, n):
            if rows and row.prepared.shapes != rows[0].prepared.shapes:
                break
            rows.append(row)
        return self._batch(rows)

    def batches(self, n: int) -> Iterator[ImageBatch]:
        """Batches of up to `n` images until they are exhausted."""
        while len(batch := self.next_rows(n)):
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: plain values."""
        return {"data": self._identity(), "epoch": self.epoch, "done": self._done, "bad": dict(self.bad)}

    def limit_to(self, start: int, stop: int, bad: dict[str, str]) -> None:
        """Serve the images from one place to another of the first epoch's order, without looking at any other.

        Args:
            start: The first place: so many images come in front of it, bad ones and those of the other side counted.
            stop: The place behind the last one.
            bad: Images known to be unreadable, which count.

        Raises:
            UnweaveError: They are those of an iterator, which is beyond them already.
        """
        if self.source.once and start < self._order.streamed:
            raise UnweaveError(f"image {start} of {self.source.name} is needed again, and an iterator is read once.")
        self.bad = BadImages(self.source.name, self.config.max_bad, bad)
        self.epoch, self._done = 0, start
        self._seek(0, start, stop)

    @property
    def place(self) -> int:
        """Where in the epoch's order it goes on: behind the last image served, or, with none left, where they end."""
        if self._exhausted and not self._ready and self._stop is not None:
            return self._stop if self.n_places is None else min(self._stop, self.n_places)
        return self._done

    @property
    def n_places(self) -> int | None:
        """Images of an epoch, bad ones and those of both sides; None of a stream that was not read to its end."""
        return self._order.n_places

    def example(self) -> ImageBatch:
        """An image like those to come, of what shapes and types depend on: a blank one, or the first ready input."""
        return self._batch([_Row(self._preparation.example(self.source.first), 0, 0, 0)])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved.

        Raises:
            UnweaveError: It was saved for other data, another config or another processor.
        """
        for name, value in self._identity().items():
            if state["data"][name] != value:
                was = state["data"][name]
                raise UnweaveError(f"the saved position is of other data: {name} was {was!r} and is now {value!r}.")
        self.bad = BadImages(self.source.name, self.config.max_bad, state["bad"])
        self.epoch, self._done = state["epoch"], state["done"]
        self._seek(self.epoch, self._done)

    @property
    def fingerprint(self) -> str:
        """Hash of the images and of what is done to them, to notice that either changed."""
        return digest([self.source.fingerprint, self._processor])

    def _identity(self) -> dict[str, Any]:
        settings = asdict(self.config)
        del settings["workers"]
        return settings | {
            "fingerprint": self.source.fingerprint, "side": self.held_out, "processor": self._processor,
        }  # fmt: skip

    def _scores(self) -> Iterator[tuple[int, int]]:
        """Score and size of every image that can be read at all."""
        assert self.source.entry is not None
        for i in range(len(self.source)):
            try:
                content = self.source.entry(i).content
            except UNREADABLE:
                continue  # named and counted when its turn comes
            yield held_out_score(content), 1

    # Reading ahead: jobs in the order of the epoch, and their results taken from the front.

    def _seek(self, epoch: int, start: int, stop: int | None = None) -> None:
        self._ready: deque[_Row] = deque()
        self._jobs: deque[tuple[int, int, int, Future[_Outcome] | Callable[[], _Outcome]]] = deque()
        self._reading, self._stop, self._exhausted = epoch, stop, False
        self._found = start > 0 or stop is not None  # a part may be empty
        self._plan = self._order.between(epoch, start, stop)

    def _read_more(self) -> bool:
        """Take one result, and hand out jobs so that threads stay busy; False at the end of all."""
        while not self._exhausted and len(self._jobs) < max(1, 4 * self.config.workers):
            following = next(self._plan, None)
            if following is None:
                if self._jobs:
                    break  # whether there is another epoch depends on what they find
                if not self._end_epoch():
                    break
                continue
            behind, number, get = following
            self._jobs.append((self._reading, behind, number, self._start(number, get)))
        if not self._jobs:
            return False
        epoch, behind, number, job = self._jobs.popleft()
        outcome = job.result() if isinstance(job, Future) else job()
        self._keep(number, outcome)
        self.source.register(number, outcome.name or f"image {number}", outcome.label)
        if outcome.bad is not None:
            self.bad.note(outcome.name or self.source.names[number], outcome.bad)
        elif outcome.prepared is not None:
            self._found = True
            self._ready.append(_Row(outcome.prepared, number, epoch, behind))
        return True

    def _start(self, number: int, get: Callable[[], Entry]) -> Future[_Outcome] | Callable[[], _Outcome]:
        if number in self._kept:
            return partial(self._kept.__getitem__, number)
        return partial(self._run, get) if self._pool is None else self._pool.submit(self._run, get)

    def _keep(self, number: int, outcome: _Outcome) -> None:
        if not self.repeat or number in self._kept:
            return
        n_bytes = 0 if outcome.prepared is None else outcome.prepared.n_bytes
        if self._n_kept_bytes + n_bytes <= _KEPT_BYTES:
            self._n_kept_bytes += n_bytes
            self._kept[number] = outcome

    def _end_epoch(self) -> bool:
        """Begin the next epoch if there is one."""
        if not self._found:
            raise self.nothing(f", in epoch {self._reading}: it cannot be read twice" if self._reading else "")
        if not self.repeat or self._stop is not None:
            self._exhausted = True
            return False
        self._reading += 1
        self._found = False
        self._plan = self._order.between(self._reading, 0)
        return True

    def nothing(self, why: str = "") -> UnweaveError:
        """That there are no images on this side of the split."""
        side = "held-out" if self.held_out else "training"
        why = why or (f"; {len(self.bad)} could not be read" if self.bad else "")
        return UnweaveError(f"the {side} part of {self.source.name} holds no images{why}.")

    def _run(self, get: Callable[[], Entry]) -> _Outcome:
        """Get, hash and prepare one image; in a thread."""
        name, label = "", None
        try:
            entry = get()
            name, label = entry.name, entry.label
            if self.config.held_out and (held_out_score(entry.content) < self._cutoff) != self.held_out:
                return _Outcome(name, label)
            return _Outcome(name, label, self._preparation.prepare(entry))
        except UnweaveError:
            raise
        except UNREADABLE as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            return _Outcome(name, label, bad=reason)

    def _batch(self, rows: list[_Row]) -> ImageBatch:
        if not rows:
            none = torch.empty(0, self._context, dtype=torch.bool)
            return ImageBatch({}, none, none.long(), none.to(torch.uint8))
        prepared = [row.prepared for row in rows]
        pixels = {name: torch.stack([p.inputs[name] for p in prepared]) for name in prepared[0].inputs}
        real = torch.stack([p.real for p in prepared])
        if 0 < self._context < real.shape[1]:
            raise UnweaveError(f"input {rows[0].number} has {real.shape[1]} tokens, and the first one {self._context}.")
        numbers = torch.tensor([row.number for row in rows])[:, None].expand(real.shape)
        labels = [p.labels for p in prepared if p.labels is not None]
        return ImageBatch(
            pixels=pixels,
            real=real,
            documents=numbers.masked_fill(~real, -1),
            kinds=torch.stack([p.kinds for p in prepared]),
            labels=torch.stack(labels) if labels else None,
            options=self._options(pixels["pixel_values"]),
        )

    def _options(self, pixels: Tensor) -> tuple[tuple[str, Any], ...]:
        layout = self._preparation.layout
        if layout.sizes == "interpolated" and tuple(pixels.shape[2:]) != layout.image:
            return (("interpolate_pos_encoding", True),)
        return ()
