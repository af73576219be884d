"""circuit-tracer (Hanna et al.): transcoders, one safetensors file a layer, and cross-layer transcoders, two a layer.

Michael Hanna's own earlier transcoders are the first with ReLU; a side file of theirs has a misspelt name in the wild.
First-generation files may hold `W_dec` the other way around, which its shape tells.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._files import atomic_path, write_tensors
from unweave.hub.cross_layer import Layer, cross_layer
from unweave.hub.layout import plain, positive, take, value_of
from unweave.hub.source import Source
from unweave.hub.writing import (
    metadata_for,
    only_autoencoders_and_transcoders,
    thresholds_of,
    weights_of,
    with_pre_bias,
)
from unweave.sae import SAE, Activation, BatchTopK, CrossLayerTranscoder, JumpReLU, ReLU, TopK, Transcoder
from unweave.sae.draft import Draft

FILES, ENCODERS = ("layer_*.safetensors",), ("W_enc_*.safetensors",)
CONFIG, SIDE_FILES = "config.yaml", ("wandb-config.yaml", "wanb-config.yaml")
LAYOUT = {
    "W_enc": "W_enc M d", "b_enc": "b_enc M", "W_dec": "W_dec M o", "b_dec": "b_dec o", "W_skip": "W_skip? o d",
    "threshold": "activation_function.threshold? M",
}  # fmt: skip
_DEFAULT_HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}


def matches(source: Source) -> bool:
    return bool(source.find(*FILES, *ENCODERS))


def read(source: Source) -> Draft:
    config = source.yaml(CONFIG) if source.has(CONFIG) else {}
    if source.find(*ENCODERS):
        return _cross_layer(source, config)
    name = _file(source, config)
    tensors = source.tensors(name)
    k = tensors.pop("k", None)
    threshold = tensors.get("activation_function.threshold")
    if threshold is not None and threshold.numel() == 1 and "b_enc" in tensors:
        tensors["activation_function.threshold"] = threshold.flatten().expand(len(tensors["b_enc"])).contiguous()
    layout = LAYOUT
    if "W_dec" in tensors and "b_enc" in tensors and tensors["W_dec"].shape[0] != len(tensors["b_enc"]):
        layout = LAYOUT | {"W_dec": "W_dec o M"}
    weights = take(tensors, layout, source, expected=_expected(source))
    if "threshold" in weights:
        positive(weights["threshold"], source)
    count = value_of(k, "k", source) if k is not None else config.get("k", source.hints.get("k"))
    activation = _activation("threshold" in weights, count, config, source)
    metadata = {"model_name": config["model_name"]} if "model_name" in config else {}
    if any(source.has(side) for side in SIDE_FILES):
        metadata["model_from_pretrained_kwargs"] = {"fold_ln": False}
    layer = re.search(r"layer_(\d+)", name)
    if layer is not None:
        hooks = _DEFAULT_HOOKS | {key: config[key] for key in _DEFAULT_HOOKS if key in config}
        metadata["hook_name"], metadata["hook_name_out"] = (f"blocks.{layer[1]}.{hook}" for hook in hooks.values())
    return plain(weights, activation, source, metadata=metadata, predicts=True)


def _file(source: Source, config: dict[str, Any]) -> str:
    """The file of the layer that is asked for; `config.yaml` may name it."""
    layer = source.hints.get("layer")
    if layer is None:
        return source.one(*FILES)
    entries = config.get("transcoders") or ()
    named = {int(entry["layer"]): str(entry["filepath"]) for entry in entries if {"layer", "filepath"} <= set(entry)}
    name = named.get(int(layer), f"layer_{layer}.safetensors")
    source.inside(name)
    return name


def _expected(source: Source) -> dict[str, int | None]:
    for side in SIDE_FILES:
        if source.has(side):
            values = {key: entry.get("value") for key, entry in source.yaml(side).items() if isinstance(entry, dict)}
            return {"d": values.get("d_model"), "M": values.get("d_feature")}
    return {}


def _activation(has_threshold: bool, k: float | None, config: dict[str, Any], source: Source) -> Activation:
    named = config.get("activation") or config.get("activation_function")
    if named not in (None, "relu", "topk", "jumprelu", "jump_relu"):
        raise UnweaveError(f"{source} has the activation {named!r}, which is none of relu, topk, jumprelu.")
    if has_threshold:
        return JumpReLU()
    if k is not None:
        return TopK(int(k))
    if named not in (None, "relu"):
        raise UnweaveError(f"{source} is a {named} transcoder without {'k' if named == 'topk' else 'thresholds'}.")
    return ReLU()


def _cross_layer(source: Source, config: dict[str, Any]) -> Draft:
    if source.file is not None:
        raise UnweaveError(f"{source} is one layer of a cross-layer transcoder: give the folder with all of them.")
    n, layers = len(source.find(*ENCODERS)), []
    for i in range(n):
        encoder = source.tensors(f"W_enc_{i}.safetensors")
        layout = {
            "W_enc": f"W_enc_{i} M d", "b_enc": f"b_enc_{i} M", "b_dec": f"b_dec_{i} o",
            "threshold": f"threshold_{i}? M", "skip": f"W_skip_{i}? d o",
        }  # fmt: skip
        weights = take(encoder, layout, source)
        if "threshold" in weights:
            positive(weights["threshold"], source)
        decoders = source.tensors(f"W_dec_{i}.safetensors")
        W_dec = decoders.get(f"W_dec_{i}")
        if W_dec is None or W_dec.ndim != 3 or W_dec.shape[1] != n - i:
            shape = None if W_dec is None else tuple(W_dec.shape)
            raise UnweaveError(f"W_dec_{i} in {source} has the shape {shape}: (d_sae, {n - i}, d_out) was expected.")
        layers.append(Layer(weights, W_dec.flatten(1)))
    widths = layers[0].weights["W_enc"].shape[0], layers[0].weights["b_dec"].shape[0]
    reads, writes = (
        {f"blocks.{i}.{config.get(key, default)}": width for i in range(n)}
        for (key, default), width in zip(_DEFAULT_HOOKS.items(), widths, strict=True)
    )
    metadata = {"model_name": config["model_name"]} if "model_name" in config else {}
    activation = _activation("threshold" in layers[0].weights, config.get("k"), config, source)
    return cross_layer(layers, activation, source, reads=reads, writes=writes, metadata=metadata)


def write(sae: SAE, folder: Path) -> None:
    if type(sae) is CrossLayerTranscoder:
        _write_cross_layer(sae, folder)
        return
    only_autoencoders_and_transcoders(sae, "circuit-tracer")
    if type(sae.activation) not in (ReLU, TopK, JumpReLU, BatchTopK):
        raise UnweaveError(f"circuit-tracer has ReLU, TopK and JumpReLU, and not {type(sae.activation).__name__}.")
    weights = with_pre_bias(sae, weights_of(sae), wanted=False)
    tensors: dict[str, Tensor] = {name: weights[name] for name in ("b_enc", "W_dec", "b_dec")}
    tensors["W_enc"] = weights["W_enc"].T.contiguous()
    if "W_skip" in weights:
        tensors["W_skip"] = weights["W_skip"]
    if sae.threshold is not None:
        tensors["activation_function.threshold"] = thresholds_of(sae)
    if isinstance(sae.activation, TopK):
        tensors["k"] = weights["b_enc"].new_tensor(sae.activation.k).long()
    found = re.search(r"\d+", str(sae.metadata.get("hook_name") or sae.metadata.get("hf_hook_name") or "0"))
    layer = int(found[0]) if found else 0
    with atomic_path(folder / f"layer_{layer}.safetensors") as path:
        write_tensors(path, tensors)
    _write_config(folder, _config_with(sae, layer, folder))


def _write_cross_layer(coder: CrossLayerTranscoder, folder: Path) -> None:
    """Decoders from each layer to its own output and all later ones, side by side in one axis."""
    if type(coder.activation) not in (ReLU, JumpReLU, BatchTopK):
        raise UnweaveError(
            "circuit-tracer's cross-layer transcoders have ReLU and JumpReLU, and not "
            f"{type(coder.activation).__name__}."
        )
    if len(set(coder.writes.values())) > 1:
        raise UnweaveError(f"circuit-tracer's layers write to one width, and this one's to {dict(coder.writes)}.")
    weights, m = weights_of(coder), coder.latents_per_layer
    thresholds = None if coder.threshold is None else thresholds_of(coder).split(m)
    encoders, biases = weights["W_enc"].split(m, 1), weights["b_enc"].split(m)
    outputs = list(coder.split(weights["b_dec"]).values())
    for i in range(coder.layers):
        tensors = {"W_enc": encoders[i].T, "b_enc": biases[i], "b_dec": outputs[i]}
        if thresholds is not None:
            tensors["threshold"] = thresholds[i]
        if "W_skip" in weights:
            tensors["W_skip"] = weights["W_skip"][i]
        with atomic_path(folder / f"W_enc_{i}.safetensors") as path:
            write_tensors(path, {f"{name}_{i}": _own(tensor) for name, tensor in tensors.items()})
        with atomic_path(folder / f"W_dec_{i}.safetensors") as path:
            write_tensors(path, {f"W_dec_{i}": weights[f"W_dec.{i}"].view(m, coder.layers - i, -1)})
    config, metadata = metadata_for(coder, "model_name"), coder.metadata
    reads, writes = metadata.get("hook_names") or coder.reads, metadata.get("hook_names_out") or coder.writes
    for key, names in zip(_DEFAULT_HOOKS, (reads, writes), strict=True):
        ends = {name.removeprefix(f"blocks.{i}.") for i, name in enumerate(names)}
        if len(ends) == 1 and ends.isdisjoint(names):
            config[key] = ends.pop()
    _write_config(folder, config)


def _own(tensor: Tensor) -> Tensor:
    """A copy that is no view of something larger."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    with atomic_path(folder / CONFIG) as path:
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def _config_with(sae: SAE, layer: int, folder: Path) -> dict[str, Any]:
    """What circuit-tracer finds the layers of a folder by: those that are there already, and this one."""
    before = Source(folder).yaml(CONFIG) if (folder / CONFIG).is_file() else {}
    config = {key: before[key] for key in ("model_name", *_DEFAULT_HOOKS) if key in before}
    config |= metadata_for(sae, "model_name")
    hooks = ("hook_name", "hook_name_out" if isinstance(sae, Transcoder) else "hook_name")
    for key, ours in zip(_DEFAULT_HOOKS, hooks, strict=True):
        if (hook := re.fullmatch(r"blocks\.\d+\.(.+)", str(sae.metadata.get(ours)))) is not None:
            config[key] = hook[1]
    if isinstance(sae.activation, TopK):
        config |= {"activation": "topk", "k": sae.activation.k}
    entries = {int(entry["layer"]): entry for entry in before.get("transcoders") or ()}
    entries[layer] = {"id": f"layer_{layer}", "layer": layer, "filepath": f"layer_{layer}.safetensors"}
    return config | {"transcoders": [entries[i] for i in sorted(entries)]}
