"""Running a vision model over images: processes share the shards out among themselves, and decode nobody else's images.

A shard has the images between two places of the first epoch's order, whatever becomes of them: those that cannot be
read, and those of the other side of the held-out split, count as well. So a process knows where each shard begins
without having read any other. How many rows a shard has is known when it is written, and said in its `shard.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from unweave._errors import UnweaveError
from unweave._files import claimed, remove_leftovers
from unweave.activations.cache.format import shard_folder
from unweave.activations.cache.job import Job
from unweave.activations.cache.shards import new_shard, read_shard
from unweave.activations.images import ImageBatch, ImageRows
from unweave.activations.images.bad import BadImages
from unweave.activations.masks import kept_positions
from unweave.activations.tokenized.format import SIDES, Side


class ImageJob(Job):
    """What one process does, of one or more that may begin, end and die at any time.

    Each takes the first shard that nobody writes, as long as its last row is known to be wanted: a shard that others
    are still writing may turn out to have any number of rows, up to those of images that are all good. So only the last
    shards wait for those before them, and are written by whoever is there then.
    """

    def run(self, sides: Mapping[Side, ImageRows]) -> dict[Side, int] | None:  # type: ignore[override]
        """Write shards of each side, and return the tokens that each side has; None if others are still writing.

        Raises:
            UnweaveError: A side has no images; more images than may be are unreadable, those that other processes met
                included; shards of an earlier version.
        """
        self._rows = {side: rows for side, rows in sides.items() if self.wanted[side]}
        self._shards: dict[Side, dict[int, dict[str, Any]]] = {side: {} for side in SIDES}
        self._length, self._most = dict[Side, int](), dict[Side, int]()
        for side, rows in self._rows.items():
            self._lay_out(side, rows)
        while True:
            self._claimed = False
            found = {side: self._sweep(side, rows) for side, rows in self._rows.items()}
            totals = {side: total for side, total in found.items() if total is not None}
            if len(totals) == len(found):
                return dict.fromkeys(SIDES, 0) | totals
            if not self._claimed:  # otherwise others may have ended meanwhile, to whom a shard seemed to be in work
                return None

    def about_images(self) -> dict[str, Any]:
        """Name and class of each image, as far as a stream was read, and which are bad."""
        rows = self._rows["train"]
        if rows.source.stream is not None:
            n = max(shard["images"][1] for shards in self._shards.values() for shard in shards.values())
            if len(rows.source) < n:  # other processes have read them
                rows.limit_to(n, n, {})
                rows.peek(1)
            del rows.source.names[n:], (rows.source.labels or [])[n:]
        return rows.source.to_json() | {"bad": self._bad("train") | self._bad("held_out")}

    def _lay_out(self, side: Side, rows: ImageRows) -> None:
        """How many images are listed in a shard, of both sides of the split, and how many rows they have at most."""
        n = self._passes_per_shard(_Examples(rows)) * self.made_from["prompts_per_pass"]
        share = rows.config.held_out if rows.held_out else 1 - rows.config.held_out
        self._length[side] = max(1, round(n / share))
        kept = int(kept_positions(self.made_from["positions"], rows.context).sum())
        self._most[side] = self._length[side] * kept

    def _sweep(self, side: Side, rows: ImageRows) -> int | None:
        """Write what nobody else writes, and return the tokens of the side; None if some of it is not written."""
        wanted, length, most = self.wanted[side], self._length[side], self._most[side]
        number, total, exact = 0, 0, True
        while total < wanted and not _ends(rows, number * length):
            shard = self._find(side, number)
            if shard is None and (exact or total + most <= wanted):
                shard = self._claim(side, number, wanted - total)
                if shard is None and _ends(rows, number * length):
                    break
            exact &= shard is not None
            total += most if shard is None else shard["rows"]
            number += 1
            if shard is not None and shard["images"][1] < number * length:
                break  # there are no more images
        if not exact:
            return None
        rows.bad = BadImages(rows.source.name, rows.config.max_bad, self._bad(side))
        rows.bad.check()
        if not total:
            raise rows.nothing()
        return total

    def _find(self, side: Side, number: int) -> dict[str, Any] | None:
        """A shard that is finished, whoever wrote it."""
        known = self._shards[side]
        if number not in known:
            folder = self.out / shard_folder(side, number)
            if (shard := read_shard(folder)) is None:
                return None
            if "images" not in shard:
                raise UnweaveError(
                    f"the cache {str(self.out)!r} was begun by an earlier state of unweave, whose shards of images "
                    "have other borders: finish it with that one, or choose another folder with --out."
                )
            known[number] = shard
            self._report(shard["rows"])
        return known[number]

    def _claim(self, side: Side, number: int, limit: int) -> dict[str, Any] | None:
        """Write a shard, unless another process is at it, or the images of a stream turn out to have ended before."""
        folder = self.out / shard_folder(side, number)
        if self.world == 1:
            return self._write(side, number, limit)
        with claimed(folder.with_name(f".{folder.name}.lock")) as mine:
            if not mine:
                return None
            self._claimed = True
            remove_leftovers(self.out, partial(str.__eq__, folder.name))
            return self._find(side, number) or self._write(side, number, limit)

    def _write(self, side: Side, number: int, limit: int) -> dict[str, Any] | None:
        rows, start = self._rows[side], number * self._length[side]
        rows.limit_to(start, start + self._length[side], self._bad(side))
        if not len(rows.peek(1)) and _ends(rows, start):
            return None
        with new_shard(self.out / shard_folder(side, number), self._slugs, self.made_from["dtype"]) as shard:
            self._fill(shard, rows, limit)
            about = shard.finish({"images": [start, rows.place], "bad": rows.bad.new})
        self._shards[side][number] = about
        return about

    def _bad(self, side: Side) -> dict[str, str]:
        """Why images of the shards that are known cannot be read, in the order of the shards."""
        return {name: why for _, shard in sorted(self._shards[side].items()) for name, why in shard["bad"].items()}


def _ends(rows: ImageRows, place: int) -> bool:
    """Whether there is no image behind a place."""
    return rows.n_places is not None and rows.n_places <= place


class _Examples:
    """Rows that stand for others whose images are not to be decoded yet."""

    def __init__(self, rows: ImageRows) -> None:
        self.context, self._batch = rows.context, rows.example()

    def peek(self, n: int) -> ImageBatch:
        return self._batch

    next_rows = peek

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
