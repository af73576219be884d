from __future__ import annotations

import pytest
import torch
from torch import nn

from unweave.evaluation.causal_lm import CausalLM
from unweave.evaluation.replay import Recording, layers_before, replay
from unweave.models import Hook, splice

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "GPTNeoX": (SIZES, "gpt_neox.layers"),
    "Llama": (GROUPED, "model.layers"),
    "Gemma2": ({**GROUPED, "sliding_window": 4, "final_logit_softcapping": 0.5}, "model.layers"),
    "Gemma3": ({**GROUPED, "sliding_window": 4}, "model.layers"),
    "Qwen3": (GROUPED, "model.layers"),
    "Cohere": ({**GROUPED, "logit_scale": 3.0}, "model.layers"),
}
"""Sizes, and where the layers are. Gemma 2 caps its logits and Cohere scales them, behind the unembedding."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    import transformers

    sizes, layers = FAMILIES[request.param]
    config_class = "Gemma3TextConfig" if request.param == "Gemma3" else f"{request.param}Config"
    config = getattr(transformers, config_class)(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{request.param}ForCausalLM")(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, layers


@pytest.mark.parametrize("where", ["0", "1:in", "1.mlp", "2"])
def test_replayed_runs_equal_plain_runs(family, where):
    """With other activations put in, in a padded batch, for the head's caps and scales, at several hooks."""
    model, layers = family
    path, _, side = f"{layers}.{where}".partition(":")
    hook = Hook(path, "in" if side else "out")
    ids, real = torch.randint(2, 40, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    real[1, 6:] = False
    assert CausalLM.obstacle(model, hook) is None
    lm = CausalLM(model, hook)
    run = lm.run(ids, real)
    other = torch.randn_like(run.activation)

    plain = model(input_ids=ids, attention_mask=real.long()).logits
    with splice(model, {hook: lambda x: other}):
        changed = model(input_ids=ids, attention_mask=real.long()).logits
    assert not torch.allclose(plain, changed, atol=1e-3)
    assert torch.allclose(lm.logits(run, run.hidden[real]), plain[real], atol=1e-5)
    assert torch.allclose(lm.logits(run, lm.rerun(run, ids, real, other)[real]), changed[real], atol=1e-5)
    assert lm.reproduces(ids[:1])


def test_layers_before_the_hook_run_once(gpt2):
    """The clean run computes them; the changed one begins behind them."""
    calls = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
        for number, block in enumerate(gpt2.module.transformer.h)
    ]
    ids, real = torch.randint(2, 64, (2, 8)), torch.ones(2, 8, dtype=torch.bool)
    lm = CausalLM(gpt2.module, Hook("transformer.h.0"))
    run = lm.run(ids, real)
    lm.rerun(run, ids, real, run.activation)
    for handle in handles:
        handle.remove()
    assert calls == [0, 1, 1]


def test_models_without_predictions(gpt2):
    assert "no causal language model" in CausalLM.obstacle(nn.Linear(2, 2), Hook("", "out"))
    assert "no causal language model" in CausalLM.obstacle(gpt2.module.transformer, Hook("h.0"))
    assert "not inside the body" in CausalLM.obstacle(gpt2.module, Hook("lm_head", "in"))


def test_a_model_whose_head_looks_at_the_tokens_is_noticed(gpt2, monkeypatch):
    """Its logits cannot be made from hidden states alone."""
    forward = type(gpt2.module).forward

    def biased(self, input_ids, **kwargs):
        output = forward(self, input_ids=input_ids, **kwargs)
        output.logits = output.logits + nn.functional.one_hot(input_ids, output.logits.shape[-1])
        return output

    lm = CausalLM(gpt2.module, Hook("transformer.h.0"))
    ids = torch.randint(2, 64, (1, 12))
    assert lm.reproduces(ids)
    monkeypatch.setattr(type(gpt2.module), "forward", biased)
    assert not lm.reproduces(ids)


class Twice(nn.Module):
    """Layers 0 and 1, then layer 0 again."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x):
        return self.layers[0](self.layers[1](self.layers[0](x)))


def test_a_layer_that_runs_again_later_is_not_replayed():
    model, x = Twice(), torch.randn(2, 3)
    hook = Hook("layers.1")
    recording = Recording(layers_before(model, hook))

    def stop(activation):
        recording.stop()
        return activation

    with recording, splice(model, {hook: stop}):
        model(x)
    assert list(recording.outputs) == [model.layers[1]]


def test_replay_leaves_the_module_as_it_was():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    before = layer(x)
    with replay({layer: "recorded"}):
        assert layer(None) == "recorded"
    assert seen == [1, 1]
    assert layer(x).equal(before)
    assert "forward" not in vars(layer)

    layer.forward = lambda x: "own"
    with replay({layer: "recorded"}):
        assert layer(x) == "recorded"
    assert layer(x) == "own"
