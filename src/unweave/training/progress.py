"""What a user sees while an SAE trains: one live line on a terminal, plain lines elsewhere.

`Progress` prints to standard error, so that standard output stays free for results.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_EVERY_SECONDS = 10.0


def say(text: str) -> None:
    """A line on standard error."""
    sys.stderr.write(text + "\n")


class Progress:
    """Shows tokens, loss, L0, explained variance, dead latents, speed and time left.

    Args:
        total: Tokens of the run.
        done: Tokens that were trained on before (a resumed run).
        label: A word in front.
        show: False shows nothing.
    """

    def __init__(self, total: int, done: int = 0, label: str = "train", show: bool = True) -> None:
        self.total, self.label, self.show = total, label, show
        self._first, self._start, self._last_plain = done, time.perf_counter(), float("-inf")
        self._bar: Any = None
        if not show:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True, highlight=False)
        if self.console.is_terminal:
            columns = [
                TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(compact=True),
            ]  # fmt: skip
            self._bar = Progress(*columns, console=self.console, expand=True, transient=False)
            self._task = self._bar.add_task(label, total=total, completed=done, state="starting")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, tokens: int, rows: list[dict[str, Any]] | None = None) -> None:
        """Show that `tokens` are done; `rows` are the latest logged rows, one for each SAE."""
        if not self.show:
            return
        elapsed = time.perf_counter() - self._start
        rate = (tokens - self._first) / elapsed if elapsed > 0 else 0.0
        if self._bar is not None:
            fields = {"state": self._state(rows, rate)} if rows else {}
            self._bar.update(self._task, completed=tokens, **fields)
        elif rows and (elapsed - self._last_plain >= PLAIN_EVERY_SECONDS or tokens >= self.total):
            self._last_plain = elapsed
            left = (self.total - tokens) / rate if rate else 0.0
            share = f"{tokens / self.total:4.0%} of {self.total:,} tokens"
            self.console.print(f"{self.label}: {share}  {self._state(rows, rate)}  {left:.0f} s left", soft_wrap=True)

    def _state(self, rows: list[dict[str, Any]] | None, rate: float) -> str:
        if not rows:
            return ""
        row = max(rows, key=lambda r: r["loss"]) if len(rows) > 1 else rows[0]
        which = f"worst of {len(rows)}: " if len(rows) > 1 else ""
        ev = "none" if row["explained_variance"] is None else f"{row['explained_variance']:.3f}"
        return f"{which}loss {row['loss']:.4g}  L0 {row['l0']:.1f}  EV {ev}  dead {row['dead']:.1%}  {rate:,.0f} tok/s"

    def say(self, message: str) -> None:
        """Print a line above the progress."""
        if self.show:
            (self._bar.console if self._bar is not None else self.console).print(message, soft_wrap=True)
