"""What holds for every test: a seed, one thread, no network, and nothing left behind in the user's caches."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch, transformers or datasets are imported.
_cache = tempfile.mkdtemp(prefix="unweave-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tests that use more threads than there are cores
os.environ |= {"HF_HOME": _cache, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

SLOW_TIMEOUT = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An empty hub on localhost, and huggingface_hub's client pointed at it, with a token and a cache of its own."""
    name = "unweave_test_hub"
    if name not in sys.modules:  # tests are no package
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "hub" / "server.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    server = sys.modules[name]
    with server.serving() as made:
        made.cache = tmp_path / "hf" / "hub"
        server.connect(made, monkeypatch)
        yield made


@pytest.fixture(scope="session")
def chromium() -> Path:
    """A headless browser. Where CI asks for one (`UNWEAVE_BROWSER=required`), its absence is a failure."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return Path(path)
    if os.environ.get("UNWEAVE_BROWSER") == "required":
        pytest.fail("no Chromium found")
    pytest.skip("no Chromium found")
