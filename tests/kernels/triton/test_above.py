"""Everything above a vector of bounds, in a fixed room."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.kernels.triton import above, gather_sum, pack

DTYPES = [torch.float32, torch.bfloat16]


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 4),
    m=st.integers(1, 20),
    capacity=st.integers(1, 25),
    dtype=st.sampled_from(DTYPES),
    ties=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_keeps_the_first_that_are_strictly_above(device, n, m, capacity, dtype, ties, seed):
    torch.manual_seed(seed)
    pre, bounds = torch.randn(n, m).to(dtype), torch.randn(m)
    if ties:
        pre, bounds = pre.round(), bounds.round()
    kept = above(pre.to(device), bounds.to(device), capacity)
    hits = [row.nonzero().flatten().tolist() for row in pre.float() > bounds]
    assert kept.counts.tolist() == [len(hit) for hit in hits]
    assert kept.indices.tolist() == [(hit + [-1] * capacity)[:capacity] for hit in hits]
    values = [([float(pre[i, j]) for j in hit] + [0.0] * capacity)[:capacity] for i, hit in enumerate(hits)]
    assert kept.values.tolist() == values
    assert bool(kept.overflow) == any(len(hit) > capacity for hit in hits)

    indices, packed, offsets = pack(kept)
    counts = [min(len(hit), capacity) for hit in hits]
    assert offsets.diff().tolist() == counts
    filled = sum(counts)
    assert indices.tolist() == [j for hit in hits for j in hit[:capacity]] + [-1] * (n * capacity - filled)
    assert packed.tolist() == [v for row, c in zip(values, counts, strict=True) for v in row[:c]] + [0.0] * (
        n * capacity - filled
    )


def test_rows_wider_than_a_tile(device):
    pre = torch.randn(2, 9001)
    bounds = torch.full((9001,), 0.5)
    kept = above(pre.to(device), bounds.to(device), 6000)
    for i in range(2):
        hits = (pre[i] > 0.5).nonzero().flatten().tolist()
        assert kept.indices[i, : len(hits)].tolist() == hits
        assert (kept.indices[i, len(hits) :] == -1).all()


def test_a_view_with_gaps_between_rows(device):
    pre, bounds = torch.randn(3, 50, device=device)[:, 10:31], torch.zeros(21, device=device)
    assert above(pre, bounds, 21).indices.tolist() == above(pre.contiguous(), bounds, 21).indices.tolist()


def test_what_was_packed_can_be_decoded(device, close):
    pre, weight = torch.randn(5, 12), torch.randn(12, 7)
    kept = above(pre.to(device), torch.zeros(12, device=device), 12)
    close(gather_sum(*pack(kept), weight.to(device)), pre.double().relu() @ weight.double())


def test_nan_is_seen(device):
    pre = torch.tensor([[-1.0, torch.nan, 0.5]], device=device)
    kept = above(pre, torch.zeros(3, device=device), 4)
    assert kept.indices.tolist() == [[1, 2, -1, -1]]
    assert kept.values[0, 0].isnan()


def test_wrong_arguments_are_named(device):
    pre = torch.randn(2, 6, device=device)
    with pytest.raises(UnweaveError, match=r"^above: capacity must be positive, got 0"):
        above(pre, pre[0], 0)
    with pytest.raises(UnweaveError, match=r"^above: bounds must have shape \(m=6\), got \(5,\)"):
        above(pre, pre[0, :5], 2)
