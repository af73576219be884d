"""Temporal SAEs trained further: gradients against loops over tokens, masks, runs on a model, and what stays."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.activations import DataConfig, MaskConfig
from unweave.activations.cache.foreign import MappedStore
from unweave.models import LoadedModel, capture, resolve_hooks
from unweave.objectives import L1, EndToEnd
from unweave.sae import SAE, ReLU, Temporal, TemporalSAE, TopK
from unweave.training import SAEConfig, Start, TrainConfig, train, train_on
from unweave.training.config import METHODS
from unweave.training.finetune import finetune
from unweave.training.temporal_tuning import TemporalTuning
from unweave.training.train import prepare

D, M, CONTEXT = 6, 24, 5
HOOK = "transformer.h.0"


def make(d=D, activation=None, seed=0, tied=True, subtract=True, dtype=torch.float64):
    settings = Temporal(n_heads=2, bottleneck=3, tied=tied)
    sae = TemporalSAE(d, M, activation or TopK(4), settings, apply_b_dec_to_input=subtract).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.requires_grad_(False).parameters():
        spread = 1.0 if parameter is sae.W_dec else parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * spread)
    sae.scale = 0.7
    return sae


def by_hand(start, x, W_dec, b_dec):
    """The output at the scale of training of one sequence, token by token and head by head, with another decoder."""
    W_enc = start.W_enc
    bias = b_dec if start.apply_b_dec_to_input else torch.zeros_like(b_dec)
    (layer,) = start.attn_layers
    z, outputs = ((x - bias) @ W_enc).relu(), []
    for t in range(len(x)):
        past, heads = torch.cat([torch.zeros_like(z[:1]), z[:t]]), start.settings.n_heads
        mixed = [
            (keys @ query / len(query) ** 0.5).softmax(0) @ values
            for query, keys, values in zip(
                layer.q_target(z[t]).chunk(heads), layer.k_ctx(past).chunk(heads, 1), layer.v_ctx(past).chunk(heads, 1),
                strict=True,
            )
        ]  # fmt: skip
        direction = layer.c_proj(torch.cat(mixed)).relu() @ W_dec
        rest = x[t] - bias
        predicted = (direction @ rest) / (direction.norm() + 1e-6) ** 2 * direction
        pre = (rest - predicted) @ W_enc
        codes = pre.relu()
        if isinstance(start.activation, TopK):
            codes = codes * (pre >= pre.topk(4).values[-1])
        outputs.append(codes @ W_dec + predicted + b_dec)
    return torch.stack(outputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("tied", "subtract", "activation"), [(True, True, TopK(4)), (False, False, ReLU()), (False, True, TopK(4))]
)
def test_gradients_by_hand(method, tied, subtract, activation):
    """Of two steps, with tokens that are read and do not count, and cut in the middle of a sequence."""
    start = make(tied=tied, subtract=subtract, activation=activation)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, CONTEXT, D, generator=generator, dtype=torch.float64) * 2 + 1
    kept = torch.rand(3, CONTEXT, generator=generator) < 0.7
    rows = x[kept]
    n = len(rows) - 2
    first = (kept & (kept.flatten().cumsum(0) <= n).view_as(kept)).flatten()
    config = SAEConfig(d_sae=M, activation=activation, sparsity=(), lr=0.02, grad_clip=None, warmup=0.0, decay=0.0)
    tuning = TemporalTuning(start, method, config, rows, steps=9, tokens=9 * n)
    tuning.read = lambda n: (x, first.view_as(kept))
    update, seen = tuning.optimizer.step, []

    def keep(grads, rates):
        seen.append({name: grad.clone() for name, grad in grads.items()})
        update(grads, rates)

    tuning.optimizer.step = keep
    norms = start.W_dec.norm(dim=1)
    leaves = {"W_dec": start.W_dec / norms[:, None], "factor": torch.ones(M).double(), "b_dec": start.b_dec}
    for _ in range(2):
        own = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        W = own["W_dec"] * (norms * own["factor"])[:, None]
        y_hat = torch.cat([by_hand(start, sequence * 0.7, W, own["b_dec"]) for sequence in x])
        loss = (y_hat - 0.7 * x.flatten(0, 1))[first].square().sum(1).mean()
        loss.backward()
        got = tuning.step(rows[:n])
        torch.testing.assert_close((got.loss / n).double(), loss.detach(), rtol=1e-5, atol=0)
        trained = {"scale": {"factor"}, "unrotated_decoder": {"factor", "b_dec"}}.get(method, {"W_dec", "b_dec"})
        grads = seen.pop()
        assert grads.keys() == trained
        for name, grad in grads.items():
            torch.testing.assert_close(grad, own[name].grad, msg=name)
        state = {"W_dec": tuning.sae.W_dec, "factor": tuning.factor, "b_dec": tuning.sae.b_dec}
        leaves |= {name: tensor.detach().clone() for name, tensor in state.items()}


def sequences(n=40, d=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    stays = torch.randn(n, 1, d, generator=generator).expand(n, CONTEXT, d)
    return 3 * stays + torch.randn(n, CONTEXT, d, generator=generator) + 1


def error(sae, x):
    return (sae(x) - x).square().sum(-1).mean().item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_batches_of_sequences(method, tied, tmp_path):
    """The error falls, encoder and attention stay as they are, and files say the same."""
    start = make(tied=tied, dtype=torch.float32)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    tuned = finetune(start, [sequences(seed=i) for i in range(30)], method=method, lr=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    x = sequences(seed=77)
    assert error(tuned, x) < 0.95 * error(start, x)
    assert (tuned.tied, tuned.settings.tied, tuned.scale) == (False, False, 0.7)
    assert torch.equal(tuned.W_enc, start.W_enc)
    for name, value in start.attn_layers.state_dict().items():
        assert torch.equal(tuned.attn_layers.state_dict()[name], value)
    turned = torch.nn.functional.cosine_similarity(tuned.W_dec, start.W_dec).min() < 0.9999
    assert turned == (method == "decoder")
    assert torch.equal(tuned.b_dec, start.b_dec) == (method == "scale")
    loaded = SAE.load(tuned.save(tmp_path / "tuned"))
    torch.testing.assert_close(loaded(x), tuned(x))
    same = finetune(start, [x], method=method, lr=1e-12)
    torch.testing.assert_close(same(x), start(x), rtol=1e-4, atol=1e-4)


def test_a_batch_is_cut_within_a_sequence():
    start, x = make(dtype=torch.float32), sequences(4)
    later, earlier = x.clone(), x.clone()
    later[2, 2:] += 1
    later[3] += 1
    earlier[2, 1] += 1
    tuned, same, other = (finetune(start, [each], tokens=12).W_dec for each in (x, later, earlier))
    assert torch.equal(tuned, same)
    assert not torch.equal(tuned, other)
    for wrong, shape in ((torch.ones(3, 6), r"\(3, 6\)"), (torch.ones(2, 3, 7), r"\(2, 3, 7\)")):
        with pytest.raises(UnweaveError, match=rf"sequences for a temporal SAE, \(n, tokens, 6\), got {shape}"):
            finetune(start, [wrong])
    with pytest.raises(UnweaveError, match="must be finite"):
        finetune(start, [torch.full((2, 3, 6), torch.nan)])


@pytest.fixture
def begun(tmp_path, tiny_model, texts):
    """A temporal SAE in a folder, trained on rows in their order, and a run that trains it further."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    ids = torch.tensor([tiny_model.tokenizer(t)["input_ids"][:16] for t in texts])
    x = capture(tiny_model.module, resolve_hooks(tiny_model.module, [HOOK]), input_ids=ids)[HOOK]
    config = SAEConfig(d_sae=32, activation=TopK(2), temporal=Temporal(16, 2, 1, 4), lr=5e-3)
    (sae,) = train_on([x[i : i + 20].flatten(0, 1) for i in range(0, 200, 20)], [config], progress=False)
    sae.metadata |= {"hf_hook_name": HOOK, "model_name": "tiny"}
    sae.save(tmp_path / "first")

    def begin(method):
        return TrainConfig(
            model="tiny", data=str(tmp_path / "data.jsonl"), hooks=(HOOK,), tokens=3000, batch_size=128,
            text=DataConfig(context=16, held_out=0.2), start=Start(str(tmp_path / "first"), method=method, lr=3e-3),
            end_to_end=None if method else EndToEnd(), out=str(tmp_path / "run"),
        )  # fmt: skip

    return begin


@pytest.mark.parametrize("method", [*METHODS, None])
def test_interrupted_and_resumed_is_bit_equal_and_better(begun, tiny_model, texts, interrupted, method):
    config = begun(method)
    whole = train(dataclasses.replace(config, out=config.out + "-whole"), model=tiny_model, progress=False)
    with interrupted(9):
        train(config, model=tiny_model, progress=False)
    resumed = train(config, model=tiny_model, resume=True, progress=False)
    for name, value in whole.saes[0].state_dict().items():
        assert torch.equal(value, resumed.saes[0].state_dict()[name]), name
    start, tuned = SAE.load(config.start.sae), SAE.load(resumed.folders[0])
    assert tuned.metadata["finetuning"]["method"] == (method or "end_to_end")
    assert tuned.tied == (method is None)
    ids = torch.tensor([tiny_model.tokenizer(t)["input_ids"][:16] for t in texts[:40]])
    x = capture(tiny_model.module, resolve_hooks(tiny_model.module, [HOOK]), input_ids=ids)[HOOK]
    assert error(tuned, x) < error(start, x)


def test_tokens_that_masks_leave_out_are_read(begun, tiny_model):
    """And what they are changes what is trained, although their error is not in the loss."""
    masks = MaskConfig(False, positions="3:", norm_multiple=None)
    config = dataclasses.replace(begun("decoder"), masks=masks, tokens=500, out=None)
    session = prepare(config, tiny_model)
    with session.batches() as batches:
        rows = next(batches)
        tuning = session.make(session.config.saes[0], session.sites[0][0], batches.peek(0), steps=9, tokens=500, seed=0)
        codes, y_hat, y = tuning.outputs(rows[HOOK], None)
    x = session.current.activations[HOOK]
    assert len(y) == x[:, 3:].flatten(0, 1).shape[0]
    torch.testing.assert_close(y, x[:, 3:].flatten(0, 1) * tuning.scale)
    start = SAE.load(config.start.sae)
    torch.testing.assert_close(y_hat / tuning.scale, start(x)[:, 3:].flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(start(x)[:, 3:], start(x[:, 3:]), rtol=1e-2, atol=1e-2)
    assert codes.n_rows == len(y)


def test_relu_goes_on_with_its_own_penalty(tiny_model, texts):
    start = make(16, ReLU(), dtype=torch.float32)
    run = TrainConfig(hooks=(HOOK,), tokens=300, batch_size=64, text=DataConfig(context=16), end_to_end=EndToEnd())
    with pytest.raises(UnweaveError, match="does not say which L1 coefficient its ReLU was trained with"):
        train(run, model=tiny_model, data=texts, start=start, progress=False)
    start.metadata["sparsity_coefficients"] = [0.25]
    result = train(run, model=tiny_model, data=texts, start=start, progress=False)
    assert result.history[-1]["coefficient"] == 0.25
    given = SAEConfig(d_sae=M, activation=ReLU(), temporal=start.settings, sparsity=L1(0.5))
    result = train(dataclasses.replace(run, saes=(given,)), model=tiny_model, data=texts, start=start, progress=False)
    assert result.history[-1]["coefficient"] == pytest.approx(0.5, rel=0.1)


def test_fresh_ones_are_trained_end_to_end_in_the_order_of_the_text(tiny_model, texts):
    config = SAEConfig(d_sae=32, activation=TopK(2), temporal=Temporal(16, 2, 1, 4), lr=5e-3)
    run = TrainConfig(
        hooks=(HOOK,), tokens=1000, batch_size=64, text=DataConfig(context=16), saes=(config,), end_to_end=EndToEnd()
    )
    (sae,) = train(run, model=tiny_model, data=texts, progress=False).saes
    assert isinstance(sae, TemporalSAE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_precision": "bf16"}, "a temporal SAE, which reads whole rows, runs the model as it is"),
        ({"hooks": ("here",)}, "of a cache's rows tokens are left out"),
        ({}, "reads rows of text, and the model 'tiny' has no tokenizer"),
    ],
)
def test_what_is_refused(tiny_model, texts, change, message):
    start = make(16, dtype=torch.float32)
    model, data = LoadedModel(tiny_model.module, None, "tiny"), texts
    if "hooks" in change:
        data = MappedStore("mine", {"here": [torch.ones(300, 16)]}, {}, {"name": "mine"})
    config = TrainConfig(**{"hooks": (HOOK,), "tokens": 300, "start": Start(method="decoder")} | change)
    with pytest.raises(UnweaveError, match=message):
        train(config, model=model, data=data, start=start, progress=False)
