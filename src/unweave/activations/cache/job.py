"""Running a model over rows and writing what it gives, shard by shard, by one process of one or more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unweave.activations.cache.format import shard_folder, slugs
from unweave.activations.cache.rows import FewRows
from unweave.activations.cache.shards import ShardWriter, check_space, new_shard, read_shard, size_below
from unweave.activations.live import ActivationStream
from unweave.activations.masks import MaskConfig, kept_positions
from unweave.activations.rows import Rows
from unweave.activations.tokenized.format import SIDES, Side
from unweave.models import TOKEN_KINDS, Hook, LoadedModel


@dataclass
class Job:
    """What one process does.

    Attributes:
        out: Folder of the cache.
        model: The model.
        dtype: What it runs in; None: as it is.
        places: The hooks.
        made_from: What the manifest says.
        wanted: Tokens to store, by side.
        rank: Writes the shards `rank`, `rank + world`, ...
        world: Number of processes.
        progress: Called with the tokens passed and those to store.
    """

    out: Path
    model: LoadedModel
    dtype: torch.dtype | None
    places: list[Hook]
    made_from: dict[str, Any]
    wanted: Mapping[Side, int]
    rank: int
    world: int
    progress: Callable[[int, int], None] | None

    def __post_init__(self) -> None:
        self._slugs = slugs([str(hook) for hook in self.places])
        self._passed = 0
        self._running = self.model

    def run(self, sides: Mapping[Side, Rows]) -> dict[Side, int] | None:
        """Write this process's shards of each side, and return the number of tokens that each side has, if known."""
        totals: dict[Side, int] = dict.fromkeys(SIDES, 0)
        for side, rows in sides.items():
            if not self.wanted[side] or not len(rows.peek(1)):
                continue
            passes, number = self._passes_per_shard(rows), 0
            while totals[side] < self.wanted[side]:
                done = read_shard(self.out / shard_folder(side, number))
                if done is None and not len(rows.peek(1)):
                    break
                chunk = FewRows(rows, passes * self.made_from["prompts_per_pass"])
                totals[side] += self._shard(side, number, chunk, self.wanted[side] - totals[side], done)
                number += 1
        return totals

    def _shard(self, side: Side, number: int, rows: FewRows, limit: int, done: dict[str, Any] | None) -> int:
        """Write a shard, or pass over it, and return its number of tokens."""
        folder = self.out / shard_folder(side, number)
        if done is not None:
            self._pass_over(FewRows(rows, done["prompts"]))
            return self._report(done["rows"])
        if number % self.world != self.rank:
            return self._report(min(self._pass_over(rows), limit))
        with new_shard(folder, self._slugs, self.made_from["dtype"]) as shard:
            self._fill(shard, rows, limit)
            shard.finish({"prompts": rows.taken})
        return shard.rows

    def _pass_over(self, rows: FewRows) -> int:
        """Leave rows to other processes, and return the number of their tokens."""
        kept, n = kept_positions(self.made_from["positions"], rows.context), 0
        while rows.left and len(batch := rows.next_rows(self.made_from["prompts_per_pass"])):
            n += int((batch.real & kept[: batch.real.shape[1]]).sum())
        return n

    def _fill(self, shard: ShardWriter, rows: Rows, limit: int) -> None:
        stream = self._stream(rows)
        while shard.rows < limit:
            try:
                done = stream.next_pass()
            except StopIteration:
                return
            n = min(len(done.records["positions"]), limit - shard.rows)
            shard.append(done, n)
            self._report(n)

    def _stream(self, rows: Rows) -> ActivationStream:
        """All real tokens at the positions that are kept."""
        everything = MaskConfig(
            special_tokens=False, token_kinds=TOKEN_KINDS, positions=self.made_from["positions"], norm_multiple=None
        )
        n = self.made_from["prompts_per_pass"]
        return ActivationStream(self._running, self.places, rows, everything, n, dtype=self.dtype)

    def _report(self, n: int) -> int:
        self._passed += n
        if self.progress is not None:
            self.progress(self._passed, sum(self.wanted.values()))
        return n

    def _passes_per_shard(self, rows: Rows) -> int:
        """How many passes fill a shard; refuses what the disk cannot hold."""
        item = {"float32": 4, "int8": 1}.get(self.made_from["dtype"], 2)
        per_hook = 4 if self.made_from["dtype"] != "int8" else 8
        names = rows.peek(1).records()
        stream = self._stream(rows)
        stream.prepare()
        self._running = stream.model  # in its type: what comes from here on is not copied again
        widths = stream.widths().values()
        per_token = sum(width * item + per_hook for width in widths) + 8 * len(names)
        check_space(self.out, sum(self.wanted.values()) * per_token - size_below(self.out))
        kept = int(kept_positions(self.made_from["positions"], rows.context).sum())
        return max(1, self.made_from["shard_bytes"] // (self.made_from["prompts_per_pass"] * kept * per_token))
