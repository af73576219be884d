"""End-to-end losses of what is no plain SAE: by hand in float64, and fine-tuning of what others have trained."""

from __future__ import annotations

import copy

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.activations import DataConfig, MaskConfig
from unweave.models import LoadedModel, capture, resolve_hooks
from unweave.objectives import AuxK, EndToEnd
from unweave.sae import (
    SAE,
    JumpReLU,
    MatchingPursuit,
    ReLU,
    Temporal,
    TiedDictionary,
    TopK,
    Transcoder,
    by_target,
)
from unweave.training import SAEConfig, Start, TrainConfig, train
from unweave.training.train import prepare

TEXT = DataConfig(context=16, held_out=0.0)
MLP = {"hooks": ("transformer.h.0.mlp:in",), "targets": ("transformer.h.0.mlp",)}
SITES = {
    "sae": {"hooks": ("transformer.h.0",)},
    "transcoder": MLP,
    "crosscoder": {"hooks": ("transformer.h.0", "transformer.h.0.mlp")},
    "clt": {
        "hooks": ("transformer.h.0.mlp:in", "transformer.h.1.mlp:in"),
        "targets": ("transformer.h.0.mlp", "transformer.h.1.mlp"),
    },
}


@pytest.fixture(scope="module")
def model(tiny_model):
    """In float64, with layers so large that the activations matter to the predictions."""
    own = copy.deepcopy(tiny_model.module).double()
    with torch.no_grad():
        for parameter in own.transformer.parameters():
            parameter.mul_(1 if parameter.ndim < 2 else 8)
    return LoadedModel(own, tiny_model.tokenizer, "tiny")


def logits_with(model, ids, path, output, mask):
    """Predictions with other activations at the unmasked tokens of one module's output, by a hook of PyTorch alone."""

    def put(module, args, out):
        old = out[0] if isinstance(out, tuple) else out
        new = torch.zeros_like(old).masked_scatter(mask[..., None].expand_as(old), output)
        new = torch.where(mask[..., None], new, old)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = model.module.get_submodule(path).register_forward_hook(put)
    try:
        return model.module(ids).logits
    finally:
        handle.remove()


def by_hand(model, clean, mask, outputs, settings):
    """Divergence, and cross-entropy: means over the hooks of a coder, each of which is spliced in alone."""
    counted = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    log_p = clean.logits.log_softmax(-1)[counted]
    kls, ces = [], []
    for path, output in outputs.items():
        log_q = logits_with(model, clean.ids, path, output, mask).log_softmax(-1)[counted]
        kls.append((log_p.exp() * (log_p - log_q)).sum(1).mean())
        ces.append(-log_q.gather(1, clean.ids.roll(-1, 1)[counted][:, None]).mean())
    return sum(kls) / len(kls), sum(ces) / len(ces)


@pytest.mark.parametrize(
    "settings", [EndToEnd(beta=0.7, ce=0.4), EndToEnd(beta=None, kl=0.8, ce=0.3, error=0.2)], ids=["balanced", "sum"]
)
@pytest.mark.parametrize(
    ("coder", "skip", "normalize"),
    [
        ("sae", False, "layer_norm"), ("sae", False, "constant_norm_rescale"), ("sae", False, "center"),
        ("transcoder", True, "scalar"), ("crosscoder", False, "scalar"), ("clt", True, "scalar"),
    ],
)  # fmt: skip
def test_loss_and_gradients_by_hand(model, texts, coder, skip, normalize, settings):
    """The last step of a run is cut, as here: some tokens of the pass are left as they are."""
    config = SAEConfig(d_sae=24, activation=ReLU(), sparsity=(), coder=coder, skip=skip, normalize=normalize,
                       auxk=AuxK(coefficient=0))  # fmt: skip
    run = TrainConfig(tokens=1000, batch_size=64, text=TEXT, saes=(config,), end_to_end=settings, **SITES[coder])
    session = prepare(run, model, texts)
    (site,) = session.sites[0]
    with session.batches() as batches:
        sample = batches.peek(0)
        trainee = session.make(config, site, sample, steps=9, tokens=1000, seed=0)
        rows = next(iter(batches))
        clean = session.current
        sae = trainee.sae.double()
        generator = torch.Generator().manual_seed(2)
        for parameter in sae.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
        (raw, target), n = site.rows(rows), 50
        raw, target = raw[:n], None if target is None else target[:n]
        mask = clean.mask & (clean.mask.flatten().cumsum(0) <= n).view_as(clean.mask)
        x, shift, spread = raw * trainee.scale, 0.0, trainee.scale
        if normalize == "layer_norm":
            shift = raw.mean(1, keepdim=True)
            spread = 1 / raw.std(1, keepdim=True)
            x = (raw - shift) / (raw.std(1, keepdim=True) + 1e-5)
        elif normalize == "constant_norm_rescale":
            spread = 16**0.5 / raw.norm(dim=1, keepdim=True)
            x = raw * spread
        elif normalize == "center":
            shift, spread = trainee.normalization.mean.double(), trainee.normalization.scale
            x = (raw - shift) * spread
        y = x if target is None else target * trainee.target_scale
        loss, _, _ = trainee.loss(x, 1.0, None if target is None else y)
        loss.backward()
        got = {name: p.grad.clone() for name, p in sae.named_parameters()}
        sae.zero_grad()

        centred = x - sae.b_dec if coder == "sae" else x
        if coder == "clt":
            pre = [centred[:, 16 * i : 16 * i + 16] @ sae.W_enc[:, 24 * i : 24 * i + 24] for i in range(2)]
            codes = (torch.cat(pre, 1) + sae.b_enc).relu()
            skipped = torch.cat([x[:, 16 * i : 16 * i + 16] @ sae.W_skip[i] for i in range(2)], 1)
        else:
            codes = (centred @ sae.W_enc + sae.b_enc).relu()
            skipped = x @ sae.W_skip.T if skip else 0
        y_hat = codes @ sae.W_dec + sae.b_dec + skipped
        error = (y_hat - y).square().sum(1).mean()
        made = y_hat / (spread if target is None else trainee.target_scale) + shift
        paths = site.targets or site.inputs
        outputs = dict(zip(paths, made.split([16] * len(paths), 1), strict=True))
        kl, ce = by_hand(model, clean, mask, outputs, settings)
        d = 16 * len(paths)
        if settings.beta is None:
            expected = d * (0.8 * kl + 0.3 * ce) + 0.2 * error
        else:
            a = (error / (kl + 1e-8)).detach()
            expected = (error + a * 0.7 * kl) / 1.7 + d * 0.4 * ce
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        expected.backward()
        for name, parameter in sae.named_parameters():
            torch.testing.assert_close(got[name], parameter.grad, msg=name, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_temporal_sae_reads_whole_rows(model, texts, tied):
    """Those of the pass, of whose tokens the masks and the end of the run leave some out of the loss."""
    temporal = Temporal(context=16, n_heads=2, bottleneck=4, tied=tied)
    config = SAEConfig(d_sae=24, activation=ReLU(), sparsity=(), temporal=temporal, auxk=AuxK(coefficient=0))
    masks = MaskConfig(positions="2:", norm_multiple=None)
    run = TrainConfig(tokens=1000, batch_size=64, text=TEXT, saes=(config,), end_to_end=EndToEnd(beta=0.7),
                      masks=masks, **SITES["sae"])  # fmt: skip
    session = prepare(run, model, texts)
    (site,) = session.sites[0]
    with session.batches() as batches:
        trainee = session.make(config, site, batches.peek(0), steps=9, tokens=1000, seed=0)
        rows = next(iter(batches))
        clean, sae, n = session.current, trainee.sae.double(), 41
        raw = site.rows(rows).x[:n]
        mask = clean.mask & (clean.mask.flatten().cumsum(0) <= n).view_as(clean.mask)
        assert (int(mask.sum()), int(clean.mask.sum())) != (n, n)
        loss, _, codes = trainee.loss(raw * trainee.scale, 1.0)
        loss.backward()
        got = {name: p.grad.clone() for name, p in sae.named_parameters()}
        sae.zero_grad()

        sae.scale = trainee.scale
        made = sae(clean.activations["transformer.h.0"])[mask]
        torch.testing.assert_close(codes.to_dense(), sae.encode(clean.activations["transformer.h.0"])[mask])
        error = (made - raw).square().sum(1).mean() * trainee.scale**2
        kl, _ = by_hand(model, clean, mask, {"transformer.h.0": made}, run.end_to_end)
        expected = (error + (error / (kl + 1e-8)).detach() * 0.7 * kl) / 1.7
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        expected.backward()
        for name, parameter in sae.named_parameters():
            torch.testing.assert_close(got[name], parameter.grad, msg=name, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def divergence(sae, model, texts):
    """As evaluation has it: each part reads the clean pass, and stands at its hook alone."""
    ids = torch.tensor([model.tokenizer(t)["input_ids"][:16] for t in texts[:40]])
    everywhere, total = torch.ones_like(ids, dtype=torch.bool), 0.0
    log_p = model.module(ids).logits.log_softmax(-1)
    for part in by_target(sae).values():
        known = part.metadata
        reads = known.get("hf_hook_names") or [known["hf_hook_name"]]
        seen = capture(model.module, resolve_hooks(model.module, reads), input_ids=ids)
        output = part(torch.cat([seen[name] for name in reads], 2).float()).double()
        log_q = logits_with(model, ids, known.get("hf_hook_name_out") or reads[0], output, everywhere).log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum(-1).mean().item() / len(by_target(sae))
    return total


def further(model, texts, start, lr, tokens, **site):
    config = TrainConfig(tokens=tokens, batch_size=256, text=TEXT, end_to_end=EndToEnd(), start=Start(lr=lr), **site)
    (sae,) = train(config, model=model, data=texts, start=start, progress=False).saes
    return sae


@pytest.mark.parametrize(
    ("coder", "activation", "skip"),
    [("transcoder", TopK(4), True), ("transcoder", JumpReLU(), False), ("crosscoder", TopK(4), False),
     ("clt", JumpReLU(), False)],
    ids=str,
)  # fmt: skip
def test_coders_are_fine_tuned_end_to_end(model, texts, coder, activation, skip, tmp_path):
    """pitfall_177: of a file, with its own settings; with hardly a step it is what it was, with more it is better."""
    sae = SAEConfig(d_sae=32, activation=activation, lr=5e-3, coder=coder, skip=skip, sparsity_warmup=0.0)
    trained = TrainConfig(saes=(sae,), tokens=4000, batch_size=256, text=TEXT, **SITES[coder])
    train(trained, model=model, data=texts, progress=False).saes[0].save(tmp_path / "start")
    start = SAE.load(tmp_path / "start")
    same = further(model, texts, start, 1e-9, 256, **SITES[coder])
    x = torch.randn(50, start.d_in)
    torch.testing.assert_close(same(x), start(x), rtol=1e-3, atol=1e-3)
    tuned = further(model, texts, start, 3e-3, 6000, **SITES[coder])
    assert type(tuned) is type(start)
    assert divergence(tuned, model, texts) < 0.95 * divergence(start, model, texts)
    tuned.save(tmp_path / "tuned")
    torch.testing.assert_close(SAE.load(tmp_path / "tuned").encode(x), tuned.encode(x))


def uneven(sae):
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, sae.d_sae)[:, None])
    return sae.requires_grad_(False)


def of_tokens(kind):
    sae = SAE(16, 32, TopK(4))
    sae.per_token = kind
    return sae


@pytest.mark.parametrize(
    "make",
    [
        lambda: uneven(SAE(16, 32, TopK(4))),
        lambda: uneven(SAE(16, 32, ReLU(), tied=True)),
        lambda: SAE(16, 32, ReLU(), tied=True),
        lambda: SAE(16, 32, MatchingPursuit(4, residual_threshold=2.0)),
        lambda: of_tokens("layer_norm"),
        lambda: of_tokens("constant_norm_rescale"),
    ],
    ids=["uneven", "uneven-tied", "tied", "pursuit", "layer_norm", "constant_norm_rescale"],
)
def test_what_norms_or_tokens_are_special_of(model, texts, make):
    """Rows keep their norms, what reads with its decoder goes on, and so does what normalises each token."""
    start = make()
    same = further(model, texts, start, 1e-9, 256, **SITES["sae"])
    x = 3 * torch.randn(60, 16)
    torch.testing.assert_close(same(x), start(x), rtol=1e-3, atol=1e-3)
    assert (same.tied, same.per_token, same.activation.name) == (start.tied, start.per_token, start.activation.name)
    if isinstance(start.activation, MatchingPursuit):
        assert same.activation.residual_threshold == pytest.approx(2.0)
    start.metadata = dict(same.metadata)
    tuned = further(model, texts, start, 3e-3, 5000, **SITES["sae"])
    assert divergence(tuned, model, texts) < divergence(start, model, texts)


def test_settings_of_ones_own_say_what_norms_are_to_be(model):
    """And the dictionary's kind."""
    start, site = uneven(SAE(16, 32, TopK(4))), SITES["sae"]
    config = TrainConfig(saes=(SAEConfig(d_sae=32, activation=TopK(4)),), end_to_end=EndToEnd(), **site)
    with pytest.raises(UnweaveError, match="give unit_norm='keep'"):
        train(config, model=model, data=["a"], start=start)
    predicts = Transcoder(16, 16, 32, TopK(4), skip=True)
    config = TrainConfig(
        saes=(SAEConfig(d_sae=32, activation=TopK(4), coder="transcoder"),), end_to_end=EndToEnd(), **MLP
    )
    with pytest.raises(UnweaveError, match="has skip=True, and skip=False is to be trained"):
        train(config, model=model, data=["a"], start=predicts)


def test_a_hook_that_no_prediction_depends_on(model, texts):
    module = copy.deepcopy(model.module)
    module.aside = torch.nn.Identity()
    forward = module.transformer.forward

    def both(*args, **kwargs):
        made = forward(*args, **kwargs)
        module.aside(made.last_hidden_state)
        return made

    module.transformer.forward = both
    other = LoadedModel(module, model.tokenizer, "tiny")
    config = TrainConfig(hooks="aside", tokens=100, batch_size=64, text=TEXT, end_to_end=EndToEnd(),
                         saes=(SAEConfig(d_sae=8, activation=TopK(2)),))  # fmt: skip
    with pytest.raises(UnweaveError, match="no prediction depends on what passes at 'aside'"):
        train(config, model=other, data=texts, progress=False)


def test_tied_from_scratch(model, texts):
    config = SAEConfig(d_sae=32, activation=TopK(4), dictionary=TiedDictionary(), lr=5e-3)
    run = TrainConfig(saes=(config,), tokens=600, batch_size=64, text=TEXT, end_to_end=EndToEnd(), **SITES["sae"])
    (sae,) = train(run, model=model, data=texts, progress=False).saes
    assert sae.tied
