"""Selection from a rounded product, with exact values: right where it says so."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.kernels.triton import topk_screened


def problem(n, m, d, dtype):
    """Inputs, exact pre-activations in float64, rounded ones, and a bound of each row's error."""
    x, weight, bias = torch.randn(n, d), torch.randn(m, d), torch.randn(m)
    exact = x.double() @ weight.double().T + bias.double()
    rounded = exact.to(dtype)
    return x, weight, bias, exact, rounded, (rounded.double() - exact).abs().amax(1).float() + 1e-5


@settings(deadline=None, max_examples=12)
@given(
    n=st.integers(1, 3),
    m=st.integers(1, 24),
    d=st.sampled_from([1, 7, 16]),
    k=st.integers(0, 39),
    spare=st.integers(0, 8),
    magnitude=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_certified_row_is_that_of_exact_values(device, close, n, m, d, k, spare, magnitude, seed):
    torch.manual_seed(seed)
    k = 1 + k % m
    x, weight, bias, exact, rounded, eps = problem(n, m, d, torch.bfloat16)
    got = topk_screened(*(t.to(device) for t in (rounded, x, weight, bias, eps)), k, spare=spare, magnitude=magnitude)
    close(got.values, exact.gather(1, got.indices.cpu()))
    best = (exact.abs() if magnitude else exact).argsort(dim=1, descending=True, stable=True)[:, :k].sort(1).values
    for row in got.certified.nonzero().flatten().tolist():
        assert got.indices[row].tolist() == best[row].tolist()
    if k + spare >= m:
        assert got.certified.all()


def test_spare_candidates_repair_what_rounding_misordered(device):
    """Values between 100 and 101 are 0.5 apart in bfloat16, so nearly all of them look equal."""
    pre = 100 + torch.rand(1, 12)
    x, weight = torch.ones(1, 1), pre.T.contiguous()
    bias, eps = torch.zeros(12), torch.full((1,), 0.3)
    args = [t.to(device) for t in (pre.bfloat16(), x, weight, bias, eps)]
    best = pre.argsort(dim=1, descending=True)[:, :3].sort(1).values.tolist()
    assert topk_screened(*args, 3, spare=0).indices.tolist() != best
    assert topk_screened(*args, 3, spare=9).indices.tolist() == best
    assert topk_screened(*args, 3, spare=0).certified.tolist() == [False]
    assert topk_screened(*args, 3, spare=9).certified.tolist() == [True]


def test_a_clear_gap_is_certified_and_a_near_tie_is_not(device):
    weight = torch.tensor([[5.0], [4.0], [1.0], [0.5]])
    x, bias, eps = torch.ones(2, 1), torch.zeros(4), torch.tensor([0.1, 3.5])
    pre = (x @ weight.T).bfloat16()
    got = topk_screened(*(t.to(device) for t in (pre, x, weight, bias, eps)), 2, spare=1)
    assert got.indices.tolist() == [[0, 1], [0, 1]]
    assert got.certified.tolist() == [True, False]


def test_nan_is_never_certified(device):
    weight = torch.tensor([[5.0], [torch.nan], [1.0], [0.5]])
    x, bias, eps = torch.ones(1, 1), torch.zeros(4), torch.tensor([0.1])
    pre = (x @ weight.T).bfloat16()
    got = topk_screened(*(t.to(device) for t in (pre, x, weight, bias, eps)), 2, spare=1)
    assert got.values.isnan().any()
    assert not got.certified.any()


def test_wrong_arguments_are_named(device):
    pre, x, weight, row = (torch.ones(shape, device=device) for shape in [(2, 6), (2, 4), (6, 4), (6,)])
    with pytest.raises(UnweaveError, match=r"^topk_screened: k must lie between 1 and the number of latents, 6, got 7"):
        topk_screened(pre, x, weight, row, row[:2], 7)
    with pytest.raises(UnweaveError, match=r"^topk_screened: spare must not be negative, got -1"):
        topk_screened(pre, x, weight, row, row[:2], 2, spare=-1)
    with pytest.raises(UnweaveError, match=r"^topk_screened: weight must have shape \(m=6, d=4\), got \(4, 6\)"):
        topk_screened(pre, x, weight.T, row, row[:2], 2)
