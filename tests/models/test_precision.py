from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from unweave._errors import UnweaveError
from unweave.models import Hook, LoadedModel, Meter, capture, copied_bytes, copy_in, dtype_of, gains_from_bf16

IDS = torch.arange(24).view(2, 12)


def gpt2(**settings: Any) -> LoadedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_layer": 3, "n_embd": 32}
    config = GPT2Config(n_head=2, **sizes | settings)
    return LoadedModel(GPT2LMHeadModel(config).eval().requires_grad_(False), None, "tiny")


def test_a_copy_in_bf16_computes_the_same_up_to_rounding_and_the_model_stays() -> None:
    model, hooks = gpt2(), [Hook("transformer.h.1"), Hook("transformer.h.1.mlp.act")]
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    expected = capture(model.module, hooks, IDS)
    low = copy_in(model, torch.bfloat16, hooks, IDS)
    got = capture(low.module, hooks, IDS)
    for name, x in expected.items():
        assert got[name].dtype == torch.bfloat16
        assert ((got[name].float() - x).norm() / x.norm()) < 0.01
    assert dtype_of(model.module) == torch.float32
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())
    assert torch.equal(capture(model.module, hooks, IDS)["transformer.h.1"], expected["transformer.h.1"])


def test_what_lies_behind_the_hook_is_shared_and_not_copied() -> None:
    model, hook = gpt2(tie_word_embeddings=False), Hook("transformer.h.1.attn")
    low = copy_in(model, torch.bfloat16, [hook], IDS).module
    own = {n for n, p in low.named_parameters() if p is not model.module.get_parameter(n)}
    assert {n.split(".mlp")[0] for n in own if ".h." in n} >= {"transformer.h.0"}
    assert not any(n.startswith(("lm_head", "transformer.h.2", "transformer.ln_f", "transformer.h.1.mlp")) for n in own)
    assert copied_bytes(model.module, low) == 2 * sum(model.module.get_parameter(n).numel() for n in own)


def test_tied_weights_stay_tied() -> None:
    low: Any = copy_in(gpt2(), torch.bfloat16, [Hook("lm_head")], IDS).module
    assert low.lm_head.weight is low.transformer.wte.weight
    assert low.lm_head.weight.dtype == torch.bfloat16


class Choosy(nn.Module):
    """Runs its second expert for large ids alone, and its last module first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts = nn.Embedding(50, 8), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.out, self.head, self.first = nn.Identity(), nn.Linear(8, 50), nn.Linear(8, 8)
        self.register_buffer("frequencies", torch.rand(8))
        self.kept = nn.Linear(8, 8)
        self._keep_in_fp32_modules = ["kept"]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.first(self.embed(ids))
        x = self.kept(x.float()).to(x.dtype)
        return self.head(self.out(self.experts[int(ids.max() > 25)](x)))


def test_an_expert_that_the_first_tokens_did_not_choose_is_copied_too() -> None:
    model = LoadedModel(Choosy(), None, "choosy")
    low: Any = copy_in(model, torch.bfloat16, [Hook("out")], torch.tensor([[3]])).module
    assert capture(low, [Hook("out")], torch.tensor([[40]]))["out"].dtype == torch.bfloat16
    assert low.first.weight.dtype == low.experts[1].weight.dtype == torch.bfloat16
    assert low.kept.weight.dtype == low.frequencies.dtype == torch.float32
    assert low.head.weight is model.module.head.weight  # type: ignore[union-attr]


def test_a_module_that_cannot_be_copied() -> None:
    model = gpt2()
    model.module.hold = (i for i in range(3))  # type: ignore[assignment]
    with pytest.raises(UnweaveError, match="'tiny' cannot be copied into bfloat16: cannot pickle 'generator' object"):
        copy_in(model, torch.bfloat16, [Hook("transformer.h.0")], IDS)


def test_which_models_gain() -> None:
    assert not gains_from_bf16(gpt2().module)
    assert gains_from_bf16(gpt2(n_embd=256, n_layer=1, n_positions=512, vocab_size=400).module)
    assert not gains_from_bf16(gpt2(n_embd=256, n_layer=1).module.bfloat16())
    assert not gains_from_bf16(nn.Identity())


def test_the_meter_counts_what_lives_at_the_same_time() -> None:
    x = torch.ones(1000)
    with Meter() as meter:
        y = x + 1
        view = y[10:]
        del y
        for _ in range(10):
            z = view * 2
        z.add_(1)
        del view
        big = torch.zeros(5000)
    assert meter.largest == 20_000
    assert meter.live == 3960 + 20_000
    assert meter.peak == 3960 + 20_000
    del z, big
    assert meter.live == 0
