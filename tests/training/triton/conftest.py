"""These tests train on the kernels for GPUs: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so `tests/kernels/test_triton.py` starts it in a process of
its own. Without it and without a GPU nothing is collected here.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNNABLE = importlib.util.find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())

collect_ignore_glob = [] if RUNNABLE else ["test_*.py"]


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _on_their_kernels(monkeypatch):
    monkeypatch.setenv("UNWEAVE_KERNELS", "cuda")
