"""The pieces of a synthetic world are those of sae-lens wherever nothing is random, or the same seed draws the same."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unweave.synthetic import correlation, dictionary, directions, magnitudes, probabilities, superposition

# sae-lens warns while it is imported, which is no concern of ours.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    import sae_lens.synthetic

    return sae_lens.synthetic


def assert_equal_fields(ours: Any, theirs: Any) -> None:
    """Everything that theirs says, ours says too."""
    for name, value in vars(theirs).items():
        found = getattr(ours, name)
        if isinstance(value, dict) and all(isinstance(v, float) for v in value.values()):
            assert found == pytest.approx(value, abs=1e-6)
        elif isinstance(value, Tensor | dict):
            torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-5)
        else:
            assert found == pytest.approx(value, abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(
    num_features=st.integers(1, 200),
    bounds=st.tuples(st.floats(1e-4, 1), st.floats(1e-4, 1)).filter(lambda pair: abs(pair[0] - pair[1]) > 1e-3),
    exponent=st.floats(0.2, 5),
    seed=st.integers(0, 2**40),
)
def test_firing_probabilities(
    theirs: ModuleType, num_features: int, bounds: tuple[float, float], exponent: float, seed: int
) -> None:
    low, high = sorted(bounds)
    for name, arguments in (
        ("zipfian", {"exponent": exponent, "max_prob": high, "min_prob": low}),
        ("linear", {"max_prob": high, "min_prob": low}),
        ("random", {"max_prob": high, "min_prob": low}),
        ("constant", {"probability": high}),
    ):
        expected = theirs.get_firing_probability_class(name)(**arguments)
        ours = probabilities.FiringProbabilityConfig.from_dict(expected.to_dict())
        assert ours.to_dict() == expected.to_dict()
        torch.testing.assert_close(
            ours.generate(num_features, seed), expected.generate(num_features, seed), atol=1e-6, rtol=1e-5
        )
        if name != "constant":
            ours_function = getattr(probabilities, f"{name}_firing_probabilities")
            their_function = getattr(theirs, f"{name}_firing_probabilities")
            if name == "random":
                arguments["seed"] = seed
            torch.testing.assert_close(
                ours_function(num_features, **arguments),
                their_function(num_features, **arguments),
                atol=1e-6,
                rtol=1e-5,
            )


@pytest.mark.parametrize("name", ["zipfian", "linear", "random"])
def test_the_default_firing_probabilities(theirs: ModuleType, name: str) -> None:
    expected, ours = theirs.get_firing_probability_class(name)(), probabilities.get_firing_probability_class(name)()
    assert ours.to_dict() == expected.to_dict()
    torch.testing.assert_close(ours.generate(64, 5), expected.generate(64, 5))


@pytest.mark.parametrize("num_features", [1, 2, 50])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("constant", {}),
        ("constant", {"value": 2.5}),
        ("linear", {"start": 0.5, "end": 3.0}),
        ("exponential", {"start": 4.0, "end": 0.1}),
        ("folded_normal", {}),
        ("folded_normal", {"mean": 1.0, "std": 0.5, "min_value": 0.8, "max_value": 1.4}),
    ],
)
def test_magnitudes(theirs: ModuleType, name: str, arguments: dict[str, float], num_features: int) -> None:
    expected = theirs.get_magnitude_class(name)(**arguments)
    ours = magnitudes.MagnitudeConfig.from_dict(expected.to_dict())
    assert ours.to_dict() == expected.to_dict()
    torch.testing.assert_close(
        magnitudes.generate_magnitudes(num_features, ours, 9), theirs.generate_magnitudes(num_features, expected, 9)
    )


@pytest.mark.parametrize("bias", [False, True, 2.5])
def test_a_random_dictionary_of_a_seed(theirs: ModuleType, bias: bool | float) -> None:
    ours = dictionary.FeatureDictionary(40, 12, bias=bias, initializer=None, seed=3)
    expected = theirs.FeatureDictionary(40, 12, bias=bias, initializer=None, seed=3)
    torch.testing.assert_close(ours.feature_vectors, expected.feature_vectors)
    torch.testing.assert_close(ours.bias, expected.bias)
    assert ours.bias.requires_grad == expected.bias.requires_grad
    assert ours.state_dict().keys() == expected.state_dict().keys()
    activations = torch.randn(9, 40).relu()
    torch.testing.assert_close(ours(activations), expected(activations))
    torch.testing.assert_close(ours(activations.to_sparse()), expected(activations.to_sparse()))


@pytest.mark.parametrize(("n", "d", "num_steps"), [(60, 16, 1), (60, 16, 30), (300, 20, 30)])
def test_more_vectors_than_dimensions_are_orthogonalised_alike(
    theirs: ModuleType, n: int, d: int, num_steps: int
) -> None:
    """The same steps on the same loss, as far as rounding lets them agree."""
    start = torch.randn(n, d)
    ours = directions.orthogonalize_embeddings(start, num_steps=num_steps, lr=0.01, chunk_size=16)
    expected = theirs.orthogonalize_embeddings(start, num_steps=num_steps, lr=0.01, chunk_size=16)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=0)
    assert float((ours - directions.unit_rows(start)).abs().max()) > 5e-3


@pytest.mark.parametrize(("n", "d"), [(10, 16), (16, 16), (40, 16)])
def test_ours_end_at_least_as_orthogonal(theirs: ModuleType, n: int, d: int) -> None:
    start = torch.randn(n, d)

    def squares(vectors: Tensor) -> float:
        vectors = vectors.double()
        return float((vectors @ vectors.T).fill_diagonal_(0).square().sum())

    expected = squares(theirs.orthogonalize_embeddings(start))
    assert squares(directions.orthogonalize_embeddings(start)) <= expected * (1 + 1e-4) + 1e-9


def test_cosines(theirs: ModuleType) -> None:
    a, b = torch.randn(7, 5) * 3, torch.randn(4, 5)
    torch.testing.assert_close(directions.cosine_similarities(a, b), theirs.cosine_similarities(a, b))


@pytest.mark.parametrize("percentiles", [None, [10, 50, 99]])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (75, 8)])
def test_superposition_statistics(theirs: ModuleType, n: int, d: int, percentiles: list[int] | None) -> None:
    ours = dictionary.FeatureDictionary(n, d, initializer=None, seed=1)
    expected = theirs.FeatureDictionary(n, d, initializer=None, seed=1)
    assert_equal_fields(
        superposition.compute_superposition_stats(ours, 16, percentiles=percentiles),
        theirs.compute_superposition_stats(expected, 16, percentiles=percentiles),
    )


@pytest.mark.parametrize(
    ("correlations", "default"),
    [
        (None, 0.0),
        ({(0, 1): 0.5, (2, 4): -0.3}, 0.1),
        ({(0, 1): 0.9, (1, 2): 0.9, (0, 2): -0.9}, 0.0),  # contradict each other
        (None, -0.5),
    ],
    ids=["none", "consistent", "contradiction", "negative"],
)
def test_correlation_matrices(
    theirs: ModuleType, correlations: dict[tuple[int, int], float] | None, default: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = correlation.create_correlation_matrix_from_correlations(5, correlations, default)
    expected = theirs.create_correlation_matrix_from_correlations(5, correlations, default)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert_equal_fields(
        correlation.compute_correlation_matrix_stats(ours), theirs.compute_correlation_matrix_stats(expected)
    )


@pytest.mark.parametrize("arguments", [(12, 0.5, 0.3), (9, 0.67, 0.29), (2, 1.0, 0.0), (1, 0.5, 0.5)])
def test_random_correlations_have_the_same_numbers(theirs: ModuleType, arguments: tuple[int, float, float]) -> None:
    ours = correlation.generate_random_correlations(*arguments, seed=0)
    expected = theirs.generate_random_correlations(*arguments, seed=0)
    assert len(ours) == len(expected)
    assert sum(r > 0 for r in ours.values()) == sum(r > 0 for r in expected.values())


@pytest.mark.parametrize("scale", [0.0, 0.1, 0.5])
def test_low_rank_correlations_of_a_seed(theirs: ModuleType, scale: float) -> None:
    """At a scale of 0.5, some rows have to be shrunk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = correlation.generate_random_low_rank_correlation_matrix(80, 6, scale, seed=4)
    expected = theirs.generate_random_low_rank_correlation_matrix(80, 6, scale, seed=4)
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert_equal_fields(
        correlation.compute_low_rank_correlation_matrix_stats(ours),
        theirs.compute_low_rank_correlation_matrix_stats(expected),
    )
