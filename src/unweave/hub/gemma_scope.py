"""Gemma Scope (Lieberum et al., arXiv 2408.05147): `params.npz`, and a path that says the rest.

JumpReLU without a pre-encoder bias; SAEs of the residual stream, MLP and attention outputs, and transcoders.
"""

from __future__ import annotations

import re
from typing import Any

from unweave.hub.layout import plain, take
from unweave.hub.source import Source
from unweave.sae import JumpReLU, fold_input_scale
from unweave.sae.draft import Draft

FILES = ("params.npz",)
LAYOUT = {
    "W_enc": "w_enc d M", "b_enc": "b_enc M", "W_dec": "w_dec M o", "b_dec": "b_dec o", "threshold": "threshold M",
}  # fmt: skip
_HOOKS = {
    "res": ("blocks.{}.hook_resid_post", None),
    "mlp": ("blocks.{}.hook_mlp_out", None),
    "att": ("blocks.{}.attn.hook_z", None),
    "transcoders": ("blocks.{}.ln2.hook_normalized", "blocks.{}.hook_mlp_out"),
}
"""By kind of repository: what is read, and of transcoders what is predicted."""


def matches(source: Source) -> bool:
    return bool(source.find(*FILES))


def read(source: Source) -> Draft:
    tensors = {name.lower(): tensor for name, tensor in source.tensors(source.one(*FILES)).items()}  # older: W_enc
    weights = take(tensors, LAYOUT, source)
    metadata, predicts = names(source.address)
    # Trained on embeddings before Gemma multiplies them by sqrt(d), which `hook_embed` comes after.
    scale = weights["W_enc"].shape[0] ** -0.5 if metadata.get("hook_name") == "hook_embed" else None
    folds = [] if scale is None else [lambda sae: fold_input_scale(sae, scale)]
    return plain(weights, JumpReLU(), source, metadata=metadata, predicts=predicts, folds=folds)


def names(address: str) -> tuple[dict[str, Any], bool]:
    """What a path says: metadata, and whether it is a transcoder's."""
    metadata: dict[str, Any] = {}
    found = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", address)
    if found is None:
        return metadata, False
    size, tuned, kind = found.groups()
    metadata["model_name"] = f"google/gemma-2-{size}" + "-it" * (tuned == "it")
    layer = re.search(r"layer_(\d+)", address)
    if "/embedding/" in address:
        metadata["hook_name"] = "hook_embed"
    elif layer is not None:
        reads, writes = _HOOKS[kind]
        metadata["hook_name"] = reads.format(layer[1])
        if writes is not None:
            metadata["hook_name_out"] = writes.format(layer[1])
    return metadata, kind == "transcoders"
