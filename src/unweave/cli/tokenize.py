"""`unweave tokenize`: text, tokenised once, as a folder that everything else takes in its place."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from unweave._errors import UnweaveError
from unweave.cli.output import shown

if TYPE_CHECKING:
    from unweave.activations.tokenized.folder import TokenFolder
    from unweave.activations.tokenized.tokenize import TokenizeProgress

LINE_SECONDS = 10.0
SHOWN = 10


@dataclass
class TokenizeArgs:
    """Tokenise text into packed rows of tokens, in a folder that --data takes in the text's place.

    What is killed goes on with --resume, and ends in the same bytes.
    """

    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], shown("PATH ...", "stdlib")] = ("stdlib",)
    """"stdlib", .txt, .jsonl, .parquet or .npy files, folders of them, or one Hugging Face dataset."""
    out: Annotated[Path, shown("FOLDER", "unweave-tokens")] = Path("unweave-tokens")
    """The folder to write."""
    context: int = 128
    """Tokens in a row."""
    model: Annotated[str, shown("NAME", "demo")] = "demo"
    """Whose tokenizer to use: "demo", a Hugging Face name, or a local folder."""
    column: Annotated[str | None, shown("NAME", "found by its usual names")] = None
    """Text column of .jsonl, .parquet and Hugging Face data."""
    subset: Annotated[str | None, shown("NAME", "none")] = None
    """Configuration of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    streaming: bool = False
    """Read a Hugging Face dataset over the network instead of downloading it first."""
    chat: bool = False
    """Documents are lists of messages, laid out by the tokenizer's chat template."""
    pack: Annotated[bool, shown("", "documents lie end to end")] = True
    """Give each document a row of its own, cut or padded."""
    bos: Annotated[bool, shown("", "one in front of each")] = True
    """Leave out the beginning-of-sequence token in front of documents."""
    separator: Annotated[str | None, shown("TOKEN", "none")] = None
    """Token between packed documents: bos, eos, sep, or any token of the vocabulary."""
    held_out: float = 0.05
    """Share of the documents kept from training."""
    processes: int = 1
    """Processes to tokenise in. 1: the tokenizer uses threads instead, if it is a fast one."""
    max_bad: int = 100
    """Documents that may be skipped because they cannot be read."""
    resume: bool = False
    """Go on with the unfinished folder --out."""
    saelens: Annotated[Path | None, shown("FOLDER", "none")] = None
    """Also write the training rows as a pretokenised dataset of SAELens."""

    def run(self) -> None:
        from unweave.activations import DataConfig
        from unweave.activations.tokenized.saelens import save_saelens
        from unweave.activations.tokenized.tokenize import tokenize

        if self.saelens is not None and self.saelens.exists():
            raise UnweaveError(f"{self.saelens} exists already: choose another folder for --saelens.")
        config = DataConfig(
            context=self.context, pack=self.pack, bos=self.bos, separator=self.separator, chat=self.chat,
            column=self.column, subset=self.subset, split=self.split, streaming=self.streaming, held_out=self.held_out,
        )  # fmt: skip
        data = self.paths[0] if len(self.paths) == 1 else [Path(path) for path in self.paths]
        try:
            with progress_of(f"tokenising {', '.join(self.paths)}") as tick:
                folder = tokenize(
                    data, self.out, model=self.model, config=config, processes=self.processes, resume=self.resume,
                    max_bad=self.max_bad, progress=tick,
                )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; go on with --resume --out {self.out}.") from None
        report(folder)
        if self.saelens is not None:
            print(f"saved {save_saelens(folder, self.saelens)}")


def report(folder: TokenFolder) -> None:
    """What was written, and on stderr what was left out."""
    if folder.skipped:
        print(f"skipped {len(folder.skipped)} documents that cannot be read:", file=sys.stderr)
        for reason in folder.skipped[:SHOWN]:
            print(f"  {reason}", file=sys.stderr)
        if len(folder.skipped) > SHOWN:
            print(f"  and {len(folder.skipped) - SHOWN} more, in {folder.path / 'manifest.json'}", file=sys.stderr)
    rows, held_out = folder.n_rows("train"), folder.n_rows("held_out")
    size = f"{rows:,} rows of {folder.context} tokens for training, {held_out:,} held out"
    print(f"saved {folder.path}: {size}, {(rows + held_out) * folder.context:,} tokens")


@contextmanager
def progress_of(label: str) -> Iterator[Callable[[TokenizeProgress], None]]:
    """A bar on a terminal, a line every ten seconds elsewhere: part of the data, tokens, speed, and time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console, clock = Console(stderr=True, highlight=False), _Clock()
    if not console.is_terminal:
        print(label, file=sys.stderr)
        shown_at = time.monotonic()

        def line(now: TokenizeProgress) -> None:
            nonlocal shown_at
            text = clock(now)
            if time.monotonic() - shown_at >= LINE_SECONDS:
                shown_at = time.monotonic()
                print(text, file=sys.stderr)

        yield line
        return
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None, said="")
        yield lambda now: bar.update(task, completed=now.part, total=now.parts, said=clock(now))


class _Clock:
    """Speed and time left, counted from the first progress that it is shown."""

    def __init__(self) -> None:
        self._first: tuple[float, TokenizeProgress] | None = None

    def __call__(self, now: TokenizeProgress) -> str:
        if self._first is None:
            self._first = time.monotonic(), now
        started, first = self._first
        seconds = time.monotonic() - started
        said = f"{now.part}/{now.parts} parts, {now.documents:,} documents, {now.tokens:,} tokens"
        if seconds > 0:
            said += f", {(now.tokens - first.tokens) / seconds:,.0f} tokens/s"
        if now.part > first.part:
            left = seconds / (now.part - first.part) * (now.parts - now.part)
            said += f", {left:.0f} s left"
        return said + (f", {now.skipped} skipped" if now.skipped else "")
