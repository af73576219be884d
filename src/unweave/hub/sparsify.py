"""sparsify (EleutherAI): `sae.safetensors` and `cfg.json`; TopK or GroupMax, SAE or transcoder, with or without a skip.

The pre-encoder bias follows from `transcode` alone, and `W_dec` is stored as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from unweave._errors import UnweaveError
from unweave._files import atomic_path, write_json, write_tensors
from unweave.hub.layout import plain, take
from unweave.hub.source import Source
from unweave.hub.writing import only_autoencoders_and_transcoders, weights_of
from unweave.sae import SAE, AbsTopK, Activation, GroupMax, TopK, Transcoder
from unweave.sae.draft import Draft

FILE, CONFIG = "sae.safetensors", "cfg.json"
LAYOUT = {
    "W_enc": "encoder.weight M d", "b_enc": "encoder.bias M", "W_dec": "W_dec M d", "b_dec": "b_dec d",
    "W_skip": "W_skip? d d",
}  # fmt: skip

_MODULE = re.compile(r"(\w+\.)+\d+(\.\w+)*|(\w+\.)*\w*(embed|wte)\w*")
"""A module of a layer, such as `layers.10.mlp`, or the embedding."""


def matches(source: Source) -> bool:
    return source.find(FILE) == [FILE] and source.has(CONFIG)


def read(source: Source) -> Draft:
    config = source.json(CONFIG)
    for key in ("d_in", "k"):
        if not isinstance(config.get(key), int):
            raise UnweaveError(f"the {CONFIG} of {source} has no whole number {key!r}.")
    latents = config.get("num_latents") or config["d_in"] * config.get("expansion_factor", 32)
    weights = take(source.tensors(FILE), LAYOUT, source, expected={"d": config["d_in"], "M": latents})
    if bool(config.get("skip_connection")) != ("W_skip" in weights):
        raise UnweaveError(f"{source} has skip_connection={config.get('skip_connection')}, unlike its tensors.")
    transcode = bool(config.get("transcode"))
    folder = source.folder.absolute()
    hook = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder  # several seeds of one hook
    metadata: dict[str, Any] = {"sparsify": config}
    if _MODULE.fullmatch(hook.name):  # sparsify's folders bear the names of the modules
        metadata["hf_hook_name"] = hook.name
    return plain(
        weights, _activation(config, source), source, metadata=metadata, pre_bias=not transcode, predicts=transcode
    )


def _activation(config: dict[str, Any], source: Source) -> Activation:
    k, name = config["k"], config.get("activation", "topk")
    if config.get("signed"):
        return AbsTopK(k)
    match name:
        case "topk":
            return TopK(k)
        case "groupmax":
            return GroupMax(k)
    raise UnweaveError(f"{source} has the activation {name!r}, which is none of topk, groupmax.")


def write(sae: SAE, folder: Path) -> None:
    only_autoencoders_and_transcoders(sae, "sparsify")
    names: dict[type[Activation], str] = {TopK: "topk", GroupMax: "groupmax"}
    if type(sae.activation) not in names:
        raise UnweaveError(f"sparsify has TopK and GroupMax, and not {type(sae.activation).__name__}.")
    if sae.d_out != sae.d_in:
        raise UnweaveError(f"sparsify has one width, and this one reads {sae.d_in} and writes {sae.d_out}.")
    transcode = isinstance(sae, Transcoder) or not sae.apply_b_dec_to_input  # sparsify's transcoders subtract nothing
    weights = weights_of(sae)
    tensors = {
        "encoder.weight": weights["W_enc"].T.contiguous(), "encoder.bias": weights["b_enc"], "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }  # fmt: skip
    if "W_skip" in weights:
        tensors["W_skip"] = weights["W_skip"]
    with atomic_path(folder / FILE) as path:
        write_tensors(path, tensors)
    config = {
        "activation": names[type(sae.activation)], "d_in": sae.d_in, "num_latents": sae.d_sae,
        "expansion_factor": max(1, sae.d_sae // sae.d_in), "k": sae.activation.k,  # type: ignore[attr-defined]
        "multi_topk": False, "normalize_decoder": False, "skip_connection": "W_skip" in weights, "transcode": transcode,
    }  # fmt: skip
    write_json(folder / CONFIG, config)
