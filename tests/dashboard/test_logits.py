from __future__ import annotations

import pytest
import torch
from torch import nn

from unweave.dashboard.logits import logit_effects
from unweave.models import LoadedModel

D, VOCAB = 16, 40
SIZES = {
    "vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "max_position_embeddings": 8,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
NORM = {
    "LlamaForCausalLM": lambda m: m.model.norm.weight,
    "Gemma2ForCausalLM": lambda m: 1 + m.model.norm.weight,
    "GPTNeoXForCausalLM": lambda m: m.gpt_neox.final_layer_norm.weight,
}


def perturbed(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("name", NORM)
def test_tokens_of_a_direction_against_the_whole_table(name: str) -> None:
    import transformers

    config = getattr(transformers, name.replace("ForCausalLM", "Config"))
    module = perturbed(getattr(transformers, name)(config(**SIZES)))
    directions = torch.randn(7, D)
    centred = directions - directions.mean(1, keepdim=True) if name == "GPTNeoXForCausalLM" else directions
    expected = (centred * NORM[name](module)) @ module.get_output_embeddings().weight.T
    expected -= expected.mean(1, keepdim=True)

    effects = logit_effects(module, directions, n_tokens=VOCAB)
    assert effects is not None
    order = expected.argsort(dim=1, descending=True)
    assert torch.equal(effects.promoted, order)
    assert torch.equal(effects.suppressed, order.flip(1))
    torch.testing.assert_close(effects.promoted_by, expected.gather(1, order), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(effects.suppressed_by, expected.gather(1, order).flip(1), rtol=1e-3, atol=1e-4)


def test_a_direction_moves_the_logits_as_it_says(model: LoadedModel) -> None:
    """GPT-2, whose final layer norm subtracts the mean: with the norm's scale held, the effect is exact."""
    module = model.module
    x, direction = torch.randn(D), torch.randn(D)
    norm, scale = module.transformer.ln_f, x.var(unbiased=False).add(1e-5).sqrt()

    def logits(v: torch.Tensor) -> torch.Tensor:
        return module.lm_head((v - v.mean()) / scale * norm.weight + norm.bias)

    change = (logits(x + direction) - logits(x)) * scale
    change -= change.mean()
    effects = logit_effects(module, direction[None], n_tokens=5)
    assert effects is not None
    assert torch.equal(effects.promoted[0], change.topk(5).indices)
    torch.testing.assert_close(effects.promoted_by[0], change.topk(5).values, rtol=1e-3, atol=1e-4)


def test_a_model_without_a_head_has_none(model: LoadedModel) -> None:
    assert logit_effects(model.module.transformer, torch.randn(2, D)) is None
    assert logit_effects(nn.Linear(D, D), torch.randn(2, D)) is None
    assert logit_effects(model.module, torch.randn(2, D + 1)) is None


def test_padded_vocabulary_is_left_out(model: LoadedModel) -> None:
    effects = logit_effects(model.module, torch.randn(3, D), vocabulary=20)
    assert effects is not None
    assert effects.promoted.max() < 20
    assert effects.suppressed.max() < 20
