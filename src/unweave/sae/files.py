"""SAEs on disk, in SAELens' own layout, so that every tool that reads SAELens' files reads these.

A folder holds `cfg.json` and `sae_weights.safetensors`. `save` writes the inference form: BatchTopK becomes JumpReLU
with one common threshold. `save_training_form` keeps what training had: the k, and BatchTopK's scalar threshold. `load`
reads both. Nothing is unpickled, shapes are checked before anything is built, and unknown keys are kept as metadata.

Activation functions that SAELens does not have (GroupMax, TanhReLU, registered ones) get an architecture of their own
name, so that other readers refuse them instead of reading them wrongly. Their fields stand in `metadata.unweave`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unweave._errors import UnweaveError, nearest
from unweave._files import atomic_path, write_json, write_tensors
from unweave.sae import temporal_files
from unweave.sae.activation import ACTIVATIONS, Activation, describe
from unweave.sae.activation_fns import AbsTopK, BatchTopK, Gated, TopK
from unweave.sae.coder_files import KEYS, build, coder_config, from_file, name_of, split_name, to_file
from unweave.sae.normalization import PER_TOKEN
from unweave.sae.pursuit import MatchingPursuit, Pursuit
from unweave.sae.sae import SAE
from unweave.sae.temporal import TemporalSAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ARCHITECTURES = {
    "standard": "relu", "topk": "topk", "abstopk": "abstopk", "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk", "jumprelu": "jumprelu", "gated": "gated",
    "matching_pursuit": "matching_pursuit",
}  # fmt: skip
"""SAELens' architectures, and our name of the activation function."""
_FIELDS = {
    "k": "k", "jumprelu_init_threshold": "init_threshold", "jumprelu_bandwidth": "bandwidth",
    "jumprelu_ste_to_input": "ste_to_input", "max_iterations": "k", "residual_threshold": "residual_threshold",
    "stop_on_duplicate_support": "stop_at_repeat",
}  # fmt: skip
"""SAELens' keys, and our fields of the activation function."""
_PURSUIT_KEYS = ("max_iterations", "residual_threshold", "stop_on_duplicate_support")
_FORMAT = 1
_TRAINING_KEYS = {
    "decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "use_sparse_activations",
    "aux_loss_coefficient", "topk_threshold_lr", "jumprelu_init_threshold", "jumprelu_bandwidth",
    "jumprelu_sparsity_loss_mode", "l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient",
    "jumprelu_tanh_scale", "jumprelu_ste_to_input", "target_l0",
}  # fmt: skip
_KNOWN_KEYS = _TRAINING_KEYS | set(temporal_files.KEYS) | {
    "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "reshape_activations",
    "architecture", "metadata", "k", "rescale_acts_by_decoder_norm", "matryoshka_widths", "use_matryoshka_aux_loss",
} | set(KEYS) | set(_PURSUIT_KEYS)  # fmt: skip


def _architecture(sae: SAE) -> str:
    """SAELens' name of the architecture that was trained."""
    if isinstance(sae.activation, BatchTopK) and "matryoshka_widths" in sae.metadata:
        return "matryoshka_batchtopk"
    return "standard" if sae.activation.name == "relu" else sae.activation.name


def _common_config(sae: SAE, architecture: str) -> dict[str, Any]:
    return {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": sae.per_token or "none",
        # SAELens then takes hook_z as TransformerLens gives it, with the heads in an axis of their own.
        "reshape_activations": "hook_z" if str(sae.metadata.get("hook_name")).endswith("hook_z") else "none",
    }


def _weights(sae: SAE) -> dict[str, Tensor]:
    stored = {name: tensor.cpu() for name, tensor in sae.state_dict().items() if name != "threshold"}
    weights = {name: tensor.contiguous() for name, tensor in to_file(sae, stored).items()}
    if isinstance(sae.activation, Gated):
        weights["b_gate"] = weights.pop("b_enc")
    if sae.tied and not isinstance(sae.activation, Pursuit):
        weights["W_enc"] = sae.W_enc.detach().cpu().contiguous()  # what other readers expect
    return weights


def _pursuit_config(sae: SAE) -> dict[str, Any]:
    """SAELens' keys of a pursuit; it neither subtracts nor adds `b_dec` unless it does both."""
    if isinstance(sae.activation, Pursuit) and not sae.apply_b_dec_to_input and sae.b_dec.any():
        raise UnweaveError("a pursuit whose b_dec is added but not subtracted has no form in SAELens' layout.")
    if not isinstance(sae.activation, MatchingPursuit):
        return {}
    return {key: getattr(sae.activation, _FIELDS[key]) for key in _PURSUIT_KEYS}


def _threshold(sae: SAE) -> Tensor:
    """The threshold of every latent, as SAELens keeps it."""
    assert sae.threshold is not None
    return sae.threshold.detach().float().cpu().clamp(min=0).expand(sae.d_sae).contiguous()


def _metadata(sae: SAE, *, all_fields: bool) -> dict[str, Any]:
    """What a file says beside SAELens' keys: where the SAE is from and, if those do not, what its activation is."""
    metadata = _lens_version() | {"training_architecture": name_of(sae, _architecture(sae))} | sae.metadata
    metadata.pop("unweave", None)
    if all_fields or sae.activation.name not in _ARCHITECTURES.values():
        metadata["unweave"] = {"format": _FORMAT, "activation": describe(sae.activation), "tied": sae.tied}
    return metadata


def _write(sae: SAE, folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder = Path(folder)
    config = config | coder_config(sae) | {"architecture": name_of(sae, config["architecture"])}
    with atomic_path(folder / WEIGHTS) as path:
        write_tensors(path, tensors)
    write_json(folder / CONFIG, config)
    return folder


def save(sae: SAE, folder: str | Path) -> Path:
    """Write the inference form to `folder` (made if missing) and return the folder.

    Raises:
        UnweaveError: If a BatchTopK SAE has no threshold yet.
    """
    if isinstance(sae, TemporalSAE):
        return _save_temporal(sae, folder)
    activation, tensors = sae.activation, _weights(sae)
    config = _common_config(sae, _architecture(sae)) | _pursuit_config(sae)
    if isinstance(activation, TopK | AbsTopK):
        config |= {"k": activation.k, "rescale_acts_by_decoder_norm": False}
    if sae.threshold is not None:
        if sae.threshold.isnan().any():
            raise UnweaveError(
                f"this {type(activation).__name__} SAE has no threshold yet, so its inference form cannot be saved."
            )
        if isinstance(activation, BatchTopK):
            config["architecture"] = "jumprelu"
        tensors["threshold"] = _threshold(sae)
    return _write(sae, folder, config | {"metadata": _metadata(sae, all_fields=False)}, tensors)


def _save_temporal(sae: TemporalSAE, folder: str | Path) -> Path:
    config = _common_config(sae, "temporal") | temporal_files.config_of(sae)
    metadata = _lens_version() | {"training_architecture": "temporal"} | sae.metadata
    return _write(sae, folder, config | {"metadata": metadata}, temporal_files.tensors_of(sae))


def save_training_form(sae: SAE, folder: str | Path, training_config: dict[str, Any]) -> Path:
    """Write the form that training can go on from, in SAELens' training layout.

    Args:
        sae: The SAE.
        folder: Made if missing.
        training_config: SAELens' training keys for this architecture (`l1_coefficient`, `aux_loss_coefficient`, ...).
    """
    if isinstance(sae, TemporalSAE):
        return _save_temporal(sae, folder)
    tensors, config = _weights(sae), _common_config(sae, _architecture(sae)) | _pursuit_config(sae)
    if isinstance(sae.activation, TopK | AbsTopK | BatchTopK):
        config |= {"k": sae.activation.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(sae.activation, BatchTopK):
        assert sae.threshold is not None
        tensors["topk_threshold"] = sae.threshold.detach().double().cpu()
        if "matryoshka_widths" in sae.metadata:
            config |= {"matryoshka_widths": sae.metadata["matryoshka_widths"], "use_matryoshka_aux_loss": False}
    elif sae.threshold is not None:
        tensors["threshold"] = _threshold(sae)
    metadata = _metadata(sae, all_fields=True)
    metadata.pop("training_architecture")  # of inference forms
    return _write(sae, folder, config | training_config | {"metadata": metadata}, tensors)


def _lens_version() -> dict[str, str]:
    # SAELens takes a file without a version of 6 or later for its old layout.
    return {"sae_lens_version": "6.54.12", "sae_lens_training_version": "unweave"}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = nearest(folder.name, siblings) if not folder.is_dir() else "."
        raise UnweaveError(f"there is no SAE in {str(folder)!r}: {CONFIG} is missing{hint or '.'}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnweaveError(f"{str(path)!r} is not valid JSON: {error}.") from error
    missing = [k for k in ("architecture", "d_in", "d_sae", "apply_b_dec_to_input") if k not in config]
    if missing:
        raise UnweaveError(f"{str(path)!r} lacks the key {missing[0]!r}.")
    scalings = ("none", temporal_files.SCALED) if config["architecture"] == "temporal" else ("none", *PER_TOKEN)
    for key, supported in (("normalize_activations", scalings), ("reshape_activations", ("none", "hook_z"))):
        if config.get(key) not in (*supported, None):
            raise UnweaveError(f"{str(path)!r} asks for {key}={config[key]!r}, which this SAE class does not apply.")
    return config


def _activation(config: dict[str, Any], path: Path) -> Activation:
    """The activation function: what our metadata says of this architecture, and SAELens' keys on top."""
    architecture = config["architecture"]
    own = ((config.get("metadata") or {}).get("unweave") or {}).get("activation") or {}
    kind = _ARCHITECTURES.get(architecture) or (architecture if own.get("type") == architecture else None)
    if kind not in ACTIVATIONS:
        known = ", ".join(dict.fromkeys([*_ARCHITECTURES, *ACTIVATIONS]))
        raise UnweaveError(f"{str(path)!r} has the architecture {architecture!r}, which is none of {known}.")
    cls = ACTIVATIONS[kind]
    fields = {f.name for f in dataclasses.fields(cls)}
    values = {name: value for name, value in own.items() if name != "type"} if own.get("type") == kind else {}
    values |= {field: config[key] for key, field in _FIELDS.items() if key in config and field in fields}
    if config.get("max_iterations", 0) is None:
        values["k"] = config["d_in"]  # what SAELens means by it
    if strange := sorted(values.keys() - fields):
        raise UnweaveError(f"{str(path)!r} has {strange[0]!r}, which {cls.__name__} does not know.")
    if "k" in fields and "k" not in values:
        raise UnweaveError(f"{str(path)!r} is a {architecture} SAE without k.")
    made = cls(**values)
    assert isinstance(made, Activation)
    return made


def load(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> SAE:
    """Read an SAE (inference or training form) from a folder in SAELens' layout.

    Args:
        folder: Folder with `cfg.json` and `sae_weights.safetensors`.
        device: Where to put the weights.
        dtype: Cast the weights to this; by default they keep the file's. Thresholds are always float32.

    Raises:
        UnweaveError: If a file is missing, damaged, of an unknown architecture, or its shapes contradict its config.
    """
    folder = Path(folder)
    config, path = _read_config(folder), folder / WEIGHTS
    if not path.is_file():
        raise UnweaveError(f"there is no SAE in {str(folder)!r}: {WEIGHTS} is missing.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UnweaveError(f"{str(path)!r} is damaged: {error}.") from error

    named = config["architecture"]
    config["architecture"], kind = split_name(named)
    unknown = {k: v for k, v in config.items() if k not in _KNOWN_KEYS}
    metadata = dict(config.get("metadata") or {}) | ({"unknown_keys": unknown} if unknown else {})
    if "matryoshka_widths" in config:
        metadata["matryoshka_widths"] = config["matryoshka_widths"]
    if named == "temporal":
        sae: SAE = temporal_files.sae_for(config, tensors, metadata, str(folder / CONFIG))
    else:
        activation, tied = _activation(config, folder / CONFIG), _is_tied(config, tensors)
        sae = build(kind, config, activation, folder / CONFIG, tied=tied, metadata=metadata)
    if "topk_threshold" in tensors:
        tensors["threshold"] = tensors.pop("topk_threshold").float()
    if "log_threshold" in tensors:  # some older JumpReLU checkpoints
        tensors["threshold"] = tensors.pop("log_threshold").float().exp()
    if "threshold" in tensors and sae.threshold is not None and sae.threshold.ndim == 0:
        tensors["threshold"] = _common(tensors["threshold"], path)
    if config.get("normalize_activations") in PER_TOKEN:
        sae.per_token = config["normalize_activations"]
    expected, tensors = sae.state_dict(), from_file(sae, tensors, path)
    if isinstance(sae.activation, Gated):
        expected["b_gate"] = expected.pop("b_enc")
    for name, tensor in expected.items():
        if name not in tensors:
            raise UnweaveError(f"{str(path)!r} lacks the tensor {name!r}.")
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, and its config says {tuple(tensor.shape)}"
            raise UnweaveError(f"{name} in {str(path)!r} has the shape {shapes}.")
        if not tensors[name].isfinite().all() and name != "threshold":
            raise UnweaveError(f"{name} in {str(path)!r} holds values that are not finite.")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise UnweaveError(f"{str(path)!r} holds the tensor {extra[0]!r}, which a {named} SAE has not.")

    stored = _DTYPES[str(tensors["W_dec"].dtype).removeprefix("torch.")]
    sae = sae.to(dtype or stored)
    if sae.threshold is not None:
        sae.threshold.data = sae.threshold.data.float()
    if isinstance(sae.activation, Gated):
        tensors["b_enc"] = tensors.pop("b_gate")
    sae.load_state_dict(tensors)
    if sae.threshold is not None:
        sae.threshold.data.clamp_(min=0)  # codes are positive; below 0 training would differ from inference
    if isinstance(sae.activation, Pursuit) and not sae.apply_b_dec_to_input:
        sae.b_dec.data.zero_()  # SAELens leaves it out of both
    if config.get("rescale_acts_by_decoder_norm") and config["architecture"].endswith("topk"):
        _fold_ranking_norms(sae)
    return sae.to(device).requires_grad_(False)


def _is_tied(config: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
    """Whether the training form of a tied SAE was read, with nothing changed; its encoder is then left out."""
    own = (config.get("metadata") or {}).get("unweave") or {}
    encoder, decoder = tensors.get("W_enc"), tensors.get("W_dec")
    if not own.get("tied") or encoder is None or decoder is None or not torch.equal(encoder, decoder.T):
        return False
    del tensors["W_enc"]
    return True


def _common(threshold: Tensor, path: Path) -> Tensor:
    """The one threshold of latents that share it."""
    if threshold.numel() == 0 or (threshold != threshold.flatten()[0]).any():
        raise UnweaveError(f"the thresholds in {str(path)!r} differ, and its config says that latents share one.")
    return threshold.flatten()[0]


@torch.no_grad()
def _fold_ranking_norms(sae: SAE) -> None:
    """SAELens may rank by `pre * norm` and divide again in decode: on unit rows that is the plain form."""
    norms = sae.W_dec.norm(dim=1).clamp(min=1e-8)
    sae.W_dec.div_(norms[:, None])
    sae.W_enc.mul_(norms)
    sae.b_enc.mul_(norms)
