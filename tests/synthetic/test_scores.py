"""Scores of SAEs whose recovery is known, and that two evaluations agree."""

import json
from dataclasses import replace

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.sae import SAE, JumpReLU, ReLU, TopK
from unweave.synthetic import scores
from unweave.synthetic.dictionary import FeatureDictionary
from unweave.synthetic.generator import ActivationGenerator
from unweave.synthetic.hierarchy import Hierarchy
from unweave.synthetic.initialization import init_sae_to_match_feature_dict
from unweave.synthetic.node import HierarchyNode
from unweave.synthetic.scores import eval_sae_on_synthetic_data

K, D = 24, 32


@pytest.fixture(scope="module")
def features():
    return FeatureDictionary(K, D, bias=1.0, seed=0)


@pytest.fixture
def generator():
    return ActivationGenerator(K, 0.15, std_firing_magnitudes=0.1, seed=7)


def true_sae(features, d_sae=K, activation=None):
    """The answer: no magnitude of 1 ± 0.1 comes near the threshold of 0.1."""
    sae = SAE(D, d_sae, activation or JumpReLU(0.1))
    init_sae_to_match_feature_dict(sae, features)
    return sae


def evaluate(sae, features, generator, n=3000, **kwargs):
    return eval_sae_on_synthetic_data(sae, features, generator, n, **kwargs)


def test_the_truth_scores_one(features, generator):
    result = evaluate(true_sae(features), features, generator)
    for name in ("mcc", "mcc_live", "mcc_over_features", "uniqueness", "explained_variance", "shrinkage"):
        assert getattr(result, name) == pytest.approx(1, abs=1e-3), name
    assert result.coefficient_slope == pytest.approx(1, abs=1e-5)
    for classification in (result.classification, result.classification_live):
        assert min(vars(classification).values()) >= 0.999
    assert result.sae_l0 == result.true_l0
    assert (result.dead_latents, result.matching, result.num_samples, result.seed) == (0, "hungarian", 3000, 0)


def test_two_evaluations_agree_and_leave_the_generator_where_it_is(features):
    """D-SY-9. Whatever was drawn before, and whatever else draws."""
    one, other = (ActivationGenerator(K, 0.15, seed=seed) for seed in (1, 2))
    sae = SAE(D, K, TopK(4))
    first = evaluate(sae, features, one)
    other.sample(100)
    torch.randn(5)
    assert evaluate(sae, features, other) == first
    untouched = ActivationGenerator(K, 0.15, seed=1)
    assert torch.equal(one.sample(10), untouched.sample(10))
    assert evaluate(sae, features, one, seed=5).true_l0 != first.true_l0


def test_equal_to_dense_definitions(features, generator):
    sae = SAE(D, 30, TopK(3))
    result = evaluate(sae, features, generator, 2000, batch_size=2000, seed=3)
    truth = generator.fork(3).sample(2000)
    x = features(truth).detach()
    codes = sae.encode(x).detach()
    x_hat = sae(x).detach()
    assert result.true_l0 == pytest.approx((truth > 0).double().sum(1).mean().item())
    assert result.sae_l0 == pytest.approx((codes != 0).double().sum(1).mean().item())
    assert result.dead_latents == int((codes != 0).any(0).logical_not().sum())
    assert result.shrinkage == pytest.approx((x_hat.norm(dim=1) / x.norm(dim=1)).mean().item(), rel=1e-5)
    unexplained = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert result.explained_variance == pytest.approx(1 - unexplained.item(), rel=1e-4)
    assert result.uniqueness_bound == K / 30
    assert result.mcc_over_features == pytest.approx(result.mcc)  # every feature has a latent


def test_fewer_latents_than_features(features, generator):
    """mcc alone would not show that half of the features are missing."""
    result = evaluate(true_sae(features, K // 2), features, generator)
    assert result.mcc == pytest.approx(1, abs=1e-5)
    assert result.mcc_over_features == pytest.approx(0.5, abs=1e-5)
    assert result.uniqueness_bound == 1


def test_dead_latents_show_in_the_mean_over_all_only(features, generator):
    """pitfall_349"""
    sae = true_sae(features, 2 * K)
    with torch.no_grad():
        sae.threshold[K:] = 1e6
    result = evaluate(sae, features, generator)
    assert result.dead_latents == K
    assert result.classification.f1_score == pytest.approx(0.5)
    assert result.classification_live.f1_score == pytest.approx(1)
    assert result.mcc == result.mcc_live == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        sae.threshold[0] = 1e6
    partly = evaluate(sae, features, generator)
    assert partly.dead_latents == K + 1
    assert partly.classification_live.f1_score == pytest.approx(1)


def test_shrinkage_and_slope_of_an_sae_that_shrinks(features, generator):
    sae = true_sae(features)
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.W_enc *= 0.5
    without_bias = FeatureDictionary.from_vectors(features.feature_vectors)
    result = evaluate(sae, without_bias, generator)
    assert result.coefficient_slope == pytest.approx(0.5, rel=1e-4)
    assert result.shrinkage == pytest.approx(0.5, rel=1e-4)
    assert result.classification.f1_score == pytest.approx(1)


def test_rows_of_zero_norm_are_counted_and_reported(features):
    """D-SY-10: they lower L0 and have no shrinkage."""
    rare = ActivationGenerator(K, 0.01)
    empty = int((rare.fork(0).sample(1000) == 0).all(1).sum())
    assert 600 < empty < 950
    result = evaluate(true_sae(features), FeatureDictionary.from_vectors(features.feature_vectors), rare, 1000)
    assert result.zero_norm_samples == empty
    assert result.true_l0 == pytest.approx((rare.fork(0).sample(1000) > 0).sum().item() / 1000)


def test_nothing_to_score(features):
    """A world in which nothing varies, and an SAE in which nothing fires."""
    silent = ActivationGenerator(K, 1e-9)
    sae = SAE(D, K, ReLU())
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    result = evaluate(sae, FeatureDictionary.from_vectors(features.feature_vectors), silent, 100)
    assert result.shrinkage is result.coefficient_slope is result.mcc_live is None
    assert (result.sae_l0, result.true_l0, result.dead_latents, result.zero_norm_samples) == (0, 0, K, 100)
    assert result.classification_live.f1_score == 0


def test_hierarchies_are_scored(features):
    trees = Hierarchy([HierarchyNode(0, [HierarchyNode(1), HierarchyNode(2)])])
    world = ActivationGenerator(K, 0.4, modify_activations=trees.modifier)
    sae = true_sae(features)
    result = evaluate(sae, features, world, hierarchy=trees)
    assert result.hierarchy.parent_recall_given_child == pytest.approx(1)
    assert result.hierarchy.num_edges == 2
    with torch.no_grad():  # latent 0 is silenced by feature 1, whose latent writes the parent's direction as well
        sae.W_enc[:, 0] -= 2 * features.feature_vectors[1]
    absorbed = evaluate(sae, features, world, hierarchy=trees.roots[0])
    assert absorbed.hierarchy.absorption > 0.3
    assert absorbed.hierarchy.parent_recall_alone == pytest.approx(1)
    assert absorbed.to_log_dict()["hierarchy/absorption"] == absorbed.hierarchy.absorption


def test_a_change_of_units(features, generator):
    class Scaler:
        def scale(self, acts):
            return acts * 10

        def unscale(self, acts):
            return acts / 10

    sae = true_sae(features)
    expected = evaluate(sae, features, generator)
    with torch.no_grad():  # the same SAE for inputs times 10
        sae.W_dec *= 10
        sae.W_enc /= 10
        sae.b_dec *= 10
    found = evaluate(sae, features, generator, activation_scaler=Scaler())
    assert found.to_log_dict() == pytest.approx(expected.to_log_dict(), rel=1e-5)


def test_as_dictionaries(features, generator):
    result = evaluate(true_sae(features), features, generator, 500)
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["classification"]["f1_score"] == result.classification.f1_score
    assert values["hierarchy"] is None
    flat = result.to_log_dict("eval/")
    assert flat["eval/classification/f1_score"] == result.classification.f1_score
    assert all(isinstance(v, float | int) for v in flat.values())
    assert "eval/mcc_live" not in replace(result, mcc_live=None).to_log_dict("eval/")


def test_batches_make_no_difference_beyond_the_draws(features, monkeypatch):
    """Of a world in which every feature fires with its mean, the draws are the same in any batch size."""
    world = ActivationGenerator(K, 1.0, mean_firing_magnitudes=torch.linspace(0.5, 2, K))
    sae = SAE(D, K, TopK(4))
    results = [evaluate(sae, features, world, 100, batch_size=n) for n in (7, 100)]
    monkeypatch.setattr(scores, "BATCH_SIZE", 33)
    results.append(evaluate(sae, features, world, 100))
    for result in results[1:]:
        assert result.to_log_dict() == pytest.approx(results[0].to_log_dict(), abs=1e-6)


def test_bad_input(features, generator):
    sae = SAE(D, K, TopK(4))
    for arguments, message in (
        ({"num_samples": 0}, "num_samples must be .*at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be .*at least 1, got -1"),
    ):
        with pytest.raises(UnweaveError, match=message):
            eval_sae_on_synthetic_data(sae, features, generator, **arguments)
    with pytest.raises(UnweaveError, match=f"has 5 features and the dictionary {K}"):
        eval_sae_on_synthetic_data(sae, features, ActivationGenerator(5, 0.1))
    with pytest.raises(UnweaveError, match=f"width 9, and the dictionary's are of width {D}"):
        eval_sae_on_synthetic_data(SAE(9, K, TopK(4)), features, generator)


def test_an_sae_that_normalises_each_token_is_scored_on_what_it_gives_back(features, generator):
    sae = true_sae(features, activation=JumpReLU(0.01))
    sae.per_token = "constant_norm_rescale"
    result = evaluate(sae, features, generator)
    assert result.explained_variance > 0.5
