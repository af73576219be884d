"""Selection against sorting: exact, with ties to the lowest latent, whatever the row looks like."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.kernels.triton import group_max, select, topk

DTYPES = [torch.float32, torch.bfloat16]
odd_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0078125, 1e-40, -1e-40, 3e38, -3e38, torch.inf, -torch.inf])


def by_sorting(pre, k, magnitude=False):
    """Latents of the k largest of each row; among equal ones the lowest."""
    keys = pre.double().abs() if magnitude else pre.double()
    return keys.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values


def check(pre, k, magnitude, device):
    chosen = topk(pre.to(device), k, magnitude=magnitude)
    indices = by_sorting(pre, k, magnitude)
    assert chosen.indices.tolist() == indices.tolist()
    assert chosen.values.dtype == pre.dtype
    assert chosen.values.cpu().equal(pre.gather(1, indices))


@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 40).flatmap(
        lambda m: st.lists(
            st.lists(st.one_of(odd_values, st.floats(-2, 2, width=32)), min_size=m, max_size=m), min_size=1, max_size=3
        )
    ),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.booleans(),
)
def test_topk_equals_sorting(device, rows, share, dtype, magnitude):
    pre = torch.tensor(rows).to(dtype)
    check(pre, max(1, round(share * pre.shape[1])), magnitude, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [False, True])
def test_topk_of_zeros(device, dtype, magnitude):
    pre = torch.zeros(2, 20, dtype=dtype)
    pre[1, ::3] = -0.0
    for k in (1, 7, 20):
        check(pre, k, magnitude, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (1024, 1024), (1025, 1), (2500, 70), (9001, 600)])
def test_topk_of_rows_wider_than_the_lanes(device, dtype, m, k):
    check(torch.randn(2, m).to(dtype), k, False, device)
    check(torch.randn(1, m).to(dtype), k, True, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [False, True])
def test_topk_of_a_row_with_more_candidates_than_room(device, dtype, magnitude):
    """Every lane has the same few values, so the bound that the lanes give excludes next to nothing."""
    pre = torch.randint(-2, 3, (2, 3000)).to(dtype)
    pre[1] = 0.5
    check(pre, 1300, magnitude, device)
    check(pre, 7, magnitude, device)


def test_topk_with_more_winners_than_lanes(device, monkeypatch):
    monkeypatch.setattr(select, "MAX_LANES", 1024)
    check(torch.randn(2, 3000), 1500, False, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("m", [40, 2500])
def test_nan_is_seen(device, dtype, magnitude, m):
    """A NaN that was passed over would never be noticed. Any NaN counts as the largest, whatever its sign."""
    pre = torch.randn(3, m)
    pre[0, 5], pre[1, 7], pre[2] = torch.nan, torch.inf, torch.nan
    pre[0, 8] = -pre[0, 5]
    chosen = topk(pre.to(device, dtype), 4, magnitude=magnitude)
    assert {5, 8} < set(chosen.indices[0].tolist())
    assert 7 in chosen.indices[1].tolist()
    assert chosen.indices[2].tolist() == [0, 1, 2, 3]
    assert chosen.values[2].isnan().all()


def test_topk_of_a_view_with_gaps_between_rows(device):
    wide = torch.randn(3, 50).to(device)
    for pre in (wide[:, 10:31], wide[:, :4].T, wide.bfloat16()[:, 10:31]):
        assert topk(pre, 2).indices.tolist() == by_sorting(pre.cpu(), 2).tolist()
    assert group_max(wide[:, 10:30], 5).indices.tolist() == group_max(wide[:, 10:30].contiguous(), 5).indices.tolist()


def test_topk_of_no_rows(device):
    assert topk(torch.empty(0, 5, device=device), 2).indices.shape == (0, 2)


@settings(deadline=None, max_examples=30)
@given(
    k=st.integers(1, 7),
    size=st.sampled_from([1, 2, 3, 10]),
    dtype=st.sampled_from(DTYPES),
    ties=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_group_max_takes_the_first_largest_of_each_group(device, k, size, dtype, ties, seed):
    torch.manual_seed(seed)
    pre = (torch.randn(2, k * size).round() if ties else torch.randn(2, k * size)).to(dtype)
    chosen = group_max(pre.to(device), k)
    expected = by_sorting(pre.view(2 * k, size), 1).view(2, k) + torch.arange(k) * size
    assert chosen.indices.tolist() == expected.tolist()
    assert chosen.values.cpu().equal(pre.gather(1, expected))


def test_group_max_of_wide_groups(device):
    pre = torch.randn(2, 3 * 2100)
    pre[0, 17] = pre[0, 2050] = 9.0
    chosen = group_max(pre.to(device), 3)
    assert chosen.indices.tolist() == (pre.view(2, 3, 2100).argmax(2) + torch.arange(3) * 2100).tolist()
    assert int(chosen.indices[0, 0]) == 17


def test_wrong_arguments_are_named(device):
    pre = torch.randn(2, 6, device=device)
    with pytest.raises(UnweaveError, match=r"^topk: k must lie between 1 and the number of latents, 6, got 7"):
        topk(pre, 7)
    with pytest.raises(UnweaveError, match=r"^topk: k must lie between 1"):
        topk(pre, 0)
    with pytest.raises(UnweaveError, match=r"^topk: pre must be float32 or bfloat16, got float16"):
        topk(pre.half(), 2)
    with pytest.raises(UnweaveError, match=r"^topk: pre has 0 latents"):
        topk(pre[:, :0], 1)
    with pytest.raises(UnweaveError, match=r"^group_max: k must divide the number of latents, 6, got 4"):
        group_max(pre, 4)
