import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.sae import SparseCodes


@st.composite
def dense_codes(draw):
    n, m = draw(st.integers(1, 8)), draw(st.integers(1, 10))
    values = st.sampled_from([0.0, 0.0, 0.0, 1.0, -2.0, 0.5])
    return torch.tensor(draw(st.lists(st.lists(values, min_size=m, max_size=m), min_size=n, max_size=n)))


@settings(deadline=None)
@given(dense_codes())
def test_round_trip_and_counts(dense):
    codes = SparseCodes.from_dense(dense)
    assert torch.equal(codes.to_dense(), dense)
    assert torch.equal(codes.l0(), (dense != 0).sum(1).float())
    assert torch.equal(codes.firing_counts(), (dense != 0).sum(0))
    assert torch.equal(SparseCodes.cat([codes[:2], codes[2:]]).to_dense(), dense)
    order, rows, offsets = codes.by_latent
    for latent in range(codes.d_sae):
        part = slice(offsets[latent], offsets[latent + 1])
        assert (codes.indices[order[part]] == latent).all()
        assert rows[part].tolist() == dense[:, latent].nonzero().flatten().tolist()


@settings(deadline=None)
@given(dense_codes(), st.integers(1, 4))
def test_topk_keeps_the_largest_of_each_row(dense, k):
    codes = SparseCodes.from_dense(dense)
    for row, kept in zip(dense, codes.topk(k).to_dense(), strict=True):
        nonzero = row[row != 0].sort(descending=True).values[:k]
        assert kept[kept != 0].sort(descending=True).values.tolist() == nonzero.tolist()


def test_a_selected_zero_has_not_fired():
    """pitfall_043"""
    codes = SparseCodes(torch.tensor([0, 2]), torch.tensor([0.0, 1.0]), torch.tensor([0, 2]), 3)
    assert codes.firing_counts().tolist() == [0, 0, 1]
    assert codes.l0().tolist() == [1]
    assert codes.firing().indices.tolist() == [2]


def test_negative_codes_fire():
    """pitfall_010: firing is a value that is not 0, for signed codes too."""
    codes = SparseCodes.from_dense(torch.tensor([[-1.0, 0.0, 2.0]]))
    assert codes.l0().tolist() == [2]


def test_no_rows_and_no_entries():
    codes = SparseCodes.from_dense(torch.zeros(3, 5))
    assert codes.l0().tolist() == [0, 0, 0]
    assert codes.to_dense().shape == (3, 5)
    assert codes[1:1].n_rows == 0


def test_slices_of_a_step_are_refused():
    with pytest.raises(ValueError, match="step 1"):
        SparseCodes.from_dense(torch.eye(3))[::2]


def test_to_dense_carries_gradients():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    codes = SparseCodes(torch.tensor([1, 0]), values, torch.tensor([0, 1, 2]), 2)
    codes.to_dense()[1, 0].backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 1]
