"""SAELens 3 to 5: the files of version 6 with a flat config, older names, and three things that version 6 dropped.

Those are `tanh-relu`, factors that scale codes before they are decoded (`finetuning_scaling_factor`), and scaled
inputs whose factor may or may not be folded into the weights.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from unweave._errors import UnweaveError
from unweave.hub.saelens import FILES, SCALE, SCALED, weights_of
from unweave.hub.source import Source
from unweave.sae import SAE, fold_input_scale
from unweave.sae.draft import Draft
from unweave.sae.reading import draft, read_config

_STORE = "activations_store_state.safetensors"
_NEWER_NAMES = {
    "hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index",
    "activation_fn": "activation_fn_str",
}  # fmt: skip
_ACTIVATIONS = ("relu", "tanh-relu", "topk")
_UNIT = 1e-3
"""How far from 1 the norm of a decoder's rows may be that training held at 1."""


def matches(source: Source) -> bool:
    if source.file not in FILES or not source.has("cfg.json") or not source.has("sae_weights.safetensors"):
        return False
    config = read_config(source.folder)
    metadata = config.get("metadata") or {}
    version = str(metadata.get("sae_lens_version") or config.get("sae_lens_version") or "0")
    major = version.split(".")[0]
    return "unweave" not in metadata and not (major.isdigit() and int(major) >= 6)


def read(source: Source) -> Draft:
    old, tensors = read_config(source.folder), weights_of(source)
    old = {_NEWER_NAMES.get(key, key): value for key, value in old.items()} | source.overrides
    factor = _finetuning_factor(tensors)
    config = _config(old, tensors, source)
    made = draft(config, tensors, source.folder)
    if factor is not None:
        made.folds = [*made.folds, lambda sae: _fold_codes_factor(sae, factor)]
    if (scale := _input_scale(old, source)) is not None:
        made.folds = [*made.folds, lambda sae: fold_input_scale(sae, scale)]
    elif old.get("normalize_sae_decoder") and old["normalize_activations"] == SCALED:
        made.folds = [*made.folds, lambda sae: _warn_of_unit_rows(sae, source)]
    return made


def _config(old: dict[str, Any], tensors: dict[str, Tensor], source: Source) -> dict[str, Any]:
    """The config in the form of version 6."""
    for name in ("W_enc", "W_dec"):
        if name not in tensors:
            raise UnweaveError(f"{source} lacks the tensor {name!r}.")
    kind = old.get("normalize_activations")
    old["normalize_activations"] = {True: SCALED, False: "none", None: "none"}.get(kind, kind)
    hook = str(old.get("hook_name"))
    architecture, unweave = _architecture(old, source)
    taken = {"normalize_activations", "architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input"}
    return {
        "architecture": architecture,
        "d_in": old.get("d_in") or tensors["W_enc"].shape[0],
        "d_sae": old.get("d_sae") or tensors["W_enc"].shape[1],
        "apply_b_dec_to_input": old.get("apply_b_dec_to_input", True),
        "normalize_activations": "none" if old["normalize_activations"] == SCALED else old["normalize_activations"],
        "reshape_activations": "hook_z" if "hook_z" in hook else "none",
        "metadata": {"prepend_bos": True} | {k: v for k, v in old.items() if k not in taken} | unweave["metadata"],
    } | unweave["keys"]


def _architecture(old: dict[str, Any], source: Source) -> tuple[str, dict[str, dict[str, Any]]]:
    """Architecture, and what keys and metadata it takes."""
    architecture, activation = old.get("architecture") or "standard", old.get("activation_fn_str") or "relu"
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UnweaveError(f"{source} has the activation function {activation!r}, which is none of {known}.")
    if activation == "topk":
        k = (old.get("activation_fn_kwargs") or {}).get("k")
        return "topk", {"keys": {"k": k} if k is not None else {}, "metadata": {}}  # whatever `architecture` says
    if activation == "tanh-relu":
        if architecture != "standard":
            raise UnweaveError(f"{source} is a {architecture} SAE of tanh-relu, which is a standard one's only.")
        return "tanhrelu", {"keys": {}, "metadata": {"unweave": {"activation": {"type": "tanhrelu"}}}}
    return architecture, {"keys": {}, "metadata": {}}


def _finetuning_factor(tensors: dict[str, Tensor]) -> Tensor | None:
    """What codes are multiplied by before they are decoded, if anything; taken out of the tensors."""
    found = [tensors.pop(name) for name in ("scaling_factor", "finetuning_scaling_factor") if name in tensors]
    return next((factor for factor in found if (factor != 1).any()), None)


def _fold_codes_factor(sae: SAE, factor: Tensor) -> None:
    if factor.shape != (sae.d_sae,):
        raise UnweaveError(f"finetuning_scaling_factor has the shape {tuple(factor.shape)}, not ({sae.d_sae},).")
    sae.W_dec.mul_(factor.float()[:, None])


def _input_scale(old: dict[str, Any], source: Source) -> float | None:
    """The factor of the inputs that is not in the weights yet; None if there is none."""
    if old["normalize_activations"] != SCALED:
        return None
    if SCALE in source.hints:
        return float(source.hints[SCALE])
    if source.has(_STORE) and "estimated_norm_scaling_factor" in (state := source.tensors(_STORE)):
        return float(state["estimated_norm_scaling_factor"])
    if source.folder.absolute().name.startswith("final_"):
        return None  # the end of a run folds it, and leaves the config as it was
    raise UnweaveError(
        f"{source} was trained on scaled activations ({SCALED}), and its files do not say by which factor, nor whether "
        f"it is in the weights: pass {SCALE}=, or 1 if it is."
    )


def _warn_of_unit_rows(sae: SAE, source: Source) -> None:
    """After the fold, rows that training held at norm 1 have the norm 1/scale, unless they were normalised again."""
    norms = sae.W_dec.norm(dim=1)
    if (norms - 1).abs().max() < _UNIT:
        warnings.warn(
            f"the decoder of {source} has unit rows, though the scale of its inputs was folded into it: that version "
            "of SAELens normalised it again, so its features are decoded too large by that scale.",
            stacklevel=2,
        )
