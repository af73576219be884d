"""Pre-activations of two factors: every activation function on them, gradients, folds, files, training."""

from __future__ import annotations

import json

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.objectives import L1, AuxK, GhostGradients, PreActivation
from unweave.sae import (
    SAE,
    AbsTopK,
    BatchTopK,
    DenseCodes,
    Gated,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    Normalization,
    ReLU,
    TanhReLU,
    TiedDictionary,
    TopK,
    Transcoder,
    fold_decoder_norms,
    fold_input_scale,
    fold_normalization,
)
from unweave.sae.files import save_training_form
from unweave.training import SAEConfig, train_on
from unweave.training.trainee import Trainee

D, M, N = 6, 12, 20
EVERY = [ReLU(), TanhReLU(), TopK(3), AbsTopK(3), GroupMax(3), BatchTopK(3), JumpReLU(), JumpReLU(shared=True)]


@torch.no_grad()
def random(sae: SAE) -> SAE:
    """Every weight, bias and threshold away from its initial value."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sae.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) / 2
        parameter.copy_(drawn.abs() / 2 if name == "threshold" else drawn)
    if sae.activation.calibrated:
        sae.threshold.fill_(0.3)
    return sae.requires_grad_(False)


def pre_of(sae: SAE, x):
    centred = x - sae.b_dec if sae.apply_b_dec_to_input else x
    gate = 1 / (1 + (-(centred @ sae.W_enc_glu + sae.b_enc_glu)).exp())
    return (centred @ sae.W_enc + sae.b_enc) * gate


def plain_codes(activation, pre, threshold):
    """The codes of an SAE with one factor whose pre-activations are these."""
    twin = SAE(M, M, activation, apply_b_dec_to_input=False).requires_grad_(False).to(pre.dtype)
    twin.W_enc.copy_(torch.eye(M))
    if threshold is not None:
        twin.threshold.copy_(threshold)
    return twin.encode(pre)


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("activation", EVERY, ids=lambda a: a.name)
def test_every_activation_function_follows_the_product(activation, pre_bias, tmp_path):
    sae, x = random(SAE(D, M, activation, glu=True, apply_b_dec_to_input=pre_bias)), torch.randn(2, N, D)
    expected = plain_codes(activation, pre_of(sae, x), sae.threshold)
    assert 0 < (expected != 0).float().mean() < 1
    torch.testing.assert_close(sae.encode(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x), expected @ sae.W_dec + sae.b_dec, atol=1e-5, rtol=1e-5)
    loaded = SAE.load(sae.save(tmp_path / "sae"))
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["architecture"].endswith("_glu")
    assert torch.equal(loaded(x), sae(x))
    half = SAE.load(tmp_path / "sae", dtype=torch.bfloat16)
    assert half.W_enc_glu.dtype == half.dtype == torch.bfloat16
    if activation == ReLU():
        torch.testing.assert_close(half(x), sae(x), atol=0.2, rtol=0.1)
    again = SAE.load(save_training_form(sae, tmp_path / "training", {}))
    assert again.activation == activation
    assert torch.equal(again(x), sae(x))


@pytest.mark.parametrize("activation", [ReLU(), TopK(3), BatchTopK(3), JumpReLU(bandwidth=0.7)], ids=lambda a: a.name)
def test_gradients_are_those_of_the_formula(activation, monkeypatch):
    sae = random(SAE(D, M, activation, glu=True)).double().requires_grad_(True)
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    if isinstance(activation, JumpReLU):
        sae.threshold.requires_grad_(False)
    for bound in (0.0, 1.0):
        monkeypatch.setattr("unweave.sae.sae.DENSE_ABOVE", bound)
        made = sae.training_codes(x, torch.arange(0, M, 3), 2)
        dense = isinstance(made.codes, DenseCodes)
        assert dense == (bound == 0 and activation in (ReLU(), JumpReLU(bandwidth=0.7)))
        pre = pre_of(sae, x)
        torch.testing.assert_close(made.codes.to_dense(), (pre * (made.codes.to_dense() > 0)))
        losses = []
        for codes in (made.codes.to_dense(), pre * (made.codes.to_dense() > 0).detach()):
            loss = ((codes @ sae.W_dec + sae.b_dec - x) ** 2).sum()
            names = [name for name, p in sae.named_parameters() if p.requires_grad]
            wanted = [x, *(p for p in sae.parameters() if p.requires_grad)]
            losses.append(dict(zip(["x", *names], torch.autograd.grad(loss, wanted, retain_graph=True), strict=True)))
        assert losses[0]["W_enc_glu"].count_nonzero() > 0
        torch.testing.assert_close(*losses)
        assert made.aux is not None
        aux = made.aux.to_dense()
        torch.testing.assert_close(aux, torch.where(aux != 0, pre, 0.0))
        assert (aux != 0).sum(1).tolist() == [2] * N


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU()], ids=lambda a: a.name)
def test_folds_are_exact(activation):
    x = torch.randn(N, D) * 3 + 1
    sae = random(SAE(D, M, activation, glu=True))
    codes, output = sae.encode(2.5 * x), sae(2.5 * x) / 2.5
    fold_input_scale(sae, 2.5)
    torch.testing.assert_close(sae.encode(x), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x), output, atol=1e-5, rtol=1e-5)
    norms, gate = sae.W_dec.norm(dim=1), sae.W_enc_glu.clone()
    fold_decoder_norms(sae)
    assert torch.equal(sae.W_enc_glu, gate)  # a sigmoid takes no factor over
    torch.testing.assert_close(sae.encode(x), codes * norms, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x), output, atol=1e-5, rtol=1e-5)
    for pre_bias in (True, False):
        sae, whiten = (
            random(SAE(D, M, activation, glu=True, apply_b_dec_to_input=pre_bias)),
            Normalization.fit("whiten", x),
        )
        codes = sae.encode(whiten(x))
        fold_normalization(sae, whiten)
        torch.testing.assert_close(sae.encode(x), codes, atol=1e-4, rtol=1e-4)


def test_transcoders_have_it_too(tmp_path):
    coder, x = random(Transcoder(D, 5, M, TopK(3), glu=True, skip=True)), torch.randn(N, D)
    codes = plain_codes(TopK(3), pre_of(coder, x), None)
    torch.testing.assert_close(coder(x), codes @ coder.W_dec + coder.b_dec + x @ coder.W_skip.T)
    loaded = SAE.load(coder.save(tmp_path))
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "topk_glu_skip_transcoder"
    assert torch.equal(loaded(x), coder(x))


def gated_world(n=60):
    """Strengths are read along one direction, and how much of them is let through along another."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        strength, gate = 3 * torch.rand(256, 4, generator=generator), torch.randn(256, 4, generator=generator)
        yield torch.cat([strength, gate], 1), strength * (3 * gate).sigmoid()


@pytest.mark.parametrize("coder", ["sae", "transcoder"])
def test_it_is_trained(coder, tmp_path):
    """A product of two directions, which one factor does not give; the saved run gives the same codes."""
    pairs = list(gated_world()) * 4
    errors = {}
    for glu in (True, False):
        config = SAEConfig(
            d_sae=8, activation=ReLU(), glu=glu, coder=coder, lr=2e-2, sparsity=L1(0.02), auxk=AuxK(0.03)
        )
        batches = [x for x, _ in pairs] if coder == "sae" else pairs
        (sae,) = train_on(batches, [config], progress=False)
        assert sae.glu == glu
        x, y = pairs[0]
        errors[glu] = float((sae(x) - (x if coder == "sae" else y)).square().sum())
        if glu:
            assert sae.W_enc_glu.count_nonzero() > 0
            assert torch.equal(SAE.load(sae.save(tmp_path))(x), sae(x))
    if coder == "transcoder":
        assert errors[True] < 0.6 * errors[False]


def test_a_checkpoint_and_a_start_go_on():
    x = torch.randn(64, D)
    config = SAEConfig(d_sae=M, activation=TopK(3), glu=True, lr=1e-2)
    first, second = (Trainee(config, x, steps=9, tokens=900, seed=0) for _ in range(2))
    assert first.fused is None
    for _ in range(3):
        first.step(x)
    second.load_state_dict(first.state_dict())
    for trainee in (first, second):
        trainee.step(x)
    assert torch.equal(first.sae.W_enc_glu, second.sae.W_enc_glu)
    with pytest.raises(UnweaveError, match="has glu=True, and glu=False is to be trained"):
        Trainee(SAEConfig(d_sae=M, activation=TopK(3)), x, steps=9, tokens=900, seed=0, start=first.sae)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAE(D, M, Gated(), glu=True), "a Gated SAE's codes follow from one"),
        (lambda: SAE(D, M, MatchingPursuit(3), glu=True), "a tied SAE's codes follow from one"),
        (lambda: SAEConfig(activation=Gated(), glu=True), "leave out glu.*Gated"),
        (lambda: SAEConfig(dictionary=TiedDictionary(), glu=True), "leave out glu"),
        (lambda: SAEConfig(coder="clt", glu=True), "a clt has none"),
        (lambda: SAEConfig(coder="crosscoder", glu=True), "a crosscoder has none"),
        (lambda: SAEConfig(activation=JumpReLU(), pre_act=PreActivation(), glu=True), "pre_act pushes"),
        (lambda: SAEConfig(activation=ReLU(), ghost=GhostGradients(), glu=True), "ghost pushes"),
    ],
)
def test_what_has_no_second_factor_is_refused(make, message):
    with pytest.raises(UnweaveError, match=message):
        make()


def test_what_is_not_finite_is_named():
    sae, x = random(SAE(D, M, TopK(3), glu=True)), torch.randn(5, D)
    x[3, 2] = float("inf")
    with pytest.raises(UnweaveError, match="pre-activations of row 3 are NaN or infinite"):
        sae.encode(x)
