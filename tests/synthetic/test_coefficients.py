"""The slope of codes on magnitudes: that of a dense regression, moved by shrinkage and not by missed firings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.sae import SparseCodes
from unweave.synthetic.coefficients import CoefficientCalculator
from unweave.synthetic.matching import match


def magnitudes(n, f, seed=0, density=0.4):
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(n, f, generator=generator) < density
    return fires * (0.5 + torch.rand(n, f, generator=generator))


def slopes(codes, truth, decoder, features):
    calculator = CoefficientCalculator(match(decoder, features), decoder, features)
    half = len(codes) // 2
    calculator.add_batch(codes[:half], truth[:half])
    calculator.add_batch(SparseCodes.from_dense(codes[half:]), SparseCodes.from_dense(truth[half:]))
    return calculator


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 6), f=st.integers(1, 6), seed=st.integers(0, 999))
def test_equal_to_a_dense_regression(m, f, seed):
    generator = torch.Generator().manual_seed(seed)
    truth, codes = magnitudes(40, f, seed), magnitudes(40, m, seed + 1)
    decoder, features = torch.randn(m, 4, generator=generator), torch.randn(f, 4, generator=generator)
    pairs = match(decoder, features)
    expected = {}
    for i, j in zip(pairs.a.tolist(), pairs.b.tolist(), strict=True):
        both = (codes[:, i] != 0) & (truth[:, j] > 0)
        if both.any():
            # Least squares without an intercept, of contributions along the feature.
            sign = torch.dot(decoder[i], features[j]).sign()
            c, a = codes[both, i] * decoder[i].norm() * sign, truth[both, j] * features[j].norm()
            expected[i] = float(torch.linalg.lstsq(a[:, None].double(), c[:, None].double()).solution)
    calculator = slopes(codes, truth, decoder, features)
    found = calculator.per_latent()
    defined = calculator.defined.nonzero().flatten().tolist()
    assert {i: float(found[i]) for i in defined} == pytest.approx(expected, abs=1e-6)
    assert set(found.isnan().nonzero().flatten().tolist()) == set(range(m)) - set(expected)
    mean = sum(expected.values()) / len(expected) if expected else None
    assert calculator.compute() == (None if mean is None else pytest.approx(mean, abs=1e-6))


def test_shrinkage_moves_the_slope_and_missed_firings_do_not():
    truth = magnitudes(400, 5)
    missed = truth * (torch.rand(400, 5) < 0.5)
    eye = torch.eye(5)
    assert slopes(0.7 * truth, truth, eye, eye).compute() == pytest.approx(0.7)
    assert slopes(missed, truth, eye, eye).compute() == pytest.approx(1.0)
    assert slopes(truth, truth, 2 * eye, eye).compute() == pytest.approx(2.0)  # writes twice too much
    assert slopes(truth / 2, truth, 2 * eye, eye).compute() == pytest.approx(1.0)
    assert slopes(truth, truth, -eye, eye).compute() == pytest.approx(-1.0)


def test_latents_that_never_fire_with_their_feature_have_no_slope():
    truth = magnitudes(50, 3)
    codes = truth.clone()
    codes[:, 0] = 0
    codes[:, 1] = (truth[:, 1] == 0).float()
    eye = torch.eye(3)
    calculator = slopes(codes, truth, eye, eye)
    assert calculator.defined.tolist() == [False, False, True]
    assert calculator.compute() == pytest.approx(1.0)
    assert slopes(torch.zeros(50, 3), truth, eye, eye).compute() is None
