"""The standard library as text, where it lies elsewhere than in a folder, or in one that is not all readable."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from unweave.activations import standard_library_text

CODE = "# " + "words " * 100


def test_without_a_folder_there_are_the_help_topics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    texts = list(standard_library_text())
    assert len(texts) > 30
    assert all(len(text) >= 200 for text in texts)


def test_a_folder_that_cannot_be_read_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    topics = len(list(standard_library_text()))
    for name in ("b/c.py", "b.py", "secret/d.py", "a.py", "site-packages/e.py", "b/test/f.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{CODE}{name}")
    listed = os.scandir

    def refused(folder: Any) -> Any:
        if Path(folder).name == "secret":
            raise PermissionError(13, "Permission denied", folder)
        return listed(folder)

    monkeypatch.setattr(os, "scandir", refused)
    assert [text.rpartition(" ")[2] for text in standard_library_text()][topics:] == ["a.py", "b/c.py", "b.py"]
