"""The one exception that says: the input was wrong, and here is what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UnweaveError(ValueError):
    """Bad input. The message is one clear sentence; the command line prints it and exits with status 2."""


def nearest(name: str, valid: Iterable[str], *, n: int = 3, cutoff: float = 0.5) -> str:
    """The valid names closest to `name`, as the end of a sentence: `; did you mean 'x' or 'y'?` or an empty string.

    Names count as close from a similarity of `cutoff` on, out of 1; upper and lower case count as the same.
    """
    return _nearest(name, {each: each for each in valid}, n, cutoff)


def _nearest(name: str, shown: dict[str, str], n: int = 3, cutoff: float = 0.5) -> str:
    plain = {each.lower(): written for each, written in shown.items()}
    found = [plain[each] for each in difflib.get_close_matches(name.lower(), plain, n=n, cutoff=cutoff)]
    return f"; did you mean {' or '.join(repr(f) for f in found)}?" if found else ""


def nearest_beside(path: Path, names: Iterable[str] = (), *, folders: bool = False) -> str:
    """What lies beside a path that is not there under a close name, as the end of a sentence: see `nearest`.

    Last parts are compared, since two long paths are alike whatever their ends are; what is named is a path again.

    Args:
        path: What is not there.
        names: Other names that could have been meant, which are no paths.
        folders: Leave files out.
    """
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    paths = {each.name: str(each) for each in beside if not folders or each.is_dir()}
    return _nearest(path.name, {each: each for each in names} | paths)
