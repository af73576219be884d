"""Temporal SAEs as their authors published them (Lubana et al., arXiv 2511.01836): `conf.yaml` and one checkpoint."""

from __future__ import annotations

import re
from typing import Any

from unweave.hub.saelens import SCALE
from unweave.hub.source import Source
from unweave.sae.draft import Draft
from unweave.sae.reading import draft
from unweave.sae.temporal_files import SCALED

CONFIG, FILE = "conf.yaml", "latest_ckpt.safetensors"
_NAMES = {"D": "W_dec", "b": "b_dec", "E": "W_enc"}
_KEYS = ("n_heads", "n_attn_layers", "bottleneck_factor", "sae_diff_type", "kval_topk", "tied_weights")


def matches(source: Source) -> bool:
    return source.has(CONFIG) and bool(source.find(FILE))


def read(source: Source) -> Draft:
    config = source.yaml(CONFIG)
    own, d = config["sae"], int(config["llm"]["dimin"])
    keys: dict[str, Any] = {key: own[key] for key in _KEYS}
    latents = int(d * own["exp_factor"])
    scale = float(source.hints.get(SCALE, own.get("scaling_factor", 1.0)))  # one factor by two names: applied once
    layer = re.search(r"layer[_.]?(\d+)", source.address)
    keys |= {
        "architecture": "temporal", "d_in": d, "d_sae": latents, "apply_b_dec_to_input": True,
        "normalize_activations": SCALED, "activation_normalization_factor": scale,
        "metadata": {"hf_hook_name": f"model.layers.{layer[1]}"} if layer else {},
    }  # fmt: skip
    tensors = {_NAMES.get(name, name): tensor for name, tensor in source.tensors(FILE).items()}
    return draft(keys, tensors, source.folder)
