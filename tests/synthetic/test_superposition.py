import pytest
import torch

from unweave import UnweaveError
from unweave.synthetic import directions
from unweave.synthetic.dictionary import FeatureDictionary
from unweave.synthetic.directions import cosine_similarities
from unweave.synthetic.superposition import compute_superposition_stats

K, D = 37, 5


@pytest.fixture
def dictionary():
    return FeatureDictionary.from_vectors(torch.randn(K, D) * torch.rand(K, 1))


def others(dictionary):
    """The absolute cosines of each feature with all others, `(K, K - 1)`, the plain way."""
    cosines = cosine_similarities(dictionary.feature_vectors, dictionary.feature_vectors).detach()
    return cosines.abs()[~torch.eye(len(cosines), dtype=torch.bool)].view(len(cosines), -1)


@pytest.mark.parametrize("batch_size", [1, 10, 1024])
def test_statistics_the_plain_way(dictionary, batch_size):
    stats = compute_superposition_stats(dictionary, batch_size, percentiles=[0, 37.5, 50, 95, 100])
    expected = others(dictionary)
    torch.testing.assert_close(stats.max_abs_cos_sims, expected.amax(1))
    for percentile, values in stats.percentile_abs_cos_sims.items():
        torch.testing.assert_close(values, expected.quantile(percentile / 100, dim=1))
        assert stats.mean_percentile_abs_cos_sim[percentile] == pytest.approx(float(values.mean()))
    assert stats.mean_max_abs_cos_sim == pytest.approx(float(expected.amax(1).mean()))
    assert stats.mean_abs_cos_sim == pytest.approx(float(expected.mean()))
    torch.testing.assert_close(stats.expected_interference, expected.square().sum(1))
    assert stats.mean_expected_interference == pytest.approx(float(expected.square().sum(1).mean()))
    assert (stats.num_features, stats.hidden_dim) == (K, D)
    assert stats.feature_indices.tolist() == list(range(K))


def test_blocks_are_bounded_in_memory(dictionary, monkeypatch):
    """pitfall_352: at a million features a block has few rows, and says the same."""
    whole = compute_superposition_stats(dictionary)
    monkeypatch.setattr(directions, "BLOCK_ELEMENTS", 2 * K + 1)
    split = compute_superposition_stats(dictionary)
    assert [part.stop - part.start for part in directions.blocks(5, K, 1024)] == [2, 2, 1]
    torch.testing.assert_close(split.percentile_abs_cos_sims, whole.percentile_abs_cos_sims)
    assert list(whole.percentile_abs_cos_sims) == [95, 99]


def test_a_sample_is_exact_for_its_features(dictionary):
    whole = compute_superposition_stats(dictionary)
    part = compute_superposition_stats(dictionary, num_sampled=9, seed=0)
    chosen = part.feature_indices
    assert len(chosen.unique()) == 9
    assert (chosen.diff() > 0).all()
    torch.testing.assert_close(part.max_abs_cos_sims, whole.max_abs_cos_sims[chosen])
    torch.testing.assert_close(part.percentile_abs_cos_sims[95], whole.percentile_abs_cos_sims[95][chosen])
    torch.testing.assert_close(part.expected_interference, whole.expected_interference[chosen])
    assert part.mean_abs_cos_sim == pytest.approx(float(others(dictionary)[chosen].mean()))
    assert not torch.equal(chosen, compute_superposition_stats(dictionary, num_sampled=9, seed=1).feature_indices)


def test_interference_of_features_that_fire():
    """Against 100 000 samples; 6 standard errors on each of 6 features: 1.2e-8."""
    dictionary = FeatureDictionary(6, 3, initializer=None, seed=0)
    p, mean, std = torch.linspace(0.1, 0.9, 6), torch.linspace(0.5, 2, 6), torch.linspace(0, 0.6, 6)
    stats = compute_superposition_stats(
        dictionary, firing_probabilities=p, mean_firing_magnitudes=mean, std_firing_magnitudes=std
    )
    generator, shape = torch.Generator().manual_seed(0), (100_000, 6)
    # A Gaussian given that it is positive, by its quantile function.
    below = torch.special.ndtr(-mean.double() / std)
    u = below + (1 - below) * torch.rand(shape, generator=generator, dtype=torch.float64)
    magnitudes = mean + std * torch.special.ndtri(u).nan_to_num(0, 0, 0)
    a = magnitudes * (torch.rand(shape, generator=generator) < p)
    cosines = (dictionary.feature_vectors @ dictionary.feature_vectors.T).detach().double().fill_diagonal_(0)
    squares = (a @ cosines).square()
    error = (squares.mean(0) - stats.expected_interference).abs()
    assert (error < 6 * squares.std(0) / 100_000**0.5).all()


def test_orthogonal_features_do_not_interfere():
    stats = compute_superposition_stats(FeatureDictionary(8, 8, seed=0), firing_probabilities=0.5)
    assert stats.mean_max_abs_cos_sim < 1e-6
    assert stats.mean_expected_interference < 1e-12


@pytest.mark.parametrize("num_features", [1, 2])
def test_few_features(num_features):
    dictionary = FeatureDictionary.from_vectors(torch.tensor([[3.0, 4.0], [1.0, 0.0]])[:num_features])
    stats = compute_superposition_stats(dictionary, percentiles=[0, 50])
    expected = [0.6, 0.6] if num_features == 2 else [0.0]
    for found in (stats.max_abs_cos_sims, *stats.percentile_abs_cos_sims.values()):
        assert found.tolist() == pytest.approx(expected)
    assert stats.mean_abs_cos_sim == pytest.approx(expected[0])
    assert compute_superposition_stats(dictionary, percentiles=[]).percentile_abs_cos_sims == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"percentiles": [101]}, "percentiles must be a finite number at least 0 and at most 100, got 101"),
        ({"num_sampled": 38}, "num_sampled must be at most num_features=37, got 38"),
        ({"num_sampled": 0}, "num_sampled must be a whole number of at least 1, got 0"),
        ({"firing_probabilities": 1.5}, "firing_probabilities must be finite, at least 0 and at most 1, got 1.5"),
        ({"firing_probabilities": torch.ones(3)}, r"must be one number or num_features=37, got \(3,\)"),
        ({"firing_probabilities": 0.5, "std_firing_magnitudes": -1}, "std_firing_magnitudes must be .* got -1"),
    ],
)
def test_bad_input(dictionary, arguments, message):
    with pytest.raises(UnweaveError, match=message):
        compute_superposition_stats(dictionary, **arguments)


def test_a_feature_without_direction(dictionary):
    dictionary.feature_vectors.data[3] = 0
    with pytest.raises(UnweaveError, match="feature_vectors must be finite and not 0 in every row, and row 3 is not"):
        compute_superposition_stats(dictionary)
