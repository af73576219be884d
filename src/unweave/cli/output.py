"""What commands show while they work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def status(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, a single line elsewhere; yields `tick(done, total)`, which moves it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        print(label, file=sys.stderr)
        yield lambda done, total: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def shown(metavar: str, default: str | None = None) -> Any:
    """How the help shows an option that is None unless given: its kind of value, and what leaving it out means."""
    import tyro

    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "")
