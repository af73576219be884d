"""Gemma Scope 2: SAEs and transcoders, some with an affine skip, and cross-layer transcoders.

What a file is follows from its tensors: the config may be missing or say less.
"""

from __future__ import annotations

import re
from typing import Any

from unweave._errors import UnweaveError
from unweave.hub.cross_layer import Layer, cross_layer
from unweave.hub.layout import plain, take
from unweave.hub.source import Source
from unweave.sae import JumpReLU
from unweave.sae.draft import Draft

FILES = ("params.safetensors",)
LAYERS = ("params_layer_*.safetensors",)
LAYOUT = {
    "W_enc": "w_enc d M", "b_enc": "b_enc M", "W_dec": "w_dec M o", "b_dec": "b_dec o", "threshold": "threshold M",
    "W_skip": "affine_skip_connection? d o",
}  # fmt: skip
_HOOKS = {
    "resid_post": ("model.layers.{}", None),
    "attn_out": ("model.layers.{}.self_attn.o_proj:in", None),
    "mlp_out": ("model.layers.{}.post_feedforward_layernorm", None),
    "transcoder": ("model.layers.{}.pre_feedforward_layernorm", "model.layers.{}.post_feedforward_layernorm"),
    "clt": ("model.layers.{}.pre_feedforward_layernorm", "model.layers.{}.post_feedforward_layernorm"),
}


def matches(source: Source) -> bool:
    return bool(source.find(*FILES, *LAYERS))


def read(source: Source) -> Draft:
    config = source.json("config.json") if source.has("config.json") else {}
    architecture = config.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise UnweaveError(f"{source} has the architecture {architecture!r}; known is 'jump_relu'.")
    if source.find(*LAYERS):
        return _cross_layer(source, config)
    weights = take(source.tensors(source.one(*FILES)), LAYOUT, source)
    metadata, predicts = _names(source.address, config)
    return plain(weights, JumpReLU(), source, metadata=metadata, predicts=predicts)


def _names(address: str, config: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Metadata from path and config, and whether it is a transcoder's."""
    metadata = {"model_name": config["model_name"]} if "model_name" in config else {}
    found = re.search(rf"/({'|'.join(_HOOKS)})(?:_all)?/(?:.*/)?layer_(\d+)_", address)
    if found is not None:
        reads, writes = _HOOKS[found[1]]
        metadata |= {"hf_hook_name": reads.format(found[2])}
        metadata |= {"hf_hook_name_out": writes.format(found[2])} if writes is not None else {}
        return metadata, writes is not None
    points = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    for key, point in zip(("hf_hook_name", "hf_hook_name_out"), points, strict=True):
        if point is not None and (key == "hf_hook_name" or points[0] != points[1]):
            metadata[key] = re.sub(r"\.output$", "", re.sub(r"\.input$", ":in", str(point)))
    return metadata, points[0] != points[1]


def _cross_layer(source: Source, config: dict[str, Any]) -> Draft:
    files = source.find(*LAYERS)
    if source.file is not None:
        raise UnweaveError(f"{source} is one layer of a cross-layer transcoder: give the folder with all of them.")
    layers = []
    for i in range(len(files)):
        where = repr(str(source.inside(f"params_layer_{i}.safetensors")))
        tensors = source.tensors(f"params_layer_{i}.safetensors")
        decoders = tensors.pop("w_dec", None)
        layout = {"skip" if ours == "W_skip" else ours: entry for ours, entry in LAYOUT.items() if ours != "W_dec"}
        weights = take(tensors, layout, where)
        if decoders is None or decoders.ndim != 3 or decoders.shape[1] not in (len(files), len(files) - i):
            shape = None if decoders is None else tuple(decoders.shape)
            raise UnweaveError(
                f"w_dec in {where} has the shape {shape}: (d_sae, targets, d_out) was expected, for {len(files)} or "
                f"{len(files) - i} targets."
            )
        layers.append(Layer(weights, decoders.flatten(1)[:, (i - len(files)) * decoders.shape[2] :]))
    reads, writes = (
        {_HOOKS["clt"][end].format(i): n for i in range(len(layers))}  # type: ignore[union-attr]
        for end, n in ((0, layers[0].weights["W_enc"].shape[0]), (1, layers[0].weights["b_dec"].shape[0]))
    )
    metadata = {"model_name": config["model_name"]} if "model_name" in config else {}
    return cross_layer(layers, JumpReLU(), source, reads=reads, writes=writes, metadata=metadata)
