"""Comparisons of what is random are at fixed seeds, with Z = 5 standard deviations: 6e-7 for each if all is right."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from unweave import UnweaveError
from unweave.synthetic.dictionary import FeatureDictionary
from unweave.synthetic.generator import ActivationGenerator
from unweave.synthetic.hierarchy import Hierarchy, HierarchyConfig
from unweave.synthetic.magnitudes import FoldedNormalMagnitudeConfig, LinearMagnitudeConfig
from unweave.synthetic.model import (
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
)
from unweave.synthetic.node import HierarchyNode
from unweave.synthetic.probabilities import (
    ConstantFiringProbabilityConfig,
    RandomFiringProbabilityConfig,
    ZipfianFiringProbabilityConfig,
)

Z = 5.0
K, D = 40, 16


def config(**options: Any) -> SyntheticModelConfig:
    return SyntheticModelConfig(**({"num_features": K, "hidden_dim": D, "seed": 3} | options))


FULL = config(
    firing_probability=RandomFiringProbabilityConfig(0.4, 0.05),
    hierarchy=HierarchyConfig(4, 3, 2, mutually_exclusive_portion=0.5, scale_children_by_parent=True),
    orthogonalization=OrthogonalizationConfig(num_steps=20),
    correlation=LowRankCorrelationConfig(rank=3, correlation_scale=0.2),
    std_firing_magnitudes=FoldedNormalMagnitudeConfig(0.2, 0.1),
    mean_firing_magnitudes=LinearMagnitudeConfig(2.0, 1.0),
    bias=0.5,
)


@pytest.mark.parametrize("cfg", [config(), FULL, config(bias=False, hierarchy=HierarchyConfig(2, (2, 4)))])
def test_configs_pass_through_json(cfg):
    assert SyntheticModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


@pytest.mark.parametrize("cfg", [config(), FULL], ids=["plain", "full"])
def test_hidden_activations_are_the_sum_of_the_features_that_fire(cfg):
    model = SyntheticModel(cfg)
    hidden, codes = model.sample_with_codes(30)
    expected = codes.to_dense() @ model.feature_dict.feature_vectors + model.feature_dict.bias
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    assert not hidden.requires_grad
    assert 0 < codes.l0().mean() < K
    fork = model.fork(model.activation_generator.seed)
    assert torch.equal(fork.sample(30), hidden)
    again, features = fork.fork(fork.activation_generator.seed).sample_with_features(30)
    assert torch.equal(again, hidden)
    assert torch.equal(features, codes.to_dense())


def test_a_seed_defines_everything():
    torch.manual_seed(0)
    first = SyntheticModel(FULL)
    torch.manual_seed(1)
    second = SyntheticModel(FULL)
    assert first.hierarchy == second.hierarchy
    assert torch.equal(first.sample(50), second.sample(50))
    assert not torch.equal(SyntheticModel(config(seed=4)).sample(50), SyntheticModel(config()).sample(50))


def test_without_a_seed_models_differ():
    one, other = (SyntheticModel(config(seed=None)) for _ in range(2))
    assert not torch.equal(one.feature_dict.feature_vectors, other.feature_dict.feature_vectors)


def test_features_are_random_unless_orthogonalisation_is_asked_for():
    def overlap(model: SyntheticModel) -> float:
        v = model.feature_dict.feature_vectors.detach()
        torch.testing.assert_close(v.norm(dim=1), torch.ones(K))
        return float((v @ v.T - torch.eye(K)).square().sum())

    random, arranged = (
        SyntheticModel(config(orthogonalization=how)) for how in (None, OrthogonalizationConfig(num_steps=100))
    )
    assert overlap(arranged) < 0.8 * overlap(random)
    assert random.feature_dict.bias.norm().item() == pytest.approx(1)
    assert SyntheticModel(config(bias=False)).feature_dict.bias.tolist() == [0.0] * D


def test_compensation_keeps_the_requested_rates():
    n, shape = 200_000, ZipfianFiringProbabilityConfig(1.0, 0.9, 0.02)
    trees = [
        HierarchyNode(0, [HierarchyNode(i) for i in (10, 11, 12)], mutually_exclusive_children=True),
        HierarchyNode(1, [HierarchyNode(5, [HierarchyNode(20)]), HierarchyNode(6)]),
    ]
    requested = shape.generate(K).double()
    for compensated in (True, False):
        cfg = config(firing_probability=shape, hierarchy=HierarchyConfig(compensate_probabilities=compensated))
        generator = SyntheticModel(cfg, hierarchy=Hierarchy(trees)).activation_generator
        error = generator.sample_codes(n).firing_counts() - n * requested
        standardised = error / (n * requested * (1 - requested)).sqrt()
        assert (standardised.abs().max() < Z) == compensated
        assert torch.equal(generator.firing_probabilities, requested.float()) != compensated


def test_own_parts_are_used():
    features = FeatureDictionary(K, D, initializer=None, seed=0)
    generator = ActivationGenerator(K, 0.2, seed=0)
    model = SyntheticModel(config(), features, generator)
    assert model.feature_dict is features
    assert model.activation_generator is generator
    trees = Hierarchy([HierarchyNode(0, [HierarchyNode(1)])])
    matrix = torch.eye(K)
    matrix[2, 3] = matrix[3, 2] = 0.9
    cfg = config(firing_probability=ConstantFiringProbabilityConfig(0.3))
    model = SyntheticModel(cfg, hierarchy=trees, correlation_matrix=matrix)
    assert torch.equal(model.correlation_matrix, matrix)
    fires = model.sample_with_features(4000)[1] > 0
    assert not fires[:, 1][~fires[:, 0]].any()
    assert (fires[:, 2] & fires[:, 3]).float().mean() > 0.2  # 0.09 if they were independent


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(UnweaveError, match="have 39 and 40 features in 16 dimensions, and the config says 40 in 16"):
        SyntheticModel(config(), FeatureDictionary(K - 1, D, initializer=None))
    with pytest.raises(UnweaveError, match="have 40 and 39 features in 16"):
        SyntheticModel(config(), activation_generator=ActivationGenerator(K - 1, 0.1))
    with pytest.raises(UnweaveError, match="leave correlation_matrix out"):
        SyntheticModel(config(), activation_generator=ActivationGenerator(K, 0.1), correlation_matrix=torch.eye(K))


def test_moving_and_casting_go_on_where_the_stream_was():
    """pitfall_347: D-SY-3"""
    model, other = SyntheticModel(FULL), SyntheticModel(FULL)
    model.use_sparse_tensors = True
    model.sample(7), other.sample(7)
    assert model.to("cpu") is model
    assert model.use_sparse_tensors
    hidden, features = model.sample_with_features(20)
    expected = other.sample_with_features(20)
    assert torch.equal(hidden, expected[0])
    assert features.layout == torch.sparse_coo
    assert torch.equal(features.to_dense(), expected[1])
    assert model.to(torch.float64).sample(2).dtype == torch.float64
    assert SyntheticModel(config(dtype="bfloat16")).sample(2).dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_samples_the_same():
    model, moved, made = SyntheticModel(FULL), SyntheticModel(FULL).to("cuda"), SyntheticModel(FULL, device="cuda")
    hidden, features = model.sample_with_features(50)
    for other in (moved, made):
        assert other.device.type == "cuda"
        on_gpu = other.sample_with_features(50)
        # Scaling by the parent and sums of features round differently.
        torch.testing.assert_close(on_gpu[0].cpu(), hidden, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(on_gpu[1].cpu(), features, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_features": 0}, "num_features must be a whole number of at least 1, got 0"),
        ({"hidden_dim": -3}, "hidden_dim must be a whole number of at least 1, got -3"),
        ({"bias": -1.0}, "bias must be a finite number at least 0, got -1.0"),
        ({"mean_firing_magnitudes": -1.0}, "mean_firing_magnitudes must be"),
        ({"dtype": "float31"}, "did you mean 'float32'"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(UnweaveError, match=message):
        config(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_feature": 3}, "no 'num_feature'; did you mean 'num_features'"),
        ({"correlation": {"rnk": 3}}, r"no 'correlation.rnk'; did you mean 'rank'"),
        ({"firing_probability": {"generator_name": "zipf"}}, "'zipfian'"),
        ({"hierarchy": {"max_depths": 2}}, "did you mean 'max_depth'"),
    ],
)
def test_bad_dictionaries(change, message):
    with pytest.raises(UnweaveError, match=message):
        SyntheticModelConfig.from_dict(config().to_dict() | change)


def test_a_dictionary_that_lacks_something():
    with pytest.raises(UnweaveError, match="needs 'hidden_dim', which is missing"):
        SyntheticModelConfig.from_dict({"num_features": 3})
