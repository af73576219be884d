"""Selection from a rounded product, with exact values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.kernels.triton import topk_screened


def problem(n, m, d):
    """Inputs of few bits, so that fp32 products and sums are exact, with ties; and what they give in float64."""
    x, weight, bias = (torch.randint(-20, 21, shape).float() / 4 for shape in [(n, d), (m, d), (m,)])
    return x, weight, bias, x.double() @ weight.double().T + bias.double()


def largest(pre, k, magnitude):
    """Latents of the k largest of each row, ascending; among equal ones the lowest."""
    keys = pre.double().abs() if magnitude else pre.double()
    return keys.argsort(dim=1, descending=True, stable=True)[:, :k].sort(1).values


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 3),
    m=st.integers(1, 24),
    d=st.sampled_from([1, 7, 16]),
    k=st.integers(0, 39),
    spare=st.integers(0, 24),
    noise=st.sampled_from([0.0, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    magnitude=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_only_what_rounding_put_behind_too_many_is_missed(device, n, m, d, k, spare, noise, dtype, magnitude, seed):
    torch.manual_seed(seed)
    k = 1 + k % m
    x, weight, bias, exact = problem(n, m, d)
    pre = (exact + noise * torch.randn(n, m)).to(dtype)
    got = topk_screened(*(t.to(device) for t in (pre, x, weight, bias)), k, spare=spare, magnitude=magnitude)
    indices = got.indices.cpu()
    assert got.values.dtype == torch.float32
    assert got.values.cpu().double().equal(exact.gather(1, indices))  # whatever the product said

    best, shortlist = largest(exact, k, magnitude), largest(pre, k + spare, magnitude)
    for row in range(n):
        listed = set(shortlist[row].tolist())
        assert listed.issuperset(indices[row].tolist())
        if listed.issuperset(best[row].tolist()):
            assert indices[row].tolist() == best[row].tolist()
    if k + spare >= m:
        assert indices.equal(best)


def test_spare_candidates_repair_what_rounding_misordered(device):
    """Values between 100 and 101 are 0.5 apart in bfloat16, so nearly all of them look equal."""
    torch.manual_seed(0)
    pre = 100 + torch.rand(1, 12)
    args = [t.to(device) for t in (pre.bfloat16(), torch.ones(1, 1), pre.T.contiguous(), torch.zeros(12))]
    best = largest(pre, 3, False).tolist()
    assert topk_screened(*args, 3, spare=0).indices.tolist() != best
    assert topk_screened(*args, 3, spare=9).indices.tolist() == best


def test_values_of_wide_rows_are_those_of_an_fp32_product(device, close):
    x, weight, bias = torch.randn(2, 1100), torch.randn(30, 1100) / 33, torch.randn(30)
    exact = x.double() @ weight.double().T + bias.double()
    got = topk_screened(*(t.to(device) for t in (exact.bfloat16(), x, weight, bias)), 5)
    close(got.values, exact.gather(1, got.indices.cpu()))


def test_nan_is_seen(device):
    weight = torch.tensor([[5.0], [torch.nan], [1.0], [0.5]])
    x, bias = torch.ones(1, 1), torch.zeros(4)
    got = topk_screened(*(t.to(device) for t in ((x @ weight.T).bfloat16(), x, weight, bias)), 2, spare=1)
    assert got.indices.tolist() == [[0, 1]]
    assert got.values.isnan().tolist() == [[False, True]]


def test_wrong_arguments_are_named(device):
    pre, x, weight, row = (torch.ones(shape, device=device) for shape in [(2, 6), (2, 4), (6, 4), (6,)])
    with pytest.raises(UnweaveError, match=r"^topk_screened: k must lie between 1 and the number of latents, 6, got 7"):
        topk_screened(pre, x, weight, row, 7)
    with pytest.raises(UnweaveError, match=r"^topk_screened: spare must not be negative, got -1"):
        topk_screened(pre, x, weight, row, 2, spare=-1)
    with pytest.raises(UnweaveError, match=r"^topk_screened: weight must have shape \(m=6, d=4\), got \(4, 6\)"):
        topk_screened(pre, x, weight.T, row, 2)
