"""Training on plain tensors: it learns, it is exact, and it refuses what it cannot use."""

import json

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.objectives import AuxK, GhostGradients, Matryoshka, MultiTopK, PreActivation
from unweave.sae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.training import SAEConfig, train_on
from unweave.training.finish import finished_sae, save_finished
from unweave.training.schedules import learning_rate_factor
from unweave.training.trainee import Trainee
from unweave.training.window import follow_spread

ACTIVATIONS = [TopK(3), BatchTopK(3), ReLU(), JumpReLU(), Gated()]


def world(n_batches=60, n=256, d=16, features=32, scale=7.0, seed=0):
    """Sparse combinations of `features` unit directions, off centre and off scale."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, d, generator=generator), dim=1)
    for _ in range(n_batches):
        active = torch.rand(n, features, generator=generator) < 3 / features
        magnitude = 1 + torch.rand(n, features, generator=generator)
        yield scale * ((active * magnitude) @ directions + 0.5)


def explained_variance(sae, x):
    return 1 - ((sae(x) - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_learns(activation):
    """pitfall_174: from tensors, without a model."""
    (sae,) = train_on(list(world(300)), [SAEConfig(d_sae=48, activation=activation, lr=1e-2)], progress=False)
    x = torch.cat(list(world(2, seed=0)))
    assert explained_variance(sae, x) > 0.78
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(48), atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "objective"),
    [
        (BatchTopK(3), {"matryoshka": Matryoshka((0.25, 0.5))}),
        (ReLU(), {"matryoshka": Matryoshka((12, 24))}),
        (TopK(3), {"multi_topk": MultiTopK()}),
        (BatchTopK(3), {"multi_topk": MultiTopK(), "matryoshka": Matryoshka(), "ghost": GhostGradients()}),
        (JumpReLU(), {"pre_act": PreActivation()}),
    ],
    ids=str,
)
def test_learns_with_other_objectives(activation, objective):
    config = SAEConfig(d_sae=48, activation=activation, lr=5e-3, dead_after=2560, **objective)
    (sae,) = train_on(list(world(300)), [config], progress=False)
    assert explained_variance(sae, torch.cat(list(world(2, seed=0)))) > 0.7


def test_prefixes_of_a_matryoshka_sae_reconstruct_by_themselves():
    """What the first quarter of the latents explains, with the loss on prefixes and without."""
    x = torch.cat(list(world(2)))

    def explained_by_prefix(matryoshka):
        config = SAEConfig(d_sae=48, activation=BatchTopK(3), lr=5e-3, matryoshka=matryoshka)
        (sae,) = train_on(list(world(300)), [config], progress=False)
        codes = sae.encode(x)
        codes[:, 12:] = 0
        return explained_variance(lambda _: sae.decode(codes), x)

    assert explained_by_prefix(Matryoshka((0.25,))) > explained_by_prefix(None) + 0.1


def test_more_latents_help_a_multi_topk_sae():
    """With four times the k it was trained with, its reconstruction gets better, not worse."""

    def gain(multi_topk):
        config = SAEConfig(d_sae=48, activation=TopK(3), lr=5e-3, multi_topk=multi_topk)
        (sae,) = train_on(list(world(300)), [config], progress=False)
        x = torch.cat(list(world(2)))
        before, sae.activation = explained_variance(sae, x), TopK(12)
        return explained_variance(sae, x) - before

    assert gain(MultiTopK()) > max(0, gain(None))


def test_a_matryoshka_sae_is_saved_in_both_forms(tmp_path):
    """pitfall_191: the JumpReLU form that everybody reads, and SAELens' matryoshka_batchtopk beside it."""
    trainee = make_trainee(activation=BatchTopK(3), matryoshka=Matryoshka((4, 0.5)))
    batches = list(world(5))
    for x in batches:
        trainee.step(x)
    sae = finished_sae(trainee, batches, {})
    save_finished(sae, trainee.config, tmp_path)
    inference, training = SAE.load(tmp_path), SAE.load(tmp_path / "training")
    assert isinstance(inference.activation, JumpReLU)
    assert training.activation == BatchTopK(3)
    for loaded in (inference, training):
        torch.testing.assert_close(loaded(batches[0]), sae(batches[0]))
        assert loaded.metadata["matryoshka_widths"] == [4, 12, 24]
    written = json.loads((tmp_path / "training" / "cfg.json").read_text())
    assert written["architecture"] == "matryoshka_batchtopk"


def test_target_l0_is_reached():
    config = SAEConfig(d_sae=48, activation=JumpReLU(), lr=5e-3, threshold_lr=5e-3)
    (sae,) = train_on(list(world(400)), [config], progress=False)
    x = next(world(1, n=1000))
    # The default target of 32 of 48 latents is dense; the SAE must come near it.
    assert 20 < sae.encode_sparse(x).l0().mean() < 45


def test_several_at_once_equal_one_by_one():
    """Every SAE sees every batch, and none changes another."""
    configs = [SAEConfig(d_sae=24, activation=a) for a in ACTIVATIONS]
    together = train_on(list(world(10)), configs, progress=False)
    for i, config in enumerate(configs):
        (alone,) = train_on(list(world(10)), [config], seed=i, progress=False)
        for name, value in alone.state_dict().items():
            assert torch.equal(value, together[i].state_dict()[name])


def test_seed_is_used():
    """pitfall_162"""

    def weights(seed):
        return train_on(list(world(5)), [SAEConfig(d_sae=24, activation=TopK(3))], seed=seed, progress=False)[0].W_dec

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_scale_of_the_data_does_not_matter():
    """pitfall_026, pitfall_061, pitfall_111: the same data times 1000 give the same SAE in other units."""
    for activation in ACTIVATIONS:
        config = SAEConfig(d_sae=24, activation=activation)
        small, large = (train_on(list(world(20, scale=s)), [config], progress=False)[0] for s in (1.0, 1000.0))
        torch.testing.assert_close(small.W_dec, large.W_dec, atol=1e-3, rtol=1e-2)
        x = next(world(1, scale=1.0))
        torch.testing.assert_close(large(x * 1000) / 1000, small(x), atol=5e-2, rtol=1e-2)


def test_batches_are_not_changed():
    """pitfall_134"""
    batches = list(world(3))
    before = [b.clone() for b in batches]
    train_on(batches, [SAEConfig(d_sae=24, activation=TopK(3))], progress=False)
    assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))


def test_batch_topk_threshold_is_calibrated():
    """pitfall_048: the inference form's mean L0 is k on the calibration data."""
    batches = list(world(20))
    (sae,) = train_on(batches, [SAEConfig(d_sae=24, activation=BatchTopK(3))], progress=False)
    assert sae.encode_sparse(torch.cat(batches[-8:])).l0().mean() == pytest.approx(3, rel=0.01)
    assert sae.metadata["threshold_calibration_tokens"] == 8 * 256


def test_generators_of_a_stated_length():
    assert len(train_on(world(1000), [SAEConfig(d_sae=24, activation=TopK(3))], tokens=700, progress=False)) == 1
    with pytest.raises(UnweaveError, match="tokens="):
        train_on(world(3), [SAEConfig(d_sae=24, activation=TopK(3))], progress=False)
    with pytest.raises(UnweaveError, match="ran out after 512 of 1,000"):
        train_on(world(2), [SAEConfig(d_sae=24, activation=TopK(3))], tokens=1000, progress=False)


@pytest.mark.parametrize("n", [1, 2])
def test_tiny_batches(n):
    (sae,) = train_on([torch.randn(n, 4) for _ in range(5)], [SAEConfig(d_sae=8, activation=TopK(2))], progress=False)
    assert all(t.isfinite().all() for t in sae.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    """pitfall_096: bf16 activations are trained on in float32."""
    batches = [b.to(dtype) for b in world(5)]
    (sae,) = train_on(batches, [SAEConfig(d_sae=24, activation=TopK(3))], progress=False)
    assert sae.dtype == torch.float32


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no activations"),
        ([torch.zeros(4, 3)], "are 0"),
        ([torch.randn(4)], "shape"),
        ([torch.empty(0, 3)], "no activations"),
        ([torch.randn(4, 3), torch.randn(4, 5)], r"shape \(4, 5\)"),
        ([torch.randn(4, 3), torch.full((4, 3), float("nan"))], "batch 1.*NaN"),
        ([torch.randn(4, 3), torch.full((4, 3), float("inf"))], "batch 1.*infinite"),
    ],
)
def test_bad_batches(batches, message):
    with pytest.raises(UnweaveError, match=message):
        train_on(batches, [SAEConfig(d_sae=8, activation=TopK(2))], progress=False)


def test_no_sae():
    with pytest.raises(UnweaveError, match="SAEConfig"):
        train_on([torch.randn(4, 3)], [], progress=False)


def make_trainee(**kwargs):
    sample = next(world(1))
    return Trainee(SAEConfig(d_sae=24, **kwargs), sample, steps=100, tokens=100 * 256, seed=0)


def test_dead_latents_are_counted_in_tokens():
    """pitfall_107, pitfall_116: half the batch size, the same death time in tokens."""
    counts = []
    for n in (64, 32):
        trainee = make_trainee(activation=TopK(1), dead_after=256)
        x = next(world(1, n=1)).repeat(n, 1)  # one input: all but a few latents never fire
        while trainee.dead.sum() == 0:
            trainee.step(x)
        counts.append(trainee.step_count * n)
    assert counts[0] == counts[1] == 256


def test_dead_latents_are_revived():
    def dead_share(coefficient):
        trainee = make_trainee(activation=TopK(3), dead_after=1024, lr=1e-2, auxk=AuxK(coefficient))
        trainee.sae.b_enc.data[:12] = -3.0
        for x in world(100):
            trainee.step(x)
        return trainee.dead.float().mean().item()

    assert dead_share(0.0) > 0.3
    assert dead_share(1 / 32) < 0.2


@pytest.mark.parametrize(
    ("activation", "objective"),
    [
        (TopK(3), {"ghost": GhostGradients()}),
        (JumpReLU(), {"pre_act": PreActivation(0.1)}),
        (ReLU(), {"pre_act": PreActivation(0.1)}),
        (Gated(), {"pre_act": PreActivation(0.1)}),
    ],
    ids=str,
)
def test_dead_latents_are_revived_by_other_losses(activation, objective):
    """pitfall_127: every option runs, and does what it is for."""

    def dead_share(**objective):
        trainee = make_trainee(activation=activation, dead_after=1024, lr=1e-2, auxk=AuxK(0), **objective)
        trainee.sae.b_enc.data[:12] = -6.0
        for x in world(200):
            trainee.step(x)
        return trainee.dead.float().mean().item()

    assert dead_share() > 0.3
    assert dead_share(**objective) < 0.1


def test_unit_norm_after_the_step():
    """pitfall_150"""
    trainee = make_trainee(activation=TopK(3), lr=0.1)
    trainee.step(next(world(1)))
    torch.testing.assert_close(trainee.sae.W_dec.norm(dim=1), torch.ones(24))


def test_jumprelu_thresholds_move_and_stay_positive():
    """pitfall_059"""
    trainee = make_trainee(activation=JumpReLU(), threshold_lr=1e-2, warmup=0.0, sparsity_warmup=0.0)
    before = trainee.sae.threshold.detach().clone()
    for x in world(20):
        trainee.step(x)
    assert (trainee.sae.threshold - before).abs().mean() > 1e-2
    assert (trainee.sae.threshold >= 0).all()


def test_threshold_estimate_equals_the_first_observation():
    """pitfall_047, pitfall_049: bias-corrected; a batch in which nothing fires changes nothing."""
    trainee = make_trainee(activation=BatchTopK(3))
    x = next(world(1))
    with torch.no_grad():
        lowest = trainee.sae.training_codes(x * trainee.scale).codes.values.amin()
    trainee.step(x)
    assert trainee.sae.threshold.item() == pytest.approx(lowest.item(), rel=1e-5)
    trainee.sae.b_enc.data.fill_(-1e4)
    pointer, before = trainee.sae.threshold.data_ptr(), trainee.sae.threshold.clone()
    trainee.step(x)
    assert torch.equal(trainee.sae.threshold, before)
    assert trainee.sae.threshold.data_ptr() == pointer  # pitfall_054


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_steps_are_those_of_torchs_adam(activation):
    """Schedule, clipping and unit decoder rows included; W_enc is a transposed view, thresholds have their own rate."""
    own, other = (
        make_trainee(activation=activation, lr=2e-3, threshold_lr=1e-3, grad_clip=0.02, warmup=0.5, precision="fp32")
        for _ in range(2)
    )
    sae, parameters = other.sae, other.optimizer.parameters
    adam = torch.optim.Adam([{"params": [p], "lr": other.rates[name]} for name, p in parameters.items()], eps=1e-8)
    clipped = 0
    for step, x in enumerate(world(8)):
        own.step(x)
        x = x * other.scale
        follow_spread(other, x)
        made = other._autograd(x, min(1.0, step / 10))
        norm = made.squares.sqrt().item()
        clip = min(1.0, 0.02 * sae.d_in / norm)
        clipped += clip < 1
        for (name, parameter), group in zip(parameters.items(), adam.param_groups, strict=True):
            parameter.grad = made.grads[name] * clip
            group["lr"] = other.rates[name] * min(1.0, (step + 1) / 50)
        adam.step()
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True) if other.config.decoder_is_unit else 1
            if "threshold" in parameters:
                sae.threshold.clamp_(min=0)
            other._track(made, len(x))
        other.step_count += 1
        for parameter in parameters.values():
            parameter.grad = None
        for name, parameter in parameters.items():
            got = dict(own.sae.named_parameters())[name]
            torch.testing.assert_close(got, parameter, atol=2e-6, rtol=1e-4, msg=f"{name} after step {step}")
    assert clipped > 0
    moments = own.optimizer.state_dict()
    for name, parameter in parameters.items():
        for key in ("exp_avg", "exp_avg_sq"):
            got, expected = moments[name][key], adam.state[parameter][key]
            if parameter.ndim == 2 and not parameter.is_contiguous():
                expected = expected.T
            torch.testing.assert_close(got.flatten(), expected.flatten(), atol=1e-5, rtol=1e-3)


def test_unequal_batches_never_reverse_the_learning_rate():
    batches = [torch.randn(640, 4), *(torch.randn(16, 4) for _ in range(40))]
    for tokens in (None, 1280):
        (sae,) = train_on(batches, [SAEConfig(d_sae=8, activation=TopK(2))], tokens=tokens, progress=False)
        assert all(t.isfinite().all() for t in sae.state_dict().values())
    assert min(learning_rate_factor(s, 2, 0.05, 0.2) for s in range(41)) == 0


def test_batches_with_a_graph():
    """Training an SAE does not train whatever made its batches."""
    weight = torch.randn(4, 4, requires_grad=True)
    batches = [torch.randn(32, 4) @ weight for _ in range(3)]
    train_on(batches, [SAEConfig(d_sae=8, activation=TopK(2))] * 2, progress=False)
    assert weight.grad is None


@pytest.mark.parametrize("scale", [1e-24, 1e20])
def test_extreme_scales(scale):
    (sae,) = train_on(list(world(30, scale=scale)), [SAEConfig(d_sae=24, activation=TopK(3), lr=5e-3)], progress=False)
    x = next(world(1, scale=1.0))
    assert explained_variance(lambda x: sae(x * scale) / scale, x) > 0


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_constant_activations(activation):
    """Nothing to explain is no reason to crash."""
    batches = [torch.ones(64, 4) for _ in range(30)]
    assert train_on(batches, [SAEConfig(d_sae=8, activation=activation)], progress=True)


def test_uneven_norms_of_a_ranked_sae_are_refused_before_training():
    with pytest.raises(UnweaveError, match="unit_norm"):
        SAEConfig(activation=TopK(), unit_norm=False)
