"""Losses of the spliced model, by hand and in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.objectives import EndToEnd, balanced, ce_loss, downstream_error, kl_loss

MASK = torch.tensor([[False, True, False, True]])


def test_kl_by_hand():
    """pitfall_023: p is the clean model; of four positions only the first and the third predict unmasked tokens."""
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    clean, spliced = p.log().expand(1, 4, 2).clone(), q.log().expand(1, 4, 2).clone()
    clean[0, 1] = torch.tensor([50.0, -3.0])  # predicts a masked token
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert kl_loss(clean, spliced, MASK).item() == pytest.approx(expected)
    assert kl_loss(clean, clean, MASK).item() == 0  # pitfall_022
    assert kl_loss(clean, spliced, torch.zeros(1, 4, dtype=torch.bool)).item() == 0


def test_ce_by_hand():
    logits = torch.tensor([0.9, 0.1]).log().expand(1, 4, 2)
    ids = torch.tensor([[0, 1, 0, 0]])
    assert ce_loss(logits, ids, MASK).item() == pytest.approx(-(math.log(0.1) + math.log(0.9)) / 2)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(2, 5), st.integers(2, 6))
def test_gradients_equal_dense_formulas_and_spare_masked_positions(seed, prompts, context, vocab):
    """pitfall_089"""
    generator = torch.Generator().manual_seed(seed)
    clean, spliced = (torch.randn(prompts, context, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(prompts, context, generator=generator) < 0.6
    mask[0, 1] = True
    ids = torch.randint(vocab, (prompts, context), generator=generator)
    at = [(i, j) for i in range(prompts) for j in range(context - 1) if mask[i, j + 1]]
    for ours, one in (
        (lambda q: kl_loss(clean, q, mask), lambda q, i, j: (
            clean[i, j].softmax(0) * (clean[i, j].log_softmax(0) - q[i, j].log_softmax(0))).sum()),
        (lambda q: ce_loss(q, ids, mask), lambda q, i, j: -q[i, j].log_softmax(0)[ids[i, j + 1]]),
    ):  # fmt: skip
        q, other = (spliced.clone().requires_grad_() for _ in range(2))
        loss = ours(q)
        expected = sum(one(other, i, j) for i, j in at) / len(at)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(q.grad, other.grad)


def test_impossible_tokens_and_extreme_logits():
    """pitfall_013, pitfall_014"""
    clean = torch.tensor([[[0.0, -math.inf, 1.0], [100.0, -100.0, 0.0]]])
    spliced = torch.tensor([[[0.0, 0.0, 0.0], [-100.0, 100.0, 0.0]]], requires_grad=True)
    loss = kl_loss(clean, spliced, torch.tensor([[True, True]]))
    loss.backward()
    assert loss.isfinite()
    assert spliced.grad.isfinite().all()
    half = kl_loss(clean.bfloat16(), spliced.detach().bfloat16(), torch.tensor([[True, True]]))
    assert half.dtype == torch.float32


def test_downstream_error_by_hand():
    clean = torch.tensor([[[1.0], [3.0], [99.0]]])
    spliced = torch.tensor([[[2.0], [3.0], [0.0]]])
    mask = torch.tensor([[True, True, False]])
    assert downstream_error([clean], [spliced], mask).item() == pytest.approx(1 / 2)
    assert downstream_error([clean, clean], [spliced, clean], mask).item() == pytest.approx(1 / 4)
    assert downstream_error([torch.ones(1, 3, 1)], [spliced], mask).item() == 0


def test_balanced_by_hand():
    error, kl = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (6.0, 0.5))
    loss = balanced(error, kl, 2.0)
    assert loss.item() == pytest.approx((6 + 2 * 6) / 3)
    loss.backward()
    assert error.grad.item() == pytest.approx(1 / 3)
    assert kl.grad.item() == pytest.approx(12 * 2 / 3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kl": -1.0, "beta": None}, "at least 0"),
        ({"beta": 0.0}, "beta > 0"),
        ({"kl": 1.0, "beta": 1.0}, "leave out kl"),
        ({"error": 1.0}, "needs a coefficient"),
        ({"downstream": 1.0}, "later hooks"),
        ({"hooks": ("a",)}, "later hooks"),
    ],
)
def test_impossible_settings(bad, message):
    with pytest.raises(UnweaveError, match=message):
        EndToEnd(**bad)
