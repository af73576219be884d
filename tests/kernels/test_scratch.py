"""Memory that is used again, and what is too large to be kept for it."""

from __future__ import annotations

import torch

from unweave.kernels import scratch


def test_what_is_small_is_kept_and_what_is_large_is_not(monkeypatch):
    monkeypatch.setattr(scratch._pool, "buffers", {})
    monkeypatch.setattr(scratch, "_LARGEST_KEPT", 400)
    first = scratch.scratch_if_small("some", (10, 10))
    assert scratch.scratch_if_small("some", (5, 5), torch.float64).data_ptr() == first.data_ptr()
    assert scratch.scratch_sizes() == {"some": 400}
    large = scratch.scratch_if_small("other", (101,))
    assert (large.shape, large.dtype) == ((101,), torch.float32)
    assert scratch.scratch_sizes() == {"some": 400}
    kept = scratch.scratch("other", (200,))  # what is there is taken, however large
    assert scratch.scratch_if_small("other", (101,)).data_ptr() == kept.data_ptr()
