"""Text that every Python carries: the language reference and the standard library's sources.

Real prose and real code, present wherever Python is, so the demo and the tests need no download. It differs a
little between Python minor versions: hash what a published number depends on.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Set
from pathlib import Path

_NEVER = {"site-packages", "dist-packages", "__pycache__", "pydoc_data", "lib2to3", "config"}
_TESTS_AND_TABLES = {"test", "tests", "idle_test", "encodings"}


def standard_library_text(*, everything: bool = False, min_chars: int = 200) -> Iterator[str]:
    """Yield the language reference's topics, then the standard library's `.py` files, in a fixed order.

    Args:
        everything: Also yield the tests (about 17 MB, which some Python builds leave out) and the character tables of
            `encodings`.
        min_chars: Skip documents shorter than this many characters.

    Yields:
        One document at a time: the text of one topic, or of one source file.
    """
    from pydoc_data.topics import topics

    yield from (text for _, text in sorted(topics.items()) if len(text) >= min_chars)

    skipped = _NEVER if everything else _NEVER | _TESTS_AND_TABLES
    for path in _sources(sysconfig.get_path("stdlib"), skipped):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few tests are written in other encodings on purpose
            continue
        if len(text) >= min_chars:
            yield text


def _sources(folder: str, skipped: Set[str]) -> Iterator[Path]:
    """The `.py` files of a folder and below, by name. Skipped folders are not listed: one holds every package."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:  # of a Python that lies in a zip file, or a folder that others may not read
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in skipped:
                yield from _sources(entry.path, skipped)
        elif entry.name.endswith(".py"):
            yield Path(entry.path)
