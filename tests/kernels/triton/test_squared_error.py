"""The fused squared-error pass against autograd in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.kernels.triton import squared_error


def dense_step(groups, weight, bias, x, prefix_weights, scale):
    """Squares, gradients and the loss of codes given as (n, P, m), by autograd."""
    groups = groups.double().requires_grad_()
    decoded = groups @ weight.double()
    decoded.retain_grad()
    reconstruction = decoded.cumsum(1) + bias.double()
    squares = (reconstruction - x.double()[:, None]).square().sum(2)
    (scale * (squares * prefix_weights.double()).sum()).backward()
    return squares.detach(), decoded.grad, groups.grad


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 4),
    prefixes=st.integers(1, 3),
    m=st.integers(1, 9),
    d=st.sampled_from([1, 5, 16, 40]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32),
)
def test_equals_autograd(device, csr, random_codes, close, n, prefixes, m, d, density, dtype, seed):
    torch.manual_seed(seed)
    groups = random_codes(n * prefixes, m, density)
    weight, bias, x = torch.randn(m, d).to(dtype), torch.randn(d), torch.randn(n, d).to(dtype)
    prefix_weights, scale = torch.rand(prefixes), 0.3
    got = squared_error(*csr(groups), *(t.to(device) for t in (weight, bias, x, prefix_weights)), scale)
    shaped = groups.view(n, prefixes, m)
    squares, grad, grad_groups = dense_step(shaped, weight, bias, x, prefix_weights, scale)
    close(got.squares, squares)
    close(got.grad, grad.flatten(0, 1))
    close(got.grad_values, grad_groups[shaped != 0])


@pytest.mark.parametrize("prefixes", [1, 3])
def test_rows_wider_than_a_tile(device, csr, random_codes, close, prefixes):
    groups = random_codes(2 * prefixes, 20, 0.7)
    weight, bias, x = torch.randn(20, 1100), torch.randn(1100), torch.randn(2, 1100)
    prefix_weights = torch.rand(prefixes)
    got = squared_error(*csr(groups), *(t.to(device) for t in (weight, bias, x, prefix_weights)), 0.01)
    shaped = groups.view(2, prefixes, 20)
    squares, grad, grad_groups = dense_step(shaped, weight, bias, x, prefix_weights, 0.01)
    close(got.squares / squares.mean(), squares / squares.mean())
    close(got.grad, grad.flatten(0, 1))
    close(got.grad_values, grad_groups[shaped != 0])


def test_wrong_indices_make_their_row_nan_and_unfilled_room_is_zero(device):
    got = squared_error(
        torch.tensor([0, 3, 1, 2], device=device), torch.ones(4, device=device), torch.tensor([0, 2, 3], device=device),
        torch.ones(3, 4, device=device), torch.zeros(4, device=device), torch.zeros(2, 4, device=device),
        torch.ones(1, device=device), 1.0,
    )  # fmt: skip
    assert got.squares.isnan().flatten().tolist() == [True, False]
    assert got.grad.isnan().all(1).tolist() == [True, False]
    assert got.grad_values[:2].isnan().all()
    assert got.grad_values[2:].tolist() == [8.0, 0.0]


@pytest.mark.parametrize("offsets", [[0, 5, 3], [0, 2, 9], [-4, 0, 3]])
def test_offsets_out_of_range_are_not_followed(device, offsets):
    indices, offsets, ones = torch.arange(3), torch.tensor(offsets), torch.ones(3, 4)
    indices, offsets, ones = (t.to(device) for t in (indices, offsets, ones))
    got = squared_error(indices, ones[:, 0], offsets, ones, ones[0], ones[:2], ones[0, :1], 1.0)
    assert got.squares.isnan().any()
    assert got.grad.isnan().any()


def test_wrong_arguments_are_named(device):
    indices, values = torch.zeros(2, dtype=torch.long, device=device), torch.ones(2, device=device)
    ones = torch.ones(3, 4, device=device)
    three = torch.tensor([0, 1, 2, 2], device=device)
    with pytest.raises(UnweaveError, match=r"n \* P \+ 1 = 7 elements for 3 rows and 2 prefixes, got 4"):
        squared_error(indices, values, three, ones, ones[0], ones, ones[0, :2], 1.0)
    with pytest.raises(UnweaveError, match=r"^squared_error: prefix_weights is empty"):
        squared_error(indices, values, three, ones, ones[0], ones, ones[0, :0], 1.0)
    with pytest.raises(UnweaveError, match=r"^squared_error: bias must have shape \(d=4\), got \(3,\)"):
        squared_error(indices, values, three, ones, ones[:, 0], ones, ones[0, :1], 1.0)
