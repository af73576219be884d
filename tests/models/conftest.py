"""One tiny model with random weights per family; nothing is downloaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

LAYERS, WIDTH, VOCAB = 3, 16, 40
SIZES = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 32,
         "bos_token_id": 0, "eos_token_id": 1},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES),
    "gpt_neox_sequential": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**SIZES, "use_parallel_residual": False}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 4}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GROUPED),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
    "bert": ("BertConfig", "BertForMaskedLM", SIZES),
}  # fmt: skip


def build(family: str) -> nn.Module:
    """Every weight is moved from its initial value, lest a norm of ones or a bias of zeros hide a mistake."""
    import transformers

    config_class, model_class, sizes = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def built() -> dict[str, nn.Module]:
    return {}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str, built: dict[str, nn.Module]) -> nn.Module:
    """The model of a family, with its head."""
    if family not in built:
        built[family] = build(family)
    return built[family]


@pytest.fixture
def fresh_model(family: str) -> nn.Module:
    """One that no test has run: transformers leaves hooks on what was asked for its hidden states."""
    return build(family)


@pytest.fixture
def gpt2(built: dict[str, nn.Module]) -> nn.Module:
    """A GPT-2 that a test may change."""
    if "gpt2" not in built:
        built["gpt2"] = build("gpt2")
    return copy.deepcopy(built["gpt2"])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
