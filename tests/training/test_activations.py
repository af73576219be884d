"""Every activation function and every normalisation, trained: what moves, what folds, and what a step costs."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import unweave.sae.sae as sae_module
from unweave._errors import UnweaveError
from unweave.cli.train import TrainArgs
from unweave.objectives import L1, AuxK, TargetL0
from unweave.sae import (
    ACTIVATIONS,
    SAE,
    AbsTopK,
    BatchTopK,
    DenseCodes,
    Gated,
    GroupMax,
    JumpReLU,
    ReLU,
    SparseCodes,
    TanhReLU,
    TopK,
)
from unweave.training import SAEConfig, train_on
from unweave.training.dead import revived
from unweave.training.finish import finished_sae
from unweave.training.fused import supports
from unweave.training.trainee import Trainee

D, M = 16, 64
CONFIGS = {
    "relu": SAEConfig(activation=ReLU(), sparsity=L1(1.0)),
    "tanhrelu": SAEConfig(activation=TanhReLU(), sparsity=L1(0.5), lr=2e-2),
    "topk": SAEConfig(activation=TopK(4)),
    "abstopk": SAEConfig(activation=AbsTopK(4)),
    "groupmax": SAEConfig(activation=GroupMax(8)),
    "batchtopk": SAEConfig(activation=BatchTopK(4)),
    "batchtopk 4.5": SAEConfig(activation=BatchTopK(4.5)),
    "jumprelu": SAEConfig(activation=JumpReLU(0.3, 0.3), sparsity=TargetL0(4)),
    "jumprelu, log": SAEConfig(activation=JumpReLU(0.3, 0.3, log_threshold=True), sparsity=TargetL0(4)),
    "jumprelu, shared": SAEConfig(activation=JumpReLU(0.3, 0.3, shared=True), sparsity=TargetL0(4)),
    "jumprelu, quartic": SAEConfig(
        activation=JumpReLU(0.3, 0.3, kernel="quartic", ste_to_input=True), sparsity=TargetL0(4)
    ),
    "gated": SAEConfig(activation=Gated(), sparsity=L1(1.0)),
}
CONFIGS = {name: replace(c, d_sae=M, lr=c.lr or 5e-3, threshold_lr=5e-3) for name, c in CONFIGS.items()}


def features(n, seed=0):
    """Sums of a few of 24 directions, on top of a mean."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(24, D, generator=torch.Generator().manual_seed(9)), dim=1)
    strengths = (torch.rand(n, 24, generator=generator) < 0.12) * (1 + torch.rand(n, 24, generator=generator))
    return strengths @ directions * 7 + 2


def explained(sae, x):
    return 1 - ((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_activation_function_learns(name, tmp_path):
    """Nothing collapses, and the finished SAE, its file and the trainee agree on every code."""
    batches = [features(256, seed) for seed in range(200)]
    x = features(500, seed=999)
    trainee = Trainee(CONFIGS[name], batches[0], steps=len(batches), tokens=256 * len(batches), seed=0)
    for batch in batches:
        trainee.step(batch)
    sae = finished_sae(trainee, batches[-8:], {})
    assert explained(sae, x) > 0.75
    l0 = sae.encode_sparse(x).l0().mean()
    assert 1 < l0 < 16
    loaded = SAE.load(sae.save(tmp_path))
    assert torch.equal(loaded.encode(x), sae.encode(x))
    if not sae.activation.calibrated:
        norms = torch.ones(M) if not sae.activation.scales else trainee.sae.W_dec.detach().norm(dim=1) / trainee.scale
        trained = trainee.sae.training_codes(x * trainee.scale).codes.to_dense().detach()
        torch.testing.assert_close(sae.encode(x), trained * norms, atol=1e-4, rtol=1e-4)


def jump_trainee(**kwargs):
    config = SAEConfig(
        activation=JumpReLU(0.3, 0.3, **kwargs), sparsity=TargetL0(4), d_sae=M, lr=1e-3, threshold_lr=1e-2, warmup=0,
        decay=0, sparsity_warmup=0, grad_clip=None, auxk=AuxK(0.0), precision="fp32",
    )  # fmt: skip
    return Trainee(config, features(256), steps=100, tokens=25600, seed=0)


@pytest.mark.parametrize("log", [False, True])
def test_thresholds_move(log):
    """The failure of SAELens#719: a threshold that the optimiser cannot move."""
    trainee = jump_trainee(log_threshold=log)
    before = trainee.sae.threshold.detach().clone()
    for seed in range(40):
        trainee.step(features(256, seed))
    moved = (trainee.sae.threshold.detach() - before).abs()
    assert moved.mean() > 0.05
    assert (moved > 0.01).float().mean() > 0.9


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_of_the_logarithm(fused):
    """One step of Adam on log(theta), whose gradient is theta times theta's: by hand."""
    trainee, plain = jump_trainee(log_threshold=True), jump_trainee()
    if not fused:
        trainee.fused = plain.fused = None
    start = torch.rand(M) + 0.1
    for t in (trainee, plain):
        t.sae.threshold.data.copy_(start)
    x = features(256)
    grad = plain._autograd(plain.scale * x, 1.0).grads["threshold"]
    assert (grad != 0).any()
    trainee.step(x)
    # Adam's first step is lr times the gradient's sign (eps apart).
    through = grad * start
    expected = (start.log() - 1e-2 * through / (through.abs() + 1e-8)).exp()
    torch.testing.assert_close(trainee.sae.threshold.detach(), expected, atol=1e-5, rtol=1e-4)
    other = plain.sae.training_codes(plain.scale * x)  # its encoder has not moved
    assert other.codes.l0().sum() > 0


def test_the_gradient_norm_is_that_of_the_logarithm():
    trainee = jump_trainee(log_threshold=True)
    made = trainee._autograd(trainee.scale * features(256), 1.0)
    grads = dict(made.grads) | {"threshold": made.grads["threshold"] * trainee.sae.threshold.detach()}
    norm = sum(g.double().square().sum() for g in grads.values()).sqrt()
    sums = trainee.step(features(256))
    assert (sums.grad_norm / sums.tokens).item() == pytest.approx(norm.item(), rel=1e-4)


def test_only_what_it_computes_takes_the_fused_step():
    def fuses(activation):
        config = SAEConfig(activation=activation, d_sae=M)
        return supports(config, SAE(D, M, activation))

    if not fuses(TopK(4)):
        pytest.skip("no compiled kernels")
    assert fuses(JumpReLU())
    assert fuses(JumpReLU(log_threshold=True))
    assert fuses(BatchTopK(2.5))
    for other in (
        AbsTopK(4), GroupMax(4), TanhReLU(), JumpReLU(kernel="triangle"), JumpReLU(ste_to_input=True),
        JumpReLU(shared=True),
    ):  # fmt: skip
        assert not fuses(other)


def test_the_fused_step_with_a_k_that_is_not_whole():
    trainee = Trainee(replace(CONFIGS["batchtopk 4.5"], precision="fp32"), features(255), steps=9, tokens=9, seed=0)
    if trainee.fused is None:
        pytest.skip("no compiled kernels")
    x = trainee.scale * features(255)
    made, expected = trainee.fused(x.clone(), revived(trainee), 0.0, None), trainee._autograd(x, 1.0)
    assert made.l0 == expected.l0 == round(4.5 * 255)
    torch.testing.assert_close(made.loss, expected.loss)
    for name in ("b_enc", "b_dec"):
        torch.testing.assert_close(made.grads[name], expected.grads[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["relu", "tanhrelu", "topk", "abstopk", "groupmax", "batchtopk", "jumprelu", "gated"])
def test_the_command_line_knows_every_name(name):
    k = {"k": 8.0} if name in ("topk", "abstopk", "groupmax", "batchtopk") else {}
    (sae,) = TrainArgs(activation=name, d_sae=64, normalize="whiten", **k).to_config().saes
    assert isinstance(sae.activation, ACTIVATIONS[name])
    assert (sae.normalize, getattr(sae.activation, "k", 8)) == ("whiten", 8)


def test_the_command_line_names_what_there_is():
    with pytest.raises(UnweaveError, match=r"'topkk'; it is one of.*abstopk"):
        TrainArgs(activation="topkk").to_config()
    with pytest.raises(UnweaveError, match=r"--k goes with --activation topk or .*groupmax.*, not with tanhrelu"):
        TrainArgs(activation="tanhrelu", k=3).to_config()
    assert TrainArgs(activation="batchtopk", k=2.5).to_config().saes[0].activation == BatchTopK(2.5)
    with pytest.raises(UnweaveError, match="k must be int"):
        TrainArgs(activation="topk", k=2.5).to_config()


@pytest.mark.parametrize("kind", ["center", "whiten", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("name", ["relu", "batchtopk", "jumprelu", "gated", "tanhrelu"])
def test_training_on_normalised_inputs(kind, name, tmp_path):
    """pitfall_135, 142: the finished SAE takes raw activations and gives what the trainee gives on normalised ones."""
    batches = [features(256, seed) for seed in range(60)]
    config = replace(CONFIGS[name], normalize=kind)
    trainee = Trainee(config, batches[0], steps=60, tokens=256 * 60, seed=0)
    for batch in batches:
        trainee.step(batch)
    x = features(300, seed=999)
    sae = finished_sae(trainee, batches[-8:], {})
    assert explained(sae, x) > 0.3
    source, normalization = trainee.sae, trainee.normalization
    shown = normalization(x)
    if source.activation.calibrated:
        source.threshold.copy_(sae.threshold)  # in the same units: nothing but the rows' common norm is folded
        if kind == "center":
            source.threshold.mul_(trainee.scale)
    x_hat = source(shown).detach()
    if normalization.per_token:
        from unweave.sae.normalization import token_statistics

        x_hat = token_statistics(x, kind).undo(x_hat)
    else:
        x_hat = normalization.reversed()(x_hat)
    torch.testing.assert_close(sae(x), x_hat, atol=2e-3, rtol=1e-4)
    assert sae.per_token == normalization.per_token
    assert torch.equal(SAE.load(sae.save(tmp_path))(x), sae(x))


@pytest.mark.parametrize("kind", ["scalar", "center", "whiten", "layer_norm", "constant_norm_rescale"])
def test_the_callers_batch_stays_as_it_is(kind):
    """pitfall_134"""
    x = features(256)
    before = x.clone()
    Trainee(replace(CONFIGS["topk"], normalize=kind), x, steps=10, tokens=2560, seed=0).step(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", ["center", "whiten", "layer_norm"])
def test_training_goes_on_from_a_finished_sae(kind):
    config = replace(CONFIGS["topk"], normalize=kind)
    sae = train_on([features(256, s) for s in range(30)], [config], progress=False)[0]
    x = features(300, seed=999)
    trainee = Trainee(config, features(256), steps=10, tokens=2560, seed=5, start=sae)
    torch.testing.assert_close(finished_sae(trainee, [], {})(x), sae(x), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(
        trainee.sae.W_dec.detach().norm(dim=1), torch.ones(M), atol=1e-4, rtol=0
    )  # so ranking is by what counts
    if kind == "layer_norm":
        with pytest.raises(UnweaveError, match="per_token=layer_norm, not scalar"):
            Trainee(CONFIGS["topk"], x, steps=1, tokens=1, seed=0, start=sae)


def test_a_checkpoint_holds_the_normalisation():
    """A resumed run sees another first batch, and must not measure again."""
    config = replace(CONFIGS["topk"], normalize="whiten")
    first, second = (Trainee(config, features(256, s), steps=10, tokens=2560, seed=0) for s in (0, 1))
    first.step(features(256, 2))
    second.load_state_dict(first.state_dict())
    for trainee in (first, second):
        trainee.step(features(256, 3))
    for name, tensor in first.sae.state_dict().items():
        if tensor is not None:
            assert torch.equal(tensor, second.sae.state_dict()[name])


def test_whitening_needs_enough_of_a_first_batch():
    with pytest.raises(UnweaveError, match="the first 12 activations is singular"):
        train_on([features(12)], [replace(CONFIGS["topk"], normalize="whiten")], progress=False)


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(0.05, 0.1), Gated()], ids=lambda a: a.name)
def test_dense_steps_go_sparse_by_themselves(activation, monkeypatch):
    """Once few latents are active: the same loss and gradients, without the dense products."""
    config = SAEConfig(activation=activation, d_sae=256, auxk=AuxK(0.0))
    trainee = Trainee(config, features(512), steps=10, tokens=5120, seed=0)
    trainee.fused = None  # the path of every objective
    x = trainee.scale * features(512)

    def step(bias):
        trainee.sae.b_enc.data.fill_(bias)
        kinds = []
        original = type(trainee.sae).training_codes
        monkeypatch.setattr(
            type(trainee.sae), "training_codes",
            lambda *args, **kw: (made := original(*args, **kw), kinds.append(type(made.codes)))[0],
        )  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            made = trainee._autograd(x, 1.0)
        monkeypatch.setattr(type(trainee.sae), "training_codes", original)
        return kinds[0], made, counter.get_total_flops()

    scale = 0.1 if not config.decoder_is_unit else 1.0
    often, rarely = step(0.0), step(-3.0 * scale)
    assert (often[0], rarely[0]) == (DenseCodes, SparseCodes)
    assert 0 < rarely[1].l0 / len(x) / 256 < 0.05 < often[1].l0 / len(x) / 256
    encoder = 2 * x.numel() * 256
    assert rarely[2] < 1.1 * encoder  # nothing but the encoder's product is left
    assert often[2] > 3.9 * encoder
    monkeypatch.setattr(sae_module, "DENSE_ABOVE", 0.0)
    kind, dense, flops = step(-3.0 * scale)
    assert kind is DenseCodes
    assert flops > 3.9 * encoder
    torch.testing.assert_close(rarely[1].loss, dense.loss)
    for name, grad in dense.grads.items():
        torch.testing.assert_close(rarely[1].grads[name], grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_run_goes_from_dense_to_sparse():
    """No setting says when: the density of the codes does."""
    config = SAEConfig(activation=ReLU(), sparsity=L1(5.0), d_sae=512, lr=1e-2, warmup=0, sparsity_warmup=0)
    trainee = Trainee(config, features(512), steps=1000, tokens=512_000, seed=0)
    trainee.fused = None
    kinds = []
    for seed in range(60):
        kinds.append(type(trainee.sae.training_codes(trainee.scale * features(64, seed)).codes))
        trainee.step(features(512, seed))
    assert (kinds[0], kinds[-1]) == (DenseCodes, SparseCodes)
