"""Training with the SAE spliced into a tiny model."""

import dataclasses
import json

import pytest
import torch

import unweave.training.trainer as trainer
from unweave._errors import UnweaveError
from unweave.activations import DataConfig, MaskConfig
from unweave.activations.cache.foreign import MappedStore
from unweave.models import LoadedModel, resolve_hooks, splice
from unweave.objectives import AuxK, EndToEnd, Matryoshka, TargetL0, kl_loss
from unweave.sae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK, Transcoder
from unweave.training import SAEConfig, Start, TrainConfig, train
from unweave.training.decoder_tuning import move_bias
from unweave.training.train import prepare

HOOK = "transformer.h.0"
TEXT = DataConfig(context=16, held_out=0.0)


@pytest.fixture(scope="module")
def model(tiny_model):
    """With a head and layers so large that the activations matter to the predictions."""
    import copy

    own = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in own.module.transformer.parameters():
            parameter.mul_(1 if parameter.ndim < 2 else 8)
    return own


def divergence(sae, model, texts):
    ids = torch.tensor([model.tokenizer(t)["input_ids"][:16] for t in texts[:40]])
    (hook,) = resolve_hooks(model.module, [HOOK])
    with torch.no_grad():
        clean = model.module(ids).logits
        with splice(model.module, {hook: lambda a: sae(a)}):
            changed = model.module(ids).logits
    return kl_loss(clean, changed, torch.ones_like(ids, dtype=torch.bool)).item()


def settings(config, loss, **more):
    """A run at the hook; `prompts` rows in a step, None for the settings of the SAE that is trained further."""
    more = {"tokens": 12_000, "hooks": (HOOK,), "text": TEXT} | more
    more["start"] = more.pop("further", None)
    more["batch_size"] = more.pop("prompts", 16) * more["text"].context
    saes = {} if config is None else {"saes": (config,)}
    return TrainConfig(end_to_end=loss, **saes, **more)


def run(config, loss, model, texts, start=None, **more):
    (sae,) = train(settings(config, loss, **more), model=model, data=texts, start=start, progress=False).saes
    return sae


@pytest.mark.parametrize(
    "loss",
    [EndToEnd(), EndToEnd(beta=None, kl=1.0), EndToEnd(beta=None, ce=1.0, error=1.0),
     EndToEnd(beta=None, error=0.1, downstream=1.0, hooks=("transformer.h.1",))],
    ids=["balanced", "kl", "ce", "downstream"],
)  # fmt: skip
def test_training_brings_the_predictions_back(model, texts, loss):
    config = SAEConfig(d_sae=32, activation=TopK(4), lr=5e-3)
    sae = run(config, loss, model, texts)
    fresh = run(config, loss, model, texts, tokens=1)
    assert divergence(sae, model, texts) < 0.8 * divergence(fresh, model, texts)
    assert sae.metadata["hf_hook_name"] == HOOK
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())


def test_fine_tuning_starts_from_an_sae(model, texts):
    start = run(SAEConfig(d_sae=32, activation=BatchTopK(4), lr=5e-3), EndToEnd(), model, texts, tokens=6000)
    config = SAEConfig(d_sae=32, activation=BatchTopK(4), lr=2e-3, auxk=AuxK(0), sparsity=())
    same = run(config, EndToEnd(), model, texts, tokens=1, start=start)
    assert divergence(same, model, texts) == pytest.approx(divergence(start, model, texts), rel=0.2)
    tuned = run(config, EndToEnd(), model, texts, start=start)
    assert divergence(tuned, model, texts) < divergence(start, model, texts)


def test_rows_that_were_rounded_still_have_one_norm(model, texts):
    """Unit rows of a file in bfloat16 differ by a thousandth; training brings them to one norm, and goes on."""
    start = SAE(16, 32, TopK(4)).bfloat16()
    norms = start.W_dec.float().norm(dim=1)
    assert not torch.allclose(norms, norms[0].expand(32), rtol=1e-4)
    tuned = run(None, EndToEnd(), model, texts, tokens=300, start=start, further=Start(lr=1e-9))
    x = torch.randn(50, 16)
    torch.testing.assert_close(tuned(x), start.float()(x), rtol=0.01, atol=0.01)


def test_penalties_stay(model, texts):
    """The penalty is there besides the model's loss: a large one leaves nothing active."""
    from unweave.objectives import L1

    l0s = []
    for coefficient in (0.01, 100.0):
        config = SAEConfig(d_sae=32, activation=ReLU(), sparsity=L1(coefficient), lr=1e-2, sparsity_warmup=0.0)
        sae = run(config, EndToEnd(beta=None, kl=1.0), model, texts, tokens=6000)
        l0s.append(sae.encode_sparse(torch.randn(100, 16)).l0().mean().item())
    assert l0s[1] < 0.5 * l0s[0]


def test_the_models_own_gradients_come_back(model, texts):
    weight = model.module.transformer.wte.weight
    weight.requires_grad_(True)
    try:
        run(SAEConfig(d_sae=32, activation=TopK(4)), EndToEnd(), model, texts, tokens=300)
        assert weight.requires_grad
        assert weight.grad is None
    finally:
        weight.requires_grad_(False)


def test_a_cache_has_no_model_to_be_spliced_into():
    """An end-to-end loss without a model."""
    store = MappedStore("mine", {HOOK: [torch.ones(300, 16)]}, {}, {"name": "mine"})
    with pytest.raises(UnweaveError, match="a cache holds activations alone"):
        train(settings(SAEConfig(d_sae=32, activation=TopK(4)), EndToEnd()), data=store)


def test_a_model_that_predicts_no_tokens(model):
    headless = LoadedModel(model.module.transformer, model.tokenizer, "headless")
    with pytest.raises(UnweaveError, match="a model that predicts tokens, and 'headless' does not"):
        train(settings(SAEConfig(d_sae=32, activation=TopK(4)), EndToEnd(), hooks=("h.0",)), model=headless, data=["a"])


def explode():
    raise AssertionError("text was read")
    yield


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hooks": "transformer.h.9"}, "transformer.h"),
        ({"config": SAEConfig(d_sae=32, activation=TopK(4), matryoshka=Matryoshka())}, "leave out"),
        ({"config": SAEConfig(d_sae=32, activation=TopK(4), error="token")}, "leave out"),
        ({"config": None, "start": SAE(17, 32, TopK(4))}, "width 17, and those at 'transformer.h.0' have width 16"),
        (
            {"config": None, "start": SAE(16, 32, TopK(4), metadata={"hook_name": "blocks.1.hook_resid_post"})},
            "is of the hook 'blocks.1.hook_resid_post'",
        ),
        ({"config": None, "start": Transcoder(16, 16, 32, TopK(4))}, "give targets, one for each"),
        ({"config": SAEConfig(d_sae=64, activation=TopK(4)), "start": SAE(16, 32, TopK(4))}, "d_sae=32"),
        ({"model_precision": "bf16"}, "runs the model as it is"),
        ({"hooks": "transformer.h.1", "loss": EndToEnd(downstream=1.0, hooks=(HOOK,))}, "does not come after"),
    ],
)
def test_what_is_refused_before_any_text_is_read(model, arguments, message):
    given = {"config": SAEConfig(d_sae=32, activation=TopK(4)), "loss": EndToEnd()} | arguments
    start = given.pop("start", None)
    given |= {"tokens": 100}
    with pytest.raises(UnweaveError, match=message):
        train(settings(given.pop("config"), given.pop("loss"), **given), model=model, data=explode(), start=start)


def test_masked_tokens_keep_their_activation(model, texts):
    """pitfall_089: of the rows, the spliced pass differs from the clean one at the one unmasked position alone."""
    (after,) = resolve_hooks(model.module, ["transformer.h.1:in"])
    seen = []
    with splice(model.module, {after: lambda a: seen.append(a.detach().clone()) or a}):
        run(SAEConfig(d_sae=32, activation=TopK(4)), EndToEnd(), model, texts, tokens=12,
            masks=MaskConfig(positions=(5,), special_tokens=False), prompts=4)  # fmt: skip
    clean, spliced = seen[-2:]
    changed = (clean != spliced).any(2)
    assert changed[:, 5].all()
    changed[:, 5] = False
    assert not changed.any()


def test_the_budget_of_a_batch_is_that_of_its_unmasked_tokens(model, texts):
    """pitfall_044: BatchTopK's k counts neither masked tokens nor padding, and what they hold changes no code."""
    config = settings(
        SAEConfig(d_sae=32, activation=BatchTopK(4)), EndToEnd(), prompts=4, tokens=500,
        masks=MaskConfig(positions="5:", special_tokens=False, norm_multiple=None),
    )  # fmt: skip
    session = prepare(config, model, texts)
    with session.batches() as batches:
        (site,) = session.sites[0]
        trainee = session.make(config.saes[0], site, batches.peek(0), steps=10, tokens=500, seed=0)
        x = site.rows(next(batches)).x
        assert len(x) == 4 * 11
        assert trainee.step(x).l0 == 4 * len(x)


def test_masks_that_leave_nothing(model):
    with pytest.raises(UnweaveError, match="left no token in 8 passes"):
        run(SAEConfig(d_sae=32, activation=TopK(4)), EndToEnd(), model, ["<eos> " * 200], prompts=1)


def test_a_run_ends_after_exactly_as_many_tokens_as_asked_for(model, texts):
    """The last step is taken on a part of a pass: its first unmasked tokens."""
    config = settings(SAEConfig(d_sae=32, activation=TopK(4)), EndToEnd(), tokens=1000)
    result = train(config, model=model, data=texts, progress=False)
    assert result.history[-1]["tokens"] == 1000
    steps = prepare(config, model, texts).plan().steps
    assert result.saes[0].metadata["training_steps"] == pytest.approx(steps, abs=1)


LATER = EndToEnd(kl=1.0, downstream=1.0, hooks=("transformer.h.1",))


@pytest.mark.parametrize("activation", [JumpReLU(), BatchTopK(4), ReLU()], ids=lambda a: a.name)
def test_killed_and_resumed_is_bit_equal(model, texts, tmp_path, monkeypatch, activation):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    config = settings(
        SAEConfig(d_sae=32, activation=activation, lr=5e-3), LATER, tokens=4000, checkpoint_every=1000,
        data=str(tmp_path / "data.jsonl"), text=DataConfig(context=16, held_out=0.2), out=str(tmp_path / "whole"),
    )  # fmt: skip
    whole = train(config, model=model, progress=False)
    config = dataclasses.replace(config, out=str(tmp_path / "killed"))
    check, seen = trainer._check_batch, []

    def die(*args):
        seen.append(1)
        if len(seen) == 12:
            raise MemoryError
        check(*args)

    monkeypatch.setattr(trainer, "_check_batch", die)
    with pytest.raises(MemoryError):
        train(config, model=model, progress=False)
    monkeypatch.undo()
    assert any((tmp_path / "killed" / "checkpoints").iterdir())
    resumed = train(config, model=model, resume=True, progress=False)
    assert resumed.saes[0].metadata["training_steps"] == whole.saes[0].metadata["training_steps"]
    for name, value in whole.saes[0].state_dict().items():
        assert torch.equal(value, resumed.saes[0].state_dict()[name]), name
    for row, other in zip(whole.history, resumed.history, strict=True):
        assert row | {"tokens_per_second": 0} == other | {"tokens_per_second": 0}


@pytest.mark.parametrize(
    ("activation", "subtract"), [(JumpReLU(), False), (ReLU(), True), (Gated(), False), (TopK(4), False)], ids=str
)
def test_any_sae_is_fine_tuned_at_the_l0_that_it_has(model, texts, activation, subtract):
    """Its settings come from itself; the penalty of what has no k holds L0, and the predictions get better."""
    sparsity = TargetL0(5) if isinstance(activation, JumpReLU) else None
    config = SAEConfig(d_sae=32, activation=activation, lr=1e-2, sparsity=sparsity, sparsity_warmup=0.0)
    trained = TrainConfig(hooks=(HOOK,), saes=(config,), tokens=8000, batch_size=256, text=TEXT)
    (start,) = train(trained, model=model, data=texts, progress=False).saes
    move_bias(start, subtracted=subtract)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    tuned = run(None, EndToEnd(), model, texts, start=start, tokens=8000, further=Start(lr=3e-3))
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    assert divergence(tuned, model, texts) < divergence(start, model, texts)
    x = prepare(trained, model, texts).held_out()[HOOK]
    l0s = [sae.encode_sparse(x).l0().float().mean().item() for sae in (start, tuned)]
    assert l0s[1] == pytest.approx(l0s[0], rel=0.2)
    assert tuned.metadata["finetuning"]["method"] == "end_to_end"


def test_an_sae_of_two_places_is_trained_on_its_own_passes(model, texts):
    """Several SAEs and hooks in one run: each is spliced in alone, so each ends as in a run of its own."""
    configs = tuple(SAEConfig(d_sae=32, activation=TopK(k), lr=5e-3) for k in (2, 4))
    together = settings(configs[0], EndToEnd(kl=1.0), tokens=1000, hooks=(HOOK, "transformer.h.1:in"))
    result = train(dataclasses.replace(together, saes=configs), model=model, data=texts, progress=False)
    alone = run(configs[0], EndToEnd(kl=1.0), model, texts, tokens=1000)
    assert len(result.saes) == 4
    assert all(torch.equal(value, result.saes[0].state_dict()[name]) for name, value in alone.state_dict().items())
