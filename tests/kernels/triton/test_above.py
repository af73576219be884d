"""Everything above a vector of bounds, counted and written into what all rows share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.kernels.triton import Bounds, count_above, gather_sum, write_above

DTYPES = [torch.float32, torch.bfloat16]
UNTOUCHED = -7


def hits_of(pre, bounds):
    limits = bounds.latents if bounds.slack is None else bounds.latents - bounds.sizes[:, None] * bounds.slack
    return [row.nonzero().flatten().tolist() for row in ~(pre.float() <= limits)]


def on(device, bounds):
    return Bounds(*(None if t is None else t.to(device) for t in bounds))


def write(pre, bounds, starts, room, device):
    """What `write_above` makes of two outputs, which the guard surrounds by margins."""
    indices = pre.to(device).new_empty(room, dtype=torch.int64).fill_(UNTOUCHED)
    values = pre.to(device).new_empty(room, dtype=torch.float32).fill_(UNTOUCHED)
    write_above(pre.to(device), on(device, bounds), torch.tensor(starts, dtype=torch.int64).to(device), indices, values)
    return indices.tolist(), values.tolist()


def written(pre, bounds, starts, room):
    """What `write_above` should make of them."""
    indices, values = [UNTOUCHED] * room, [float(UNTOUCHED)] * room
    for row, start, hits in zip(pre, starts, hits_of(pre, bounds), strict=True):
        for place, latent in enumerate(hits, start):
            if 0 <= place < room:
                indices[place], values[place] = latent, float(row[latent])
    return indices, values


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 4),
    m=st.integers(1, 20),
    shift=st.integers(-6, 6),
    room=st.integers(0, 50),
    gap=st.integers(0, 2),
    backwards=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    ties=st.booleans(),
    slack=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_counts_and_writes_what_is_strictly_above(device, n, m, shift, room, gap, backwards, dtype, ties, slack, seed):
    """Rows may begin anywhere, so they may be in any order, with gaps between them, or not have room."""
    torch.manual_seed(seed)
    pre, bounds = torch.randn(n, m).to(dtype), torch.randn(m)
    if ties:
        pre, bounds = pre.round(), bounds.round()
    # Halves and whole numbers, whose products are exact.
    bounds = Bounds(bounds, *(torch.randint(0, 4, (k,)) / 2 for k in (m, n))) if slack else Bounds(bounds)
    counts = count_above(pre.to(device), on(device, bounds))
    assert counts.dtype == torch.int64
    assert counts.tolist() == [len(hits) for hits in hits_of(pre, bounds)]

    starts = [0] * n
    for row in reversed(range(n)) if backwards else range(n):
        starts[row], shift = shift, shift + int(counts[row]) + gap
    assert write(pre, bounds, starts, room, device) == written(pre, bounds, starts, room)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_wider_than_a_tile(device, dtype):
    pre, bounds = torch.randn(2, 9001).to(dtype), Bounds(torch.full((9001,), 0.5))
    counts = count_above(pre.to(device), on(device, bounds)).tolist()
    assert counts == [len(hits) for hits in hits_of(pre, bounds)]
    for room in (sum(counts), sum(counts) - 1500):
        starts = [0, counts[0]]
        assert write(pre, bounds, starts, room, device) == written(pre, bounds, starts, room)


def test_a_view_with_gaps_between_rows(device):
    pre, bounds, starts = torch.randn(3, 50, device=device)[:, 10:31], Bounds(torch.zeros(21)), [0, 21, 42]
    counts = count_above(pre, on(device, bounds)).tolist()
    assert counts == [len(hits) for hits in hits_of(pre.cpu(), bounds)]
    assert write(pre, bounds, starts, 63, device) == written(pre.cpu(), bounds, starts, 63)


@pytest.mark.parametrize("start", [-(2**40), -20, 60, 2**40])
def test_a_row_that_begins_outside_is_not_followed(device, start):
    assert write(torch.ones(1, 20), Bounds(torch.zeros(20)), [start], 60, device)[0] == [UNTOUCHED] * 60


def test_what_was_written_can_be_decoded(device, close):
    pre, weight, bounds = torch.randn(5, 12), torch.randn(12, 7), Bounds(torch.zeros(12, device=device))
    offsets = torch.nn.functional.pad(count_above(pre.to(device), bounds).cumsum(0), (1, 0))
    indices, values = torch.zeros(60, dtype=torch.int64, device=device), torch.zeros(60, device=device)
    write_above(pre.to(device), bounds, offsets[:-1], indices, values)
    close(gather_sum(indices, values, offsets, weight.to(device)), pre.double().relu() @ weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_seen(device, dtype):
    pre, bounds = torch.tensor([[-1.0, torch.nan, 0.5]], dtype=dtype), Bounds(torch.zeros(3))
    assert count_above(pre.to(device), on(device, bounds)).tolist() == [2]
    indices, values = write(pre, bounds, [0], 2, device)
    assert indices == [1, 2]
    assert values[0] != values[0]


def test_wrong_arguments_are_named(device):
    pre, starts = torch.randn(2, 6, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    indices, values = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(4, device=device)
    with pytest.raises(UnweaveError, match=r"^count_above: bounds.latents must have shape \(m=6\), got \(5,\)"):
        count_above(pre, Bounds(pre[0, :5]))
    with pytest.raises(UnweaveError, match=r"^count_above: bounds.sizes must have shape \(n=2\), got \(6,\)"):
        count_above(pre, Bounds(pre[0], pre[0], pre[0]))
    with pytest.raises(UnweaveError, match=r"^count_above: pre must be float32 or bfloat16, got float16"):
        count_above(pre.half(), Bounds(pre[0]))
    with pytest.raises(UnweaveError, match=r"^write_above: bounds.latents must be float32, got bfloat16"):
        write_above(pre, Bounds(pre[0].bfloat16()), starts, indices, values)
    with pytest.raises(UnweaveError, match=r"^write_above: starts must have shape \(n=2\), got \(1,\)"):
        write_above(pre, Bounds(pre[0]), starts[:1], indices, values)
    with pytest.raises(UnweaveError, match=r"^write_above: values must have shape \(room=4\), got \(3,\)"):
        write_above(pre, Bounds(pre[0]), starts, indices, values[:3])
    with pytest.raises(UnweaveError, match=r"^write_above: values must be float32, got bfloat16"):
        write_above(pre.bfloat16(), Bounds(pre[0]), starts, indices, values.bfloat16())
    with pytest.raises(UnweaveError, match=r"^write_above: indices is written in place and must be contiguous"):
        write_above(pre, Bounds(pre[0]), starts, indices[::2], values[:2])
