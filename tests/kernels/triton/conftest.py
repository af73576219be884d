"""These tests run the kernels: on the GPU where there is one, else in Triton's interpreter.

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
def _guarded(monkeypatch):
    """Whatever a kernel is to fill starts as garbage, between margins that it must leave as they are."""
    garbage, margin, buffers = 0xA5, 1 << 12, []

    def new_empty(self, *size, dtype=None, device=None):
        shape = torch.Size(size[0] if isinstance(size[0], tuple) else size)
        dtype = dtype or self.dtype
        length = shape.numel() * dtype.itemsize
        buffer = torch.full((length + 2 * margin,), garbage, dtype=torch.uint8, device=device or self.device)
        buffers.append((buffer, margin + length))
        return buffer[margin : margin + length].view(dtype).view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for buffer, end in buffers:
        assert (buffer[:margin] == garbage).all(), "a kernel wrote before its output"
        assert (buffer[end:] == garbage).all(), "a kernel wrote beyond its output"


@pytest.fixture(scope="session")
def csr(device):
    """Codes of a dense tensor, as (indices, values, offsets) on the device."""

    def of_dense(dense):
        rows, indices = dense.nonzero(as_tuple=True)
        offsets = torch.nn.functional.pad(rows.bincount(minlength=len(dense)).cumsum(0), (1, 0))
        return indices.to(device), dense[rows, indices].float().to(device), offsets.to(device)

    return of_dense


@pytest.fixture(scope="session")
def random_codes():
    """Dense codes of which a share is not 0."""

    def draw(n, m, density):
        return torch.randn(n, m).masked_fill_(torch.rand(n, m) >= density, 0)

    return draw


@pytest.fixture(scope="session")
def close():
    """Compares with a float64 reference."""

    def compare(actual, expected, tolerance=1e-5):
        torch.testing.assert_close(actual.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance)

    return compare
