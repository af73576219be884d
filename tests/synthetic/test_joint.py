"""Lookups of one set of codes in another equal those in dense tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.sae import SparseCodes
from unweave.synthetic.joint import as_codes, check_same_rows, values_at


def sparse(n, width, density, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, width, generator=generator)
    return values * (torch.rand(n, width, generator=generator) < density)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 8), width=st.integers(1, 9), density=st.sampled_from([0.0, 0.2, 1.0]), seed=st.integers(0, 99))
def test_values_at_equals_dense_indexing(n, width, density, seed):
    dense = sparse(n, width, density, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(n, (20,), generator=generator)
    indices = torch.randint(-1, width, (20,), generator=generator)
    expected = torch.where(indices >= 0, dense[rows, indices.clamp(min=0)], 0)
    torch.testing.assert_close(values_at(SparseCodes.from_dense(dense), rows, indices), expected)


def test_as_codes_takes_every_form():
    dense = sparse(5, 7, 0.3, 0)
    expected = SparseCodes.from_dense(dense)
    with_zeros = SparseCodes.from_dense(dense + (dense == 0)).with_values(dense.flatten())
    for form in (dense, dense.to_sparse(), with_zeros, expected):
        codes = as_codes(form)
        assert torch.equal(codes.to_dense(), dense)
        assert len(codes.values) == int((dense != 0).sum())


def test_uncoalesced_coo_is_summed():
    coo = torch.sparse_coo_tensor([[1, 0, 1], [2, 1, 2]], [1.0, 2.0, 3.0], (2, 4), check_invariants=True)
    assert as_codes(coo).to_dense()[1, 2] == 4


def test_shapes_are_checked():
    with pytest.raises(UnweaveError, match=r"\(n, width\), got \(3,\)"):
        as_codes(torch.ones(3))
    one, two = (SparseCodes.from_dense(torch.ones(n, 4)) for n in (1, 2))
    with pytest.raises(UnweaveError, match="1 samples and true activations of 2"):
        check_same_rows(one, two, 4, 4)
    with pytest.raises(UnweaveError, match="width of 4, and 5"):
        check_same_rows(one, one, 5, 4)
