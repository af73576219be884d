"""Our attention for models of transformers: one more entry in its table of them, used only by copies that are ours."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from unweave import kernels

_NAME = "unweave"
_FAMILIES = {
    "bert", "clip_vision_model", "dinov2", "dinov3_vit", "gemma", "gpt2", "gpt_neox", "llama", "mistral", "qwen2",
    "qwen3", "siglip_vision_model", "vit",
}  # fmt: skip
"""Those that ask for the entry and do nothing else with its name."""


def use(module: nn.Module) -> bool:
    """Let a model of transformers, which somebody else may not hold, attend with ours where it would with "sdpa".

    Returns:
        Whether it is one that can.
    """
    found = {id(config): config for m in module.modules() if (config := getattr(m, "config", None)) is not None}
    done = False
    for config in found.values():
        if getattr(config, "model_type", None) in _FAMILIES and config._attn_implementation == "sdpa":
            _register()
            config._attn_implementation = _NAME
            done = True
    return done


@functools.cache
def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for each layer."""
    special = any(settings.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))
    if special or dropout or attention_mask is not None or query.shape[2] != key.shape[2]:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **settings
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    return kernels.attention(query, key, value, scale=scaling, causal=causal), None
