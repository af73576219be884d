"""L0, dead latents and shrinkage over batches equal their definitions on all samples at once."""

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.sae import SparseCodes
from unweave.synthetic.counters import DeadLatentsCalculator, L0Calculator, ShrinkageCalculator


def test_l0_counts_what_is_not_zero_on_all_samples():
    codes = torch.tensor([[0.0, -1.0, 2.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    l0 = L0Calculator()
    assert l0.compute() == 0
    l0.add_batch(codes[:1])
    l0.add_batch(SparseCodes.from_dense(codes[1:]))
    assert l0.compute() == 1.0


def test_dead_latents_never_fired():
    codes = torch.tensor([[0.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    dead = DeadLatentsCalculator(4)
    dead.add_batch(codes[:1].to_sparse())
    assert dead.compute() == 3
    dead.add_batch(codes[1:])
    assert dead.compute() == 2
    with pytest.raises(UnweaveError, match="width of 3, and 4"):
        dead.add_batch(codes[:, :3])


def test_counts_beyond_float32():
    """pitfall_350: one more than 2^24 is one more."""
    dead, l0 = DeadLatentsCalculator(2), L0Calculator()
    dead.counts += 2**24
    l0.n_active = l0.n_samples = 2**24
    for counter in (dead, l0):
        counter.add_batch(torch.tensor([[1.0, 0.0]]))
    assert dead.counts.tolist() == [2**24 + 1, 2**24]
    assert l0.n_active == l0.n_samples == 2**24 + 1


def test_shrinkage_leaves_zero_rows_out():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-7, 0.0], [0.0, 2.0]])
    x_hat = torch.tensor([[3.0, 0.0], [5.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    shrinkage = ShrinkageCalculator()
    assert shrinkage.compute() == 0
    shrinkage.add_batch(x_hat[:2], x[:2])
    shrinkage.add_batch(x_hat[2:], x[2:])
    assert shrinkage.compute() == pytest.approx((0.6 + 0.5) / 2)
    assert shrinkage.n_ratios == 2
