"""Hints at what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from unweave._errors import nearest_beside


def test_what_is_beside_a_missing_path_is_compared_by_its_last_part(tmp_path: Path) -> None:
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki.txt").touch()
    folder, file = str(tmp_path / "wiki"), str(tmp_path / "wiki.txt")
    assert nearest_beside(tmp_path / "wikki") == f"; did you mean {folder!r} or {file!r}?"
    assert nearest_beside(tmp_path / "wikki", folders=True) == f"; did you mean {folder!r}?"
    assert nearest_beside(tmp_path / "something else") == ""  # however long the part that both paths have


@pytest.mark.parametrize("path", ["nowhere/at/dmeo", "dmeo"])
def test_names_that_are_no_paths_are_near_too(path: str, tmp_path: Path) -> None:
    assert nearest_beside(tmp_path / path, ["demo", "other"]) == "; did you mean 'demo'?"
