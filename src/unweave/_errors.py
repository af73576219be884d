"""The one exception that says: the input was wrong, and here is what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnweaveError(ValueError):
    """Bad input. The message is one clear sentence; the command line prints it and exits with status 2."""


def nearest(name: str, valid: Iterable[str], *, n: int = 3, cutoff: float = 0.5) -> str:
    """The valid names closest to `name`, as the end of a sentence: `; did you mean 'x' or 'y'?` or an empty string.

    Names count as close from a similarity of `cutoff` on, out of 1; upper and lower case count as the same.
    """
    plain = {each.lower(): each for each in valid}
    found = [plain[each] for each in difflib.get_close_matches(name.lower(), plain, n=n, cutoff=cutoff)]
    return f"; did you mean {' or '.join(repr(f) for f in found)}?" if found else ""
