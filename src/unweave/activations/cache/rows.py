"""The rows that a cache is made from: written into its token folder first, and read from there in order."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations.masks import kept_positions
from unweave.activations.rows import Batch, Rows
from unweave.activations.tokenized.folder import TokenFolder
from unweave.activations.tokenized.format import Side
from unweave.activations.tokenized.writer import TokenWriter
from unweave.activations.tokens import TokenBatch, TokenRows

_ROWS = 256


def write_tokens(
    folder: Path,
    sides: Mapping[Side, Callable[[], TokenRows]],
    wanted: Mapping[Side, int],
    fewer: Mapping[Side, bool],
    positions: str | Sequence[int] | None,
    about: Mapping[str, Any],
    name: str,
) -> None:
    """Write the rows that hold the first tokens of each side.

    Args:
        folder: The token folder to make.
        sides: Opens the rows of a side.
        wanted: How many tokens of each side to store, at the positions that are kept.
        fewer: Whether a side may hold fewer.
        positions: Which positions are kept.
        about: What the folder's manifest says of the tokenizer and the settings.
        name: Of the temporary folder: another for each process that may do the same at the same time.

    Raises:
        UnweaveError: The data end before so many tokens.
    """
    temporary = folder.with_name(f".{name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write_sides(temporary, {side: sides[side] for side, n in wanted.items() if n}, wanted, fewer, positions, about)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has written the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_sides(
    folder: Path,
    sides: Mapping[Side, Callable[[], TokenRows]],
    wanted: Mapping[Side, int],
    fewer: Mapping[Side, bool],
    positions: str | Sequence[int] | None,
    about: Mapping[str, Any],
) -> None:
    opened = {side: open_rows() for side, open_rows in sides.items()}
    first = next(iter(opened.values()))
    size = about["tokenizer"]["vocab_size"] if about["tokenizer"] else None
    with TokenWriter(folder, context=first.context, vocab_size=size, about=about) as writer:
        for side, rows in opened.items():
            try:
                total = _append(writer, side, rows, wanted[side], kept_positions(positions, rows.context))
            except UnweaveError as error:
                if side == "train":
                    raise
                raise UnweaveError(f"{str(error).rstrip('.')}; with held_out_tokens=0 none of it is stored.") from error
            if total < wanted[side] and not (fewer[side] and total):
                which = "training" if side == "train" else "held-out"
                raise UnweaveError(
                    f"the {which} documents of {rows.source.name} end after {total:,} of {wanted[side]:,} tokens: ask "
                    "for fewer, or pass allow_fewer to store what there is."
                )
        writer.finish({"begin": first.begin, "separator": first.separator})


def _append(writer: TokenWriter, side: Side, rows: TokenRows, wanted: int, kept: Bool[Tensor, " context"]) -> int:
    """Write rows until they hold the tokens wanted, and return how many they hold."""
    total = 0
    while total < wanted and len(batch := rows.next_rows(_ROWS)):
        counts = (batch.real & kept).sum(1).cumsum(0)
        n = min(int((counts < wanted - total).sum()) + 1, len(batch))
        writer.append(side, batch.ids[:n].numpy(), batch.documents[:n].numpy())
        total += int(counts[n - 1])
    return total


class FolderRows:
    """The rows of one side of a token folder, in the order in which they were written."""

    def __init__(self, folder: TokenFolder, side: Side) -> None:
        self._folder, self._side, self._start = folder, side, 0

    @property
    def context(self) -> int:
        return self._folder.context

    def next_rows(self, n: int) -> TokenBatch:
        batch = self.peek(n)
        self._start += len(batch)
        return batch

    def peek(self, n: int) -> TokenBatch:
        ids, documents = map(torch.from_numpy, self._folder.rows(self._side, self._start, self._start + n))
        return TokenBatch(ids, documents >= 0, documents)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start = state["start"]


class FewRows:
    """The next rows of others, up to a number of them."""

    def __init__(self, rows: Rows, n: int) -> None:
        self._rows, self.left, self.taken = rows, n, 0

    @property
    def context(self) -> int:
        return self._rows.context

    def next_rows(self, n: int) -> Batch:
        batch = self._rows.next_rows(min(n, self.left))
        self.left -= len(batch)
        self.taken += len(batch)
        return batch

    def peek(self, n: int) -> Batch:
        return self._rows.peek(min(n, self.left))

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows.state_dict(), "left": self.left, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows.load_state_dict(state["rows"])
        self.left, self.taken = state["left"], state["taken"]


def are_rows(data: Any) -> bool:
    """Whether data are rows that are laid out already."""
    return all(hasattr(data, name) for name in ("next_rows", "peek", "context"))
