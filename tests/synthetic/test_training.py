"""Toys are trained by the ordinary trainer, recover what they can, and change nothing that they should not."""

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.objectives import TargetL0
from unweave.sae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.synthetic.dictionary import FeatureDictionary
from unweave.synthetic.generator import ActivationGenerator
from unweave.synthetic.initialization import init_sae_to_match_feature_dict
from unweave.synthetic.scores import eval_sae_on_synthetic_data
from unweave.synthetic.training import SyntheticActivationIterator, Toys, train_toy_sae, with_schedule
from unweave.training import L0Controller
from unweave.training.config import SAEConfig

K, D = 32, 24


@pytest.fixture(scope="module")
def features():
    return FeatureDictionary(K, D, bias=1.0, seed=0)


def world(p=0.1, seed=3, k=K):
    return ActivationGenerator(k, p, std_firing_magnitudes=0.1, seed=seed)


def test_a_topk_sae_recovers_the_dictionary():
    """64 independent features of which 20 fire, in 64 dimensions: about as many as a k of 21 has room for."""
    features = FeatureDictionary(64, 64, bias=1.0, seed=0)
    generator = world(20 / 64, k=64)
    sae = train_toy_sae(SAEConfig(d_sae=64, activation=TopK(21), lr=1e-2), features, generator, 200_000, 512)
    result = eval_sae_on_synthetic_data(sae, features, generator, 20_000)
    assert result.mcc >= 0.95
    assert result.classification.f1_score >= 0.9
    assert result.uniqueness >= 0.95


@pytest.mark.parametrize("activation", [BatchTopK(4), TopK(4), ReLU(), JumpReLU(), Gated()], ids=lambda a: a.name)
def test_every_architecture_finds_the_directions(activation):
    features = FeatureDictionary(128, 64, bias=1.0, seed=0)
    generator = world(4 / 128, k=128)
    sparsity = TargetL0(4) if isinstance(activation, JumpReLU) else None
    controller = None if activation.ranked or sparsity else L0Controller(5.0)
    config = SAEConfig(d_sae=128, activation=activation, lr=1e-2, sparsity=sparsity, l0_controller=controller)
    sae = train_toy_sae(config, features, generator, 120_000, 128)
    result = eval_sae_on_synthetic_data(sae, features, generator, 20_000)
    assert result.mcc >= 0.93
    assert result.dead_latents <= 6
    assert result.classification.recall >= 0.75


def test_batches_are_the_world(features):
    iterator = SyntheticActivationIterator(features, world(), 16)
    own = world()
    for _, batch in zip(range(3), iterator, strict=False):
        assert not batch.requires_grad
        torch.testing.assert_close(batch, features(own.sample(16)).detach())
    iterator.skip(2)
    own.sample(16), own.sample(16)
    torch.testing.assert_close(iterator.next_batch(), features(own.sample(16)).detach())
    assert not torch.equal(iterator.held_out()[:16], features(world().sample(16)))
    assert torch.equal(iterator.held_out(), iterator.held_out())


@pytest.mark.parametrize("activation", [TopK(4), BatchTopK(4), ReLU(), JumpReLU(), Gated()], ids=lambda a: a.name)
def test_an_sae_is_trained_in_place(features, activation):
    """It goes on from its own weights: the truth is still the truth after a few steps, in the world's own units."""
    scaled = FeatureDictionary.from_vectors(3 * features.feature_vectors, 5 * features.bias)
    sae = SAE(D, K, activation)
    init_sae_to_match_feature_dict(sae, scaled)
    before = sae.W_dec.clone()
    assert train_toy_sae(sae, scaled, world(), 5 * 256, 256, lr=1e-5) is sae
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(K))
    cosine = torch.cosine_similarity(sae.W_dec, before, dim=1)
    assert cosine.min() > 0.9999
    assert not torch.equal(sae.W_dec, before / 3)
    assert sae.metadata["training_steps"] == 5
    torch.testing.assert_close(sae.b_dec, scaled.bias, atol=0.02, rtol=0.02)


def test_training_in_place_is_training(features):
    sae = SAE(D, K, TopK(4))
    generator = world()
    before = eval_sae_on_synthetic_data(sae, features, generator, 5000)
    train_toy_sae(sae, features, generator, 20_000, 256, lr=1e-2)
    after = eval_sae_on_synthetic_data(sae, features, generator, 5000)
    assert after.explained_variance > before.explained_variance + 0.2


def test_same_seeds_same_sae(features):
    def weights(stream=3, seed=0):
        config = SAEConfig(d_sae=K, activation=TopK(4))
        return train_toy_sae(config, features, world(seed=stream), 2000, 256, seed=seed).W_dec

    assert torch.equal(weights(), weights())
    assert not torch.equal(weights(), weights(stream=4))
    assert not torch.equal(weights(), weights(seed=1))


def test_snapshots_are_evenly_spaced_and_finished(features):
    seen, config = [], SAEConfig(d_sae=K, activation=BatchTopK(4))
    sae = train_toy_sae(config, features, world(), 1000, 100, n_snapshots=4, snapshot_fn=seen.append)
    assert [s.n_training_steps for s in seen] == [3, 5, 8, 10]
    assert [s.n_training_samples for s in seen] == [300, 500, 800, 1000]
    assert torch.equal(seen[-1].sae.W_dec, sae.W_dec)
    assert not torch.equal(seen[0].sae.W_dec, sae.W_dec)
    assert seen[0].sae.encode_sparse(features(world().sample(2000))).l0().mean() == pytest.approx(4, rel=0.1)
    more = []
    train_toy_sae(config, features, world(), 200, 100, n_snapshots=4, snapshot_fn=more.append)
    assert [s.n_training_steps for s in more] == [1, 1, 2, 2]


def test_several_see_the_same_stream(features):
    """Side by side they end as they would alone."""
    configs = [SAEConfig(d_sae=K, activation=a) for a in (TopK(4), JumpReLU())]
    iterator = SyntheticActivationIterator(features, world(), 128)
    toys = Toys(configs, iterator, 640, seed=0, starts=[None, None])
    for batch, _ in zip(iterator, range(5), strict=False):
        for trainee in toys.trainees:
            trainee.step(batch.clone())
    alone = train_toy_sae(configs[0], features, world(), 640, 128)
    assert torch.equal(toys.finished(0).W_dec, alone.W_dec)


def test_schedules_in_steps():
    config = SAEConfig(d_sae=K, activation=TopK(4), lr=1e-2)
    assert with_schedule(config, 100, None, None, None) == config
    changed = with_schedule(config, 100, 1e-3, 7, 0)
    assert (changed.lr, round(changed.warmup * 100), changed.decay) == (1e-3, 7, 0)


def test_a_failure_leaves_the_sae_as_it_was(features):
    sae = SAE(D, K, TopK(4))
    before = {name: value.clone() for name, value in sae.state_dict().items()}

    def fail(snapshot):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train_toy_sae(sae, features, world(), 1000, 100, n_snapshots=1, snapshot_fn=fail)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"training_samples": 0}, "training_samples .*0"),
        ({"batch_size": 0}, "batch_size .*0"),
        ({"n_snapshots": 2}, "n_snapshots=2 and snapshot_fn=None go together"),
        ({"lr_warm_up_steps": 11, "training_samples": 1000, "batch_size": 100}, "lr_warm_up_steps is 11.*10 steps"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"config": SAEConfig(d_sae=K, activation=TopK(5))}, r"activation=TopK\(k=4\), and activation=TopK\(k=5\)"),
    ],
)
def test_bad_input(features, arguments, message):
    with pytest.raises(UnweaveError, match=message):
        train_toy_sae(SAE(D, K, TopK(4)), features, world(), **{"training_samples": 100, **arguments})


def test_what_does_not_fit(features):
    config = SAEConfig(d_sae=K, activation=TopK(4))
    with pytest.raises(UnweaveError, match="sae is a config already"):
        train_toy_sae(config, features, world(), 100, config=config)
    with pytest.raises(UnweaveError, match="width 9"):
        train_toy_sae(SAE(9, K, TopK(4)), features, world(), 100)
    with pytest.raises(UnweaveError, match="5 features and the dictionary 32"):
        train_toy_sae(config, features, world(k=5), 100)
    with pytest.raises(UnweaveError, match="does not subtract its decoder bias"):
        train_toy_sae(SAE(D, K, TopK(4), apply_b_dec_to_input=False), features, world(), 100)
