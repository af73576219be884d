"""The aliases name what they say, in every family: checked against the model's own hidden states and arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from unweave._errors import UnweaveError
from unweave.models import capture, resolve_hooks, tl_name
from unweave.models.aliases import aliases

LAYERS = 3


def at(model: nn.Module, ids: Tensor, *names: str) -> list[Tensor]:
    """The activations at some names, in the order of the names."""
    hooks = [resolve_hooks(model, [name])[0] for name in names]
    seen = capture(model, hooks, input_ids=ids)
    return [seen[str(hook)] for hook in hooks]


def test_pitfall_255_every_family_can_be_built_and_hooked(model: nn.Module, ids: Tensor) -> None:
    seen = capture(model, resolve_hooks(model, list(aliases(model))), input_ids=ids)
    assert len(seen) >= 5 * LAYERS
    assert {tensor.shape for tensor in seen.values()} == {(2, 7, 16)}


@pytest.mark.parametrize("headless", [False, True])
def test_residuals_are_the_hidden_states(model: nn.Module, ids: Tensor, headless: bool) -> None:
    model = model.base_model if headless else model
    hidden_states = model(input_ids=ids, output_hidden_states=True).hidden_states
    before = at(model, ids, *(f"resid_pre.{n}" for n in range(LAYERS)))
    after = at(model, ids, *(f"resid_post.{n}" for n in range(LAYERS - 1)))
    for ours, theirs in zip([*before, *after], [*hidden_states[:-1], *hidden_states[1:-1]], strict=True):
        assert torch.equal(ours, theirs)


def test_a_block_adds_what_attention_and_mlp_put_out(model: nn.Module, family: str, ids: Tensor) -> None:
    for n in range(LAYERS):
        pre, post = at(model, ids, f"resid_pre.{n}", f"resid_post.{n}")
        attn, mlp = at(model, ids, f"attn_out.{n}", f"mlp_out.{n}")
        if family == "bert":
            layer = model.bert.encoder.layer[n]
            middle = layer.attention.output.LayerNorm(pre + attn)
            assert torch.allclose(layer.output.LayerNorm(middle + mlp), post, atol=1e-5)
        else:
            assert torch.allclose(post - pre, attn + mlp, atol=1e-4)
        # Neither of the two may be the other, nor nothing.
        assert not torch.allclose(attn, mlp, atol=1e-2)
        assert min(attn.norm(), mlp.norm()) > 0.1


def test_transformerlens_names_mean_what_they_mean_there(model: nn.Module, family: str, ids: Tensor) -> None:
    for n in range(LAYERS):
        pre, attn, mlp, post = at(
            model, ids, *(f"blocks.{n}.hook_{name}" for name in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
        )
        assert torch.equal(pre, at(model, ids, f"resid_pre.{n}")[0])
        assert torch.equal(attn, at(model, ids, f"attn_out.{n}")[0])
        assert torch.equal(mlp, at(model, ids, f"mlp_out.{n}")[0])
        if family == "gpt_neox":  # parallel: there is no stream between attention and MLP
            assert f"blocks.{n}.hook_resid_mid" not in aliases(model)
            continue
        [mid] = at(model, ids, f"blocks.{n}.hook_resid_mid")
        assert torch.allclose(mid, pre + attn, atol=1e-5)
        if family == "bert":  # post-norm: the sum, and what the norm makes of it
            layer = model.bert.encoder.layer[n]
            assert torch.allclose(post, layer.attention.output.LayerNorm(mid) + mlp, atol=1e-5)
            [normalized] = at(model, ids, f"blocks.{n}.hook_normalized_resid_post")
            assert torch.allclose(normalized, layer.output.LayerNorm(post), atol=1e-5)
            assert torch.equal(normalized, at(model, ids, f"resid_post.{n}")[0])
        else:
            assert torch.equal(post, at(model, ids, f"resid_post.{n}")[0])
            assert torch.allclose(post, mid + mlp, atol=1e-5)


def test_hook_z_is_what_the_output_projection_reads(model: nn.Module, ids: Tensor) -> None:
    [hook] = resolve_hooks(model, ["blocks.1.attn.hook_z"])
    [z] = at(model, ids, "blocks.1.attn.hook_z")
    attention = hook.path.rpartition(".")[0]
    projected = model.get_submodule(hook.path)(z)
    # In BERT the projection's module goes on with a norm, so it is compared with the alias instead.
    whole = "attn_out.1" if attention.endswith("output") else attention
    assert torch.allclose(projected, at(model, ids, whole)[0], atol=1e-6)


def test_hook_embed_is_the_token_embedding(model: nn.Module, family: str, ids: Tensor) -> None:
    if family in ("bert", "gemma", "gemma2"):
        with pytest.raises(UnweaveError, match="matches nothing"):
            resolve_hooks(model, ["hook_embed"])
        return
    embedded = model.get_input_embeddings().weight[ids] * (4.0 if family == "gemma3" else 1.0)
    [ours] = at(model, ids, "hook_embed")
    assert torch.equal(ours, embedded)
    if family != "gpt2":  # positions are rotary, so nothing is added before the first block
        assert torch.equal(ours, at(model, ids, "resid_pre.0")[0])


@pytest.mark.parametrize("headless", [False, True])
def test_tl_name_is_the_way_back(model: nn.Module, headless: bool) -> None:
    model = model.base_model if headless else model
    theirs = [alias for alias in aliases(model) if "hook_" in alias]
    assert len(theirs) >= 5 * LAYERS
    for alias in theirs:
        [hook] = resolve_hooks(model, [alias])
        assert tl_name(model, hook) == alias


def test_tl_name_of_our_names(model: nn.Module, family: str) -> None:
    def name(alias: str) -> str | None:
        return tl_name(model, *resolve_hooks(model, [alias]))

    assert name("resid_pre.1") == "blocks.1.hook_resid_pre"
    assert name("resid_post.1") == f"blocks.1.hook_{'normalized_' if family == 'bert' else ''}resid_post"
    assert name("attn_out.2") == "blocks.2.hook_attn_out"
    assert name("mlp_out.0") == "blocks.0.hook_mlp_out"


def test_what_is_not_exact_has_no_name(gpt2: nn.Module) -> None:
    with pytest.raises(UnweaveError, match=r"blocks\.0\.ln1\.hook_normalized"):
        resolve_hooks(gpt2, ["blocks.0.ln1.hook_normalized"])
    [hook] = resolve_hooks(gpt2, ["transformer.h.0.ln_1"])
    assert tl_name(gpt2, hook) is None


def test_the_stack_is_found_wherever_it_is(gpt2: nn.Module, ids: Tensor) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner(input_ids=input_ids).logits

    class Sharded(type(gpt2.transformer.h[0])):  # as some parallel wrappers do
        pass

    for block in gpt2.transformer.h:
        block.__class__ = Sharded
    wrapper = Wrapper(gpt2)
    [hook] = resolve_hooks(wrapper, ["resid_post.1"])
    assert str(hook) == "inner.transformer.h.1"
    assert tl_name(wrapper, hook) == "blocks.1.hook_resid_post"
    assert torch.equal(at(wrapper, ids, "resid_post.1")[0], at(gpt2, ids, "h.1")[0])


def test_the_text_stack_of_a_multimodal_model() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, intermediate_size=24, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=39)
    model = Gemma3ForConditionalGeneration(config).eval()
    [hook] = resolve_hooks(model, ["resid_post.2"])
    assert str(hook) == "model.language_model.layers.2"


def test_two_stacks_or_an_unknown_one_have_no_aliases(gpt2: nn.Module) -> None:
    for module in (nn.ModuleDict({"a": gpt2, "b": copy.deepcopy(gpt2)}), nn.Sequential(nn.Linear(2, 2))):
        assert aliases(module) == {}
        with pytest.raises(UnweaveError, match=r"'resid_post\.0' .* one stack of blocks of a known class \(GPT2Block,"):
            resolve_hooks(module, ["resid_post.0"])
