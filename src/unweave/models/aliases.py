"""Names for the same place in every known family: `resid_post.3`, or TransformerLens' `blocks.3.hook_resid_post`.

A table gives, for each class of transformer block, the module whose input or output is the named tensor. The blocks
are found by walking the module tree, so a causal LM, its bare base model and a wrapper around either all work. Only
what is exact is in the table: TransformerLens' `ln1.hook_normalized`, say, is taken before the norm's weight, which no
Hugging Face module hands out, and a parallel block (GPT-NeoX) has no `hook_resid_mid`.

Our own four names and TransformerLens' agree but for BERT, whose blocks end in a norm: `resid_post.N` is what the next
block reads, `blocks.N.hook_resid_post` the sum before that norm. `hook_z` has its heads side by side in one axis.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from unweave.models.hooks import Hook

Table = dict[str, str]
"""Alias to place. `{n}` is the number of a block, `{block}` its path, `{parent}` what comes before the stack's name."""


def _pre_norm(*, attn_out: str, attn_z: str, mlp_out: str, resid_mid: str, embed: str | None) -> Table:
    """The aliases of a family whose blocks add to the residual stream what attention and MLP return."""
    table = {
        "resid_pre.{n}": "{block}:in",
        "resid_post.{n}": "{block}",
        "attn_out.{n}": attn_out,
        "mlp_out.{n}": mlp_out,
        "blocks.{n}.hook_resid_pre": "{block}:in",
        "blocks.{n}.attn.hook_z": attn_z,
        "blocks.{n}.hook_attn_out": attn_out,
        "blocks.{n}.hook_resid_mid": resid_mid,
        "blocks.{n}.hook_mlp_out": mlp_out,
        "blocks.{n}.hook_resid_post": "{block}",
    }
    return table if embed is None else {"hook_embed": embed, **table}


_GPT2 = _pre_norm(
    attn_out="{block}.attn",
    attn_z="{block}.attn.c_proj:in",
    mlp_out="{block}.mlp",
    resid_mid="{block}.ln_2:in",
    embed="{parent}wte",
)
_GPT_NEOX = _pre_norm(
    attn_out="{block}.attention",
    attn_z="{block}.attention.dense:in",
    mlp_out="{block}.mlp",
    resid_mid="{block}.post_attention_layernorm:in",
    embed="{parent}embed_in",
)
_LLAMA = _pre_norm(
    attn_out="{block}.self_attn",
    attn_z="{block}.self_attn.o_proj:in",
    mlp_out="{block}.mlp",
    resid_mid="{block}.post_attention_layernorm:in",
    embed="{parent}embed_tokens",
)
# A second norm comes after attention and MLP, and what is added to the residual stream is the normed output.
_GEMMA_3 = _pre_norm(
    attn_out="{block}.post_attention_layernorm",
    attn_z="{block}.self_attn.o_proj:in",
    mlp_out="{block}.post_feedforward_layernorm",
    resid_mid="{block}.pre_feedforward_layernorm:in",
    embed="{parent}embed_tokens",
)
# Whether the embedding or the model scales by sqrt(d_model) has changed between versions of transformers.
_GEMMA_2 = {alias: place for alias, place in _GEMMA_3.items() if alias != "hook_embed"}
_GEMMA = {alias: place for alias, place in _LLAMA.items() if alias != "hook_embed"}
_VIT = _pre_norm(
    attn_out="{block}.attention",
    attn_z="{block}.attention.o_proj:in",
    mlp_out="{block}.mlp",
    resid_mid="{block}.layernorm_after:in",
    embed=None,
)
_CLIP = _pre_norm(
    attn_out="{block}.self_attn",
    attn_z="{block}.self_attn.out_proj:in",
    mlp_out="{block}.mlp",
    resid_mid="{block}.layer_norm2:in",
    embed=None,
)
# What is added to the residual stream is scaled first.
_DINO = _pre_norm(
    attn_out="{block}.layer_scale1",
    attn_z="{block}.attention.o_proj:in",
    mlp_out="{block}.layer_scale2",
    resid_mid="{block}.norm2:in",
    embed=None,
)
_TIMM = _pre_norm(
    attn_out="{block}.ls1",
    attn_z="{block}.attn.proj:in",
    mlp_out="{block}.ls2",
    resid_mid="{block}.norm2:in",
    embed=None,
)
_BERT = {
    "resid_pre.{n}": "{block}:in",
    "resid_post.{n}": "{block}",
    "attn_out.{n}": "{block}.attention.output.dense",
    "mlp_out.{n}": "{block}.output.dense",
    "blocks.{n}.hook_resid_pre": "{block}:in",
    "blocks.{n}.attn.hook_z": "{block}.attention.output.dense:in",
    "blocks.{n}.hook_attn_out": "{block}.attention.output.dense",
    "blocks.{n}.hook_resid_mid": "{block}.attention.output.LayerNorm:in",
    "blocks.{n}.hook_mlp_out": "{block}.output.dense",
    "blocks.{n}.hook_resid_post": "{block}.output.LayerNorm:in",
    "blocks.{n}.hook_normalized_resid_post": "{block}",
}

FAMILIES: dict[str, Table] = {
    "GPT2Block": _GPT2,
    "GPTNeoXLayer": _GPT_NEOX,
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "GemmaDecoderLayer": _GEMMA,
    "Gemma2DecoderLayer": _GEMMA_2,
    "Gemma3DecoderLayer": _GEMMA_3,
    "BertLayer": _BERT,
    "ViTLayer": _VIT,
    "CLIPEncoderLayer": _CLIP,
    "SiglipEncoderLayer": _CLIP,
    "Siglip2EncoderLayer": _CLIP,
    "Dinov2Layer": _DINO,
    "Dinov2WithRegistersLayer": _DINO,
    "DINOv3ViTLayer": _DINO,
    "timm.Block": _TIMM,
}
"""The aliases of each known class of block. Others than timm call theirs `Block` too."""
_VISION = (_VIT, _CLIP, _DINO, _TIMM)


def aliases(module: nn.Module) -> dict[str, str]:
    """Every alias of `module`, with the place it stands for.

    Args:
        module: A model, a base model without its head, or a wrapper of one.

    Returns:
        Alias to `"path"` or `"path:in"`, block by block; empty unless the model has exactly one stack of blocks of a
        known family. Of a language model that also sees, the stack is the language model's.
    """
    stacks = [
        (path, child)
        for path, child in module.named_modules()
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) and _table(child[0]) is not None
    ]
    if len(stacks) > 1:
        stacks = [(path, stack) for path, stack in stacks if not any(_table(stack[0]) is table for table in _VISION)]
    if len(stacks) != 1:
        return {}
    [(stack_path, stack)] = stacks
    parent = stack_path.rpartition(".")[0]
    places: dict[str, str] = {}
    for n, block in enumerate(stack):
        for alias, place in (_table(block) or {}).items():
            if alias.endswith("hook_resid_mid") and getattr(block, "use_parallel_residual", False):
                continue
            places[alias.format(n=n)] = place.format(
                n=n, block=f"{stack_path}.{n}" if stack_path else str(n), parent=f"{parent}." if parent else ""
            )
    return places


def is_alias(name: str) -> bool:
    """Whether `name` is an alias in some known family, be it this model's or not."""
    template = re.sub(r"\b\d+\b", "{n}", name)
    return any(template in table for table in FAMILIES.values())


def tl_name(module: nn.Module, hook: Hook) -> str | None:
    """TransformerLens' name for a hook, such as `blocks.1.hook_resid_post`.

    Args:
        module: The model that the hook belongs to.
        hook: A hook that `resolve_hooks` returned for it.

    Returns:
        The name, or None where TransformerLens has no tensor that is exactly this one.
    """
    place = str(replace(hook, columns=None))  # TransformerLens names the whole tensor
    return next((alias for alias, where in aliases(module).items() if "hook_" in alias and where == place), None)


def _table(block: nn.Module) -> Table | None:
    """The family of a block, also where something (sharding, an adapter) has derived a class from the block's."""
    classes = type(block).__mro__
    names = (name for c in classes for name in (c.__name__, f"{c.__module__.partition('.')[0]}.{c.__name__}"))
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)
