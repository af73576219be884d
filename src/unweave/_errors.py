"""The one exception that says: the input was wrong, and here is what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnweaveError(ValueError):
    """Bad input. The message is one clear sentence; the command line prints it and exits with status 2."""


def nearest(name: str, valid: Iterable[str], *, n: int = 3) -> str:
    """The valid names closest to `name`, as the end of a sentence: `; did you mean 'x' or 'y'?` or an empty string."""
    found = difflib.get_close_matches(name, list(valid), n=n, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(f) for f in found)}?" if found else ""
