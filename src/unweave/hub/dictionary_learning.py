"""dictionary_learning (Marks, Karvonen, Mueller): `ae.pt` and `config.json`, one layout for each class.

A class with `encoder.weight` is stored transposed, one with `W_enc` is not. Files of finished runs take raw
activations; those of interrupted runs are one level deeper and in units of the norm that training divided by.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unweave._errors import UnweaveError, nearest
from unweave._files import atomic_path, write_json
from unweave.hub.layout import Layout, plain, take, value_of
from unweave.hub.source import Source
from unweave.hub.writing import metadata_for, only_plain, save_torch, weights_of, with_pre_bias
from unweave.sae import SAE, Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.sae.draft import Draft

FILES = ("ae.pt", "ae_*.pt", "checkpoints/ae_*.pt")
_LINEAR = {"W_enc": "encoder.weight M d", "b_enc": "encoder.bias M", "W_dec": "decoder.weight d M"}
_MATRICES = {"W_enc": "W_enc d M", "b_enc": "b_enc M", "W_dec": "W_dec M d", "b_dec": "b_dec d"}
_SETTINGS = ("k", "threshold", "group_sizes")
_UNITS = ("b_enc", "b_dec", "b_mag", "threshold")
"""What is in units of the inputs."""


class Class(NamedTuple):
    """One `dict_class`."""

    layout: Layout
    activation: Callable[[dict[str, float]], Activation]
    pre_bias: bool = True


CLASSES = {
    "AutoEncoder": Class(_LINEAR | {"b_dec": "bias d"}, lambda _: ReLU()),
    "AutoEncoderNew": Class(_LINEAR | {"b_dec": "decoder.bias d"}, lambda _: ReLU(), pre_bias=False),
    "GatedAutoEncoder": Class(
        {"W_enc": "encoder.weight M d", "b_enc": "gate_bias M", "b_mag": "mag_bias M", "r_mag": "r_mag M",
         "W_dec": "decoder.weight d M", "b_dec": "decoder_bias d"},
        lambda _: Gated(),
    ),
    "AutoEncoderTopK": Class(_LINEAR | {"b_dec": "b_dec d"}, lambda settings: TopK(int(settings["k"]))),
    "BatchTopKSAE": Class(_LINEAR | {"b_dec": "b_dec d"}, lambda settings: BatchTopK(settings["k"])),
    "MatryoshkaBatchTopKSAE": Class(_MATRICES, lambda settings: BatchTopK(settings["k"])),
    "JumpReluAutoEncoder": Class(
        _MATRICES | {"threshold": "threshold M"}, lambda _: JumpReLU(), pre_bias=False
    ),
}  # fmt: skip


def matches(source: Source) -> bool:
    return bool(source.find(*FILES))


def read(source: Source) -> Draft:
    name = "ae.pt" if source.file is None and source.has("ae.pt") else source.one(*FILES)
    value, config = source.torch(name), _config(source)
    scale = None
    if isinstance(value, dict) and "ae" in value:  # an interrupted run
        own = dict(value.get("config") or {})
        scale, config = float(value.get("norm_factor") or 1), config or own.get("trainer", own)
        value = value["ae"]
    tensors = source.only_tensors(value, name)
    kind = _class(config.get("dict_class") or source.hints.get("dict_class"), tensors, source)
    made = CLASSES[kind]
    settings = {name: tensors.pop(name) for name in _SETTINGS if name in tensors and name not in made.layout}
    expected = {"d": config.get("activation_dim"), "M": config.get("dict_size")}
    weights = take(tensors, made.layout, source, expected=expected)
    numbers = {name: value_of(settings[name], name, source) for name in settings if name != "group_sizes"}
    if "k" not in numbers and (k := config.get("k", source.hints.get("k"))) is not None:
        numbers["k"] = float(k)
    if "TopK" in kind and "k" not in numbers:
        raise UnweaveError(f"{source} is a {kind} that does not say its k: pass k=.")
    activation = made.activation(numbers)
    if isinstance(activation, BatchTopK) and "threshold" in numbers:
        weights["threshold"] = torch.tensor(max(numbers["threshold"], 0.0))  # -1 where it was never tracked: ReLU
    if scale is not None:
        scaled = {name: weights[name] for name in _UNITS if name in weights}
        weights |= {name: tensor.float().mul(scale).to(tensor.dtype) for name, tensor in scaled.items()}
    metadata: dict[str, Any] = {"dict_class": kind} | ({"dictionary_learning": config} if config else {})
    if "lm_name" in config:
        metadata["model_name"] = config["lm_name"]
    if "submodule_name" in config:
        metadata["submodule_name"] = config["submodule_name"]
    if "group_sizes" in settings:
        metadata["matryoshka_widths"] = settings["group_sizes"].cumsum(0).tolist()
    return plain(weights, activation, source, metadata=metadata, pre_bias=made.pre_bias)


def _config(source: Source) -> dict[str, Any]:
    """The trainer's config, which lies beside the file or beside the folder of checkpoints."""
    folder = source.parent() if source.folder.absolute().name == "checkpoints" else source
    config = folder.json("config.json") if folder.has("config.json") else {}
    trainer = config.get("trainer", config)
    if not isinstance(trainer, dict):
        raise UnweaveError(f"the config.json of {source} has no trainer.")
    return trainer


def _class(named: str | None, tensors: dict[str, Tensor], source: Source) -> str:
    """The class; where no config names it, the one whose tensors these are."""
    if named is not None:
        if named not in CLASSES:
            known = nearest(named, CLASSES) or f"; known are {', '.join(CLASSES)}."
            raise UnweaveError(f"{source} has the dict_class {named!r}{known}")
        return named
    names = tensors.keys() - set(_SETTINGS)
    stored = {kind: {entry.split()[0] for entry in made.layout.values()} for kind, made in CLASSES.items()}
    fitting = [kind for kind in CLASSES if names == stored[kind] - set(_SETTINGS)]
    if fitting == ["MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"]:
        fitting = ["MatryoshkaBatchTopKSAE"] if "k" in tensors else ["JumpReluAutoEncoder"]
    if len(fitting) != 1:
        choice = ", ".join(fitting or CLASSES)
        raise UnweaveError(f"{source} has no config that says its class: pass dict_class=, one of {choice}.")
    return fitting[0]


def write(sae: SAE, folder: Path) -> None:
    only_plain(sae, "dictionary_learning")
    kind = _class_of(sae)
    weights = with_pre_bias(sae, weights_of(sae), CLASSES[kind].pre_bias)
    made, config = CLASSES[kind], dict(sae.metadata.get("dictionary_learning") or {})
    tensors = {entry.split()[0]: weights[ours] for ours, entry in made.layout.items()}
    for ours, entry in made.layout.items():
        stored, *axes = entry.split()
        if (ours, *axes) in (("W_enc", "M", "d"), ("W_dec", "d", "M")):
            tensors[stored] = weights[ours].T.contiguous()
    if isinstance(sae.activation, TopK | BatchTopK):
        if sae.activation.k % 1:
            raise UnweaveError(f"dictionary_learning has whole k only, and this SAE has k={sae.activation.k}.")
        tensors["k"] = torch.tensor(int(sae.activation.k), dtype=torch.int32)
        tensors["threshold"] = torch.tensor(-1.0 if sae.threshold is None else float(sae.threshold))
        config["k"] = int(sae.activation.k)
    if kind == "MatryoshkaBatchTopKSAE":
        widths = torch.tensor([0, *sae.metadata["matryoshka_widths"]])
        tensors["group_sizes"] = widths.diff()
    config |= {"dict_class": kind, "activation_dim": sae.d_in, "dict_size": sae.d_sae, **metadata_for(sae, "lm_name")}
    with atomic_path(folder / "ae.pt") as path:
        save_torch(tensors, path)
    write_json(folder / "config.json", {"trainer": config, "buffer": {}})


def _class_of(sae: SAE) -> str:
    """The class that computes what an SAE does."""
    kinds: dict[type[Activation], str] = {
        ReLU: "AutoEncoder" if sae.apply_b_dec_to_input else "AutoEncoderNew", TopK: "AutoEncoderTopK",
        BatchTopK: "MatryoshkaBatchTopKSAE" if "matryoshka_widths" in sae.metadata else "BatchTopKSAE",
        Gated: "GatedAutoEncoder", JumpReLU: "JumpReluAutoEncoder",
    }  # fmt: skip
    if type(sae.activation) not in kinds:
        raise UnweaveError(f"dictionary_learning has no class for {type(sae.activation).__name__}.")
    if isinstance(sae.activation, BatchTopK) and (sae.threshold is None or sae.threshold.isnan()):
        raise UnweaveError("this BatchTopK SAE has no threshold yet, which its inference compares with: calibrate it.")
    return kinds[type(sae.activation)]
