"""One step of a trainee: what its loss is made of, what it counts, and what it leaves behind."""

import dataclasses
import weakref
from collections import Counter
from typing import get_args, get_type_hints

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.objectives import L1, AuxK, GhostGradients, MultiTopK, PreActivation
from unweave.sae import SAE, AbsTopK, BatchTopK, ReLU, TopK
from unweave.sae.codes import DenseCodes, SparseCodes
from unweave.training import SAEConfig
from unweave.training.checkpoint import load_checkpoint, save_checkpoint
from unweave.training.finish import finished_sae
from unweave.training.trainee import Trainee

N, D, M = 64, 12, 30
STILL = {"warmup": 0.0, "decay": 0.0, "sparsity_warmup": 0.0, "grad_clip": None}


def inputs(n=N, seed=0, shift=1.0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + shift


def make(x=None, **settings):
    settings = {"d_sae": M, "activation": TopK(3)} | settings
    x = inputs() if x is None else x
    return Trainee(SAEConfig(**settings), x, steps=100, tokens=100 * len(x), seed=0)


def test_a_sample_in_float64_stays_what_it_is():
    """It is measured in float64, where a cast is no copy."""
    x = inputs().double()
    before = x.clone()
    make(x)
    assert torch.equal(x, before)


def kill(trainee, latents=slice(0, 10)):
    trainee.tokens_since_fired[latents] = trainee.dead_after


def tensors_of(trainee):
    return {n: t.clone() for n, t in trainee.sae.state_dict().items()} | {
        f"{name} {i}": moment.clone()
        for name, both in trainee.optimizer.moments.items()
        for i, moment in enumerate(both)
    }


@pytest.mark.parametrize("fused", [True, False])
def test_batches_in_which_nothing_fires_do_not_count_for_the_threshold(fused):
    """pitfall_050, 051: before the first code there is no threshold, afterwards it is a mean of what there was."""
    trainee, x = make(activation=BatchTopK(3), auxk=AuxK(0)), inputs()
    if not fused:
        trainee.fused = None
    bias, smallest = trainee.sae.b_enc, []

    def step(fires):
        with torch.no_grad():
            bias.fill_(0.0 if fires else -100.0)
            codes = trainee.sae.training_codes(x * trainee.scale).codes.values
        trainee.step(x)
        assert trainee.sae.threshold.dtype == torch.float32
        if fires:
            smallest.append(codes[codes > 0].min())

    for _ in range(3):
        step(fires=False)
        assert trainee.sae.threshold.isnan()
    step(fires=True)
    torch.testing.assert_close(trainee.sae.threshold, smallest[0])
    step(fires=False)
    torch.testing.assert_close(trainee.sae.threshold, smallest[0])
    step(fires=True)
    # A mean with weights that fall by a hundredth from batch to batch.
    torch.testing.assert_close(trainee.sae.threshold, (0.99 * smallest[0] + smallest[1]) / 1.99)
    resumed = make(activation=BatchTopK(3), auxk=AuxK(0))
    resumed.load_state_dict(trainee.state_dict())
    for t in (trainee, resumed):
        t.step(x)
    assert torch.equal(resumed.sae.threshold, trainee.sae.threshold)


@pytest.mark.parametrize(
    "settings",
    [
        lambda c: {"auxk": AuxK(c)},
        lambda c: {"activation": AbsTopK(3), "auxk": AuxK(c)},
        lambda c: {"ghost": GhostGradients(c)},
        lambda c: {"activation": ReLU(), "auxk": AuxK(0), "pre_act": PreActivation(c)},
        lambda c: {"activation": ReLU(), "auxk": AuxK(0), "sparsity": L1(c)},
        lambda c: {"multi_topk": MultiTopK(9, c)},
    ],
    ids=["auxk", "auxk of signed codes", "ghost", "pre_act", "l1", "multi_topk"],
)
def test_a_coefficient_acts_once(settings):
    """pitfall_092: the loss of a step is linear in it."""
    losses = []
    for coefficient in (0.25, 0.5, 1.0):
        trainee = make(**settings(coefficient), **STILL)
        kill(trainee)
        losses.append(trainee.step(inputs(seed=1)).loss.double() / N)
    first, second = losses[1] - losses[0], losses[2] - losses[1]
    assert first > 0
    torch.testing.assert_close(second, 2 * first, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("activation", [TopK(3), ReLU()], ids=str)
def test_terms_keep_their_ratio_whatever_the_scale_of_the_data(activation):
    """pitfall_091: the main loss, the penalty and the dead latents' share of a step on data times 10."""
    losses = []
    for scale in (1, 10):
        for coefficient in (0.0, 1.0):
            trainee = make(scale * inputs(), activation=activation, auxk=AuxK(coefficient), **STILL)
            kill(trainee)
            losses.append(trainee.step(scale * inputs(seed=1)).loss / N)
    assert losses[1] > losses[0] + 0.1
    torch.testing.assert_close(losses[:2], losses[2:], rtol=1e-4, atol=1e-5)


def test_nothing_of_a_step_lives_on_in_the_next_one():
    """pitfall_299: when the next forward pass begins, the last one's reconstruction and codes are gone."""
    alive, kept = [], []

    class Watched(Trainee):
        def loss(self, x, sparsity_scale, target=None):
            kept.append([ref() is not None for ref in alive])
            loss, x_hat, codes = super().loss(x, sparsity_scale, target)
            alive[:] = [weakref.ref(tensor) for tensor in (loss, x_hat, codes.values, codes.indices)]
            return loss, x_hat, codes

    trainee = Watched(SAEConfig(d_sae=M, activation=TopK(2)), inputs(), steps=9, tokens=9 * N, seed=0)
    for _ in range(3):
        trainee.step(inputs())
    assert kept == [[], [False] * 4, [False] * 4]


def test_norms_and_firings_are_summed_once_in_a_step(monkeypatch):
    """pitfall_298"""
    trainee, calls = make(activation=ReLU(), sparsity=L1(1.0), unit_norm=False), Counter()
    trainee.fused = None
    norms = SAE.decoder_norms

    def counting(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    for kind in (SparseCodes, DenseCodes):
        monkeypatch.setattr(kind, "firing_counts", counting("firings", kind.firing_counts))
    monkeypatch.setattr(SAE, "decoder_norms", counting("norms", norms))
    trainee.step(inputs())
    assert calls == {"firings": 1, "norms": 1}


def test_dead_latents_are_ranked_among_themselves():
    """pitfall_128: all of them far below 0, and a living one at exactly 0, which a mask of zeros would choose."""
    trainee, x = make(), inputs()
    dead = torch.tensor([3, 8, 20])
    with torch.no_grad():
        trainee.sae.b_enc[dead] = -1000.0 - 100 * torch.arange(3)
        trainee.sae.W_enc[:, 5], trainee.sae.b_enc[5] = 0.0, 0.0
    aux = trainee.sae.training_codes(x, dead, 2).aux
    assert aux.indices.unique().tolist() == [3, 8]
    assert (aux.values < -900).all()
    trainee.tokens_since_fired[dead] = trainee.dead_after
    assert trainee.step(x).loss.isfinite()


@pytest.mark.parametrize("middle", ["mean", "geometric_median"])
def test_data_far_from_0_kill_no_latent_at_the_start(middle):
    """pitfall_120: where the bias starts at 0, the mean decides for each latent whether it ever fires."""

    def alive(b_dec_init):
        x = inputs(2000, shift=20.0)
        trainee = make(x, activation=ReLU(), b_dec_init=b_dec_init)
        return trainee.sae.training_codes(x * trainee.scale).codes.firing_counts().gt(0).float().mean()

    assert alive("zeros") < 0.7
    assert alive(middle) == 1


def test_gradients_are_those_of_the_step():
    """pitfall_148: four steps through autograd, against an optimiser whose gradients are zeroed by hand."""
    settings = {"activation": ReLU(), "auxk": AuxK(0), "unit_norm": False, "sparsity": L1(0.5), "lr": 1e-2} | STILL
    own, other = make(**settings), make(**settings)
    own.fused = None
    adam = torch.optim.Adam(other.sae.parameters(), lr=1e-2)
    for seed in range(4):
        x = inputs(seed=seed)
        own.step(x)
        assert all(p.grad is None for p in own.sae.parameters())
        adam.zero_grad()
        other.loss(x * other.scale, 1.0)[0].backward()
        adam.step()
    for name, parameter in own.sae.named_parameters():
        torch.testing.assert_close(parameter, dict(other.sae.named_parameters())[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [TopK(3), AbsTopK(3)], ids=["fused", "autograd"])
def test_clipping_is_of_the_norm_of_all_gradients(activation, monkeypatch):
    """pitfall_152: the plain norm over all parameters, relative to what predicting the mean costs; at any scale."""
    factors = []
    for scale in (1, 10):
        trainee = make(scale * inputs(), activation=activation, grad_clip=0.01)
        x = scale * inputs(seed=1)
        made = make(scale * inputs(), activation=activation)._autograd(x * trainee.scale, 1.0)
        norm = sum(g.double().square().sum() for g in made.grads.values()).sqrt()
        plain, step = [], trainee.optimizer.step
        monkeypatch.setattr(trainee.optimizer, "step", lambda *a, **k: plain.append(k["grad_scale"]) or step(*a, **k))  # noqa: B023
        logged = trainee.step(x).grad_norm / N
        torch.testing.assert_close(logged.double(), norm, rtol=1e-4, atol=0)  # before clipping
        assert plain[0] == pytest.approx(0.01 * D / norm.item(), rel=1e-4)
        factors += plain
    assert factors[0] < 0.5
    assert factors[1] == pytest.approx(factors[0], rel=1e-4)


@pytest.mark.parametrize("activation", [TopK(3), AbsTopK(3)], ids=["fused", "autograd"])
def test_a_gradient_that_is_not_finite_changes_nothing(activation, monkeypatch):
    """pitfall_161: the step is refused by its number, whoever calls decides, and the data after it can be used."""
    trainee, good = make(activation=activation), inputs(seed=1)
    trainee.step(good)
    before, seen = tensors_of(trainee), trainee.tokens_since_fired.clone()
    owner = trainee if trainee.fused is None else trainee.fused
    name = "_autograd" if trainee.fused is None else "__call__"
    compute = getattr(type(owner), name)

    def overflows(*args):
        made = compute(*args)
        return made._replace(squares=made.squares * float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(type(owner), name, overflows)
        with pytest.raises(UnweaveError, match="gradient of step 1 is NaN or infinite"):
            trainee.step(good)
    assert trainee.step_count == 1
    assert torch.equal(trainee.tokens_since_fired, seen)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(trainee).items())
    trainee.step(good)
    assert trainee.step_count == 2


def options():
    """Every choice that a setting of an SAE announces; kinds of coders have tests of their own."""
    hints = get_type_hints(SAEConfig)
    for field in dataclasses.fields(SAEConfig):
        choices = [c for c in get_args(hints[field.name]) if isinstance(c, str)]
        yield from ((field.name, choice) for choice in choices if field.name != "coder")


@pytest.mark.parametrize(("name", "choice"), list(options()))
def test_every_option_that_is_announced_is_there(name, choice):
    """pitfall_144: it trains, to an SAE that takes raw activations."""
    trainee = make(inputs(200), **{name: choice})
    for seed in range(2):
        trainee.step(inputs(200, seed))
    assert finished_sae(trainee, [inputs()], {})(inputs()).isfinite().all()


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("normalize", get_args(get_type_hints(SAEConfig)["normalize"]))
@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(3)], ids=lambda a: a.name)
def test_checkpoints_go_with_every_normalisation(activation, normalize, moments, tmp_path):
    """pitfall_139, pitfall_142: also with none; the checkpoint alone says how to go on."""
    settings = {"activation": activation, "normalize": normalize, "moments": moments}
    trainee, resumed = make(inputs(200), **settings), make(7 * inputs(200, seed=5), **settings)
    trainee.step(inputs(200, seed=1))
    path = save_checkpoint(tmp_path, 1, {"trainee": trainee.state_dict()})
    resumed.load_state_dict(load_checkpoint(path)["trainee"])
    for t in (trainee, resumed):
        t.step(inputs(200, seed=2))
    after = tensors_of(resumed)
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors_of(trainee).items())


def test_the_defaults_run():
    """pitfall_163: no argument, and the first step."""
    trainee = Trainee(SAEConfig(), torch.randn(64, 40), steps=1, tokens=64, seed=0)
    before = trainee.sae.b_dec.detach().clone()
    assert trainee.step(torch.randn(64, 40)).loss.isfinite()
    assert not torch.equal(trainee.sae.b_dec, before)
    assert isinstance(finished_sae(trainee, [], {}), SAE)
