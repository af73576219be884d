"""Training with the SAE spliced into a tiny model."""

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.activations import DataConfig, MaskConfig
from unweave.models import resolve_hooks, splice
from unweave.objectives import AuxK, EndToEnd, Matryoshka, kl_loss
from unweave.sae import BatchTopK, ReLU, TopK
from unweave.training import SAEConfig
from unweave.training.end_to_end import train_end_to_end

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


def run(config, loss, model, texts, **more):
    return train_end_to_end(config, loss, model=model, data=texts, hook=HOOK, text=TEXT, **{"tokens": 12_000} | more)


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


def explode():
    raise AssertionError("text was read")
    yield


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, "needs the model"),
        ({"hook": "transformer.h.9"}, "transformer.h"),
        ({"hook": "transformer.h.*"}, "stands for 2 hooks"),
        ({"config": SAEConfig(d_sae=32, activation=TopK(4), matryoshka=Matryoshka())}, "leave out"),
        ({"config": SAEConfig(d_sae=32, activation=TopK(4), error="token")}, "leave out"),
        ({"hook": "transformer.h.1", "loss": EndToEnd(downstream=1.0, hooks=(HOOK,))}, "does not come after"),
    ],
)
def test_what_is_refused_before_any_text_is_read(model, arguments, message):
    settings = {"config": SAEConfig(d_sae=32, activation=TopK(4)), "loss": EndToEnd(), "model": model, "hook": HOOK}
    settings |= arguments
    with pytest.raises(UnweaveError, match=message):
        train_end_to_end(settings.pop("config"), settings.pop("loss"), data=explode(), tokens=100, **settings)


def test_masked_tokens_keep_their_activation(model, texts):
    """pitfall_089: of the rows, the spliced pass differs from the clean one at the one unmasked position alone."""
    (after,) = resolve_hooks(model.module, ["transformer.h.1:in"])
    seen = []
    with splice(model.module, {after: lambda a: seen.append(a.detach().clone()) or a}):
        run(SAEConfig(d_sae=32, activation=TopK(4)), EndToEnd(), model, texts, tokens=10,
            masks=MaskConfig(positions=(5,), special_tokens=False), prompts=4)  # fmt: skip
    clean, spliced = seen[8:10]  # the first eight give the scale
    changed = (clean != spliced).any(2)
    assert changed[:, 5].all()
    changed[:, 5] = False
    assert not changed.any()


def test_masks_that_leave_nothing(model):
    with pytest.raises(UnweaveError, match="left no token in 64 passes"):
        run(SAEConfig(d_sae=32, activation=TopK(4)), EndToEnd(), model, ["<eos> " * 200], prompts=1)
