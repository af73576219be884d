"""`sddmm` against the dense product in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.kernels.triton import sddmm

dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 6),
    m=st.integers(1, 20),
    d=st.sampled_from([1, 3, 16, 17, 40]),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    of_grad=dtypes,
    of_weight=dtypes,
    seed=st.integers(0, 2**32),
)
def test_equals_the_dense_product_at_the_entries(
    device, csr, random_codes, close, n, m, d, density, of_grad, of_weight, seed
):
    torch.manual_seed(seed)
    dense, grad, weight = random_codes(n, m, density), torch.randn(n, d).to(of_grad), torch.randn(m, d).to(of_weight)
    indices, _, offsets = csr(dense)
    out = sddmm(indices, offsets, grad.to(device), weight.to(device))
    assert out.dtype == torch.float32
    close(out, (grad.double() @ weight.double().T)[dense != 0])


def test_rows_wider_than_a_tile(device, csr, close):
    grad, weight = torch.randn(2, 1100), torch.randn(3, 1100)
    indices, _, offsets = csr(torch.ones(2, 3))
    close(sddmm(indices, offsets, grad.to(device), weight.to(device)), (grad.double() @ weight.double().T).flatten())


def test_wrong_indices_are_not_followed_and_unfilled_room_is_zero(device):
    indices, grad, weight = torch.tensor([0, -1, 3, 1, 2, 2]), torch.ones(2, 4), torch.ones(3, 4)
    indices, grad, weight = (t.to(device) for t in (indices, grad, weight))
    out = sddmm(indices, torch.tensor([0, 3, 4], device=device), grad, weight)
    torch.testing.assert_close(out.cpu(), torch.tensor([4.0, torch.nan, torch.nan, 4.0, 0.0, 0.0]), equal_nan=True)
    assert sddmm(indices[:1], torch.tensor([-5, 99], device=device), grad[:1], weight).tolist() == [4.0]


def test_wrong_arguments_are_named(device):
    indices, offsets, grad = torch.zeros(2, dtype=torch.long), torch.tensor([0, 2]), torch.ones(1, 4)
    indices, offsets, grad = (t.to(device) for t in (indices, offsets, grad))
    with pytest.raises(UnweaveError, match=r"^sddmm: weight must have shape \(m, d=4\), got \(3, 5\)"):
        sddmm(indices, offsets, grad, torch.ones(3, 5, device=device))
    with pytest.raises(UnweaveError, match=r"^sddmm: grad must have shape \(n=1, d\), got \(2, 4\)"):
        sddmm(indices, offsets, grad.expand(2, 4), grad)
    with pytest.raises(UnweaveError, match=r"^sddmm: grad must be float32 or bfloat16, got float16"):
        sddmm(indices, offsets, grad.half(), grad)
