"""What tests of the hub share; the hub itself is in `server.py`, and the fixture `hub` in the conftest above."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def without_token(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
