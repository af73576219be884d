import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unweave import UnweaveError
from unweave.synthetic.probabilities import (
    ConstantFiringProbabilityConfig,
    LinearFiringProbabilityConfig,
    RandomFiringProbabilityConfig,
    ZipfianFiringProbabilityConfig,
    linear_firing_probabilities,
    random_firing_probabilities,
    zipfian_firing_probabilities,
)

FUNCTIONS = [zipfian_firing_probabilities, linear_firing_probabilities, random_firing_probabilities]
CONFIGS = {
    zipfian_firing_probabilities: ZipfianFiringProbabilityConfig,
    linear_firing_probabilities: LinearFiringProbabilityConfig,
    random_firing_probabilities: RandomFiringProbabilityConfig,
}


def test_zipfian_by_hand():
    """z = 1, 1/2, 1/4 (ranks 1, 2, 4) mapped to 0.1 at 1/4 and 0.4 at 1: 1/2 is a third of the way."""
    p = zipfian_firing_probabilities(4, exponent=1.0, max_prob=0.4, min_prob=0.1)
    torch.testing.assert_close(p[[0, 1, 3]], torch.tensor([0.4, 0.2, 0.1]))


@given(
    st.integers(2, 50),
    st.floats(1e-9, 20),
    st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)).filter(lambda pair: abs(pair[0] - pair[1]) > 1e-4),
)
def test_zipfian_falls_from_the_largest_to_the_smallest(num_features, exponent, bounds):
    low, high = sorted(bounds)
    p = zipfian_firing_probabilities(num_features, exponent, high, low)
    torch.testing.assert_close(p[[0, -1]], torch.tensor([high, low]))
    assert p.dtype == torch.float32
    assert (p.diff() <= 0).all()
    assert ((p > 0) & (p <= 1)).all()


def test_a_small_exponent_is_logarithmic():
    """The limit of (r^-a - K^-a) / (1 - K^-a) for a to 0 is 1 - log r / log K; computed naively it is noise."""
    p = zipfian_firing_probabilities(100, 1e-12, 1.0, 0.5)
    expected = 0.5 + 0.5 * (1 - torch.arange(1, 101, dtype=torch.float64).log() / torch.tensor(100.0).double().log())
    torch.testing.assert_close(p.double(), expected, atol=1e-6, rtol=0)


def test_linear_is_even():
    torch.testing.assert_close(linear_firing_probabilities(3, 0.5, 0.1), torch.tensor([0.5, 0.3, 0.1]))
    assert linear_firing_probabilities(3, 0.2, 0.2).tolist() == pytest.approx([0.2] * 3)


def test_random_is_uniform_and_seeded():
    """Kolmogorov-Smirnov over 10 000 draws: sqrt(n) D exceeds 3 with a probability below 2 exp(-18) = 3e-8."""
    p = random_firing_probabilities(10_000, 0.5, 0.1, seed=0)
    assert float(p.min()) >= 0.1
    assert float(p.max()) <= 0.5
    ranks = (p.double().sort().values - 0.1) / 0.4
    assert float((ranks - (torch.arange(10_000) + 0.5) / 10_000).abs().max()) * 100 < 3
    assert torch.equal(p, random_firing_probabilities(10_000, 0.5, 0.1, seed=0))
    assert not torch.equal(p, random_firing_probabilities(10_000, 0.5, 0.1, seed=1))


def test_without_a_seed_draws_differ():
    assert not torch.equal(random_firing_probabilities(9), random_firing_probabilities(9))


@pytest.mark.parametrize("function", [zipfian_firing_probabilities, linear_firing_probabilities])
def test_a_single_feature_has_the_largest(function):
    assert function(1, max_prob=0.25, min_prob=0.01).tolist() == [0.25]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_config_generates_the_same(function):
    seeded = {"seed": 3} if function is random_firing_probabilities else {}
    expected = function(20, max_prob=0.6, min_prob=0.2, **seeded)
    assert torch.equal(CONFIGS[function](max_prob=0.6, min_prob=0.2).generate(20, seed=3), expected)
    assert ConstantFiringProbabilityConfig(0.5).generate(3).tolist() == [0.5] * 3


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_features": 0}, "num_features must be a whole number of at least 1, got 0"),
        ({"min_prob": 0.0}, r"min_prob must be .* above 0 and at most 1, got 0\.0"),
        ({"max_prob": 1.5}, r"max_prob must be .* at most 1, got 1\.5"),
        ({"max_prob": float("nan")}, "max_prob must be .* got nan"),
        ({"max_prob": 0.1, "min_prob": 0.2}, r"min_prob must be (below|at most) max_prob=0\.1, got 0\.2"),
    ],
)
def test_bad_input(function, arguments, message):
    with pytest.raises(UnweaveError, match=message):
        function(**{"num_features": 5} | arguments)
    if "num_features" not in arguments:  # a config says so when it is made
        with pytest.raises(UnweaveError, match=message):
            CONFIGS[function](**arguments)


def test_bad_input_of_one():
    with pytest.raises(UnweaveError, match="exponent must be a finite number above 0, got 0"):
        zipfian_firing_probabilities(5, exponent=0)
    for function in (zipfian_firing_probabilities, random_firing_probabilities):
        with pytest.raises(UnweaveError, match=r"min_prob must be below max_prob=0\.2, got 0\.2"):
            function(5, max_prob=0.2, min_prob=0.2)
    with pytest.raises(UnweaveError, match=r"probability must be .* above 0 and at most 1, got 0"):
        ConstantFiringProbabilityConfig(0)
    with pytest.raises(UnweaveError, match="num_features"):
        ConstantFiringProbabilityConfig().generate(0)
