"""Precision, recall, F1 and accuracy from sparse counts equal their definitions on dense tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.sae import SparseCodes
from unweave.synthetic.classification import (
    ClassificationMetrics,
    ClassificationMetricsCalculator,
    compute_classification_metrics,
)


def world(n, m, f, d, seed, density=0.3):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(n, m, generator=generator) * (torch.rand(n, m, generator=generator) < density)
    truth = torch.rand(n, f, generator=generator) * (torch.rand(n, f, generator=generator) < density)
    return codes, truth, torch.randn(m, d, generator=generator), torch.randn(f, d, generator=generator)


def by_definition(codes, truth, decoder, features):
    best = (torch.nn.functional.normalize(decoder, dim=1) @ torch.nn.functional.normalize(features, dim=1).T).abs()
    rows = []
    for i, j in enumerate(best.argmax(1).tolist()):
        said, true = codes[:, i] != 0, truth[:, j] > 0
        both = int((said & true).sum())
        precision = both / int(said.sum()) if said.any() else 0.0
        recall = both / int(true.sum()) if true.any() else 0.0
        f1 = 2 * precision * recall / (precision + recall) if both else 0.0
        rows.append((precision, recall, f1, float((said == true).double().mean())))
    return torch.tensor(rows, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20), m=st.integers(1, 6), f=st.integers(1, 6), seed=st.integers(0, 999),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), cut=st.integers(0, 20),
)  # fmt: skip
def test_equal_to_the_definition_however_batched(n, m, f, seed, density, cut):
    codes, truth, decoder, features = world(n, m, f, 4, seed, density)
    expected = by_definition(codes, truth, decoder, features)
    calculator = ClassificationMetricsCalculator(decoder, features)
    for part in (slice(0, cut), slice(cut, n)):
        if len(codes[part]):
            calculator.add_batch(SparseCodes.from_dense(codes[part]), truth[part].to_sparse())
    torch.testing.assert_close(torch.stack(list(calculator.per_latent()), dim=1), expected)
    assert list(vars(calculator.compute()).values()) == pytest.approx(expected.mean(0).tolist())
    one_shot = compute_classification_metrics(codes, truth, decoder, features)
    assert list(vars(one_shot).values()) == pytest.approx(expected.mean(0).tolist())
    live = codes.any(0)
    wanted = expected[live].mean(0).tolist() if live.any() else [0.0] * 4
    assert list(vars(calculator.compute(live_only=True)).values()) == pytest.approx(wanted)


def test_dead_latents_lower_the_mean_over_all_and_not_the_mean_over_live():
    """pitfall_349"""
    truth = (torch.rand(500, 6, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    features = torch.eye(6)
    codes = torch.cat([truth, torch.zeros(500, 6)], dim=1)
    calculator = ClassificationMetricsCalculator(features.repeat(2, 1), features)
    calculator.add_batch(codes, truth)
    assert calculator.compute().f1_score == pytest.approx(0.5)
    assert calculator.compute(live_only=True) == ClassificationMetrics(1.0, 1.0, 1.0, 1.0)
    assert calculator.compute().accuracy > 0.85  # what true negatives alone give


def test_negative_truth_is_absent_and_negative_codes_fire():
    eye = torch.eye(2)
    calculator = ClassificationMetricsCalculator(eye, eye)
    calculator.add_batch(torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0, -1.0]]))
    assert calculator.true_positives.tolist() == [1, 0]
    assert calculator.present.tolist() == [1, 0]


def test_counts_beyond_float32():
    """pitfall_350: after 2^24 samples, one more still counts."""
    eye = torch.eye(2)
    calculator = ClassificationMetricsCalculator(eye, eye)
    for counts in (calculator.true_positives, calculator.fired, calculator.present):
        counts += 2**24
    calculator.add_batch(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    for counts in (calculator.true_positives, calculator.fired, calculator.present):
        assert counts.tolist() == [2**24 + 1, 2**24]


def test_bad_batches():
    eye = torch.eye(3)
    calculator = ClassificationMetricsCalculator(eye, eye)
    with pytest.raises(UnweaveError, match="no samples"):
        calculator.compute()
    with pytest.raises(UnweaveError, match="2 samples and true activations of 1"):
        calculator.add_batch(torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(UnweaveError, match="true activations have a width of 2, and 3"):
        calculator.add_batch(torch.ones(2, 3), torch.ones(2, 2))
