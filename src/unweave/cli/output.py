"""What commands show while they work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LINE_SECONDS = 10.0


@contextmanager
def status(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, a line every ten seconds elsewhere; yields `tick(done, total)`, which moves it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        print(label, file=sys.stderr)
        yield _lines(label)
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(label: str) -> Callable[[int, int], None]:
    """Prints how far it is and the time left, counted from the first tick: a resumed run begins with a part done."""
    started: tuple[float, int] | None = None
    printed = time.monotonic()

    def tick(done: int, total: int) -> None:
        nonlocal started, printed
        now = time.monotonic()
        if started is None:
            started = now, done
        if now - printed < LINE_SECONDS or done == started[1]:
            return
        printed = now
        left = (now - started[0]) / (done - started[1]) * (total - done)
        print(f"{label}: {done / total:.0%} of {total:,}, {left:.0f} s left", file=sys.stderr)

    return tick


def shown(metavar: str, default: str | None = None) -> Any:
    """How the help shows an option that is None unless given: its kind of value, and what leaving it out means."""
    import tyro

    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "")
