"""SAEs on disk, in SAELens' own layout, so that every tool that reads SAELens' files reads these.

A folder holds `cfg.json` and `sae_weights.safetensors`. `save` writes the inference form: BatchTopK becomes JumpReLU
with one common threshold. `save_training_form` keeps what training had: the k, and BatchTopK's scalar threshold. `load`
reads both. Nothing is unpickled, shapes are checked before anything is built, and unknown keys are kept as metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unweave._errors import UnweaveError, nearest
from unweave._files import atomic_path, write_json, write_tensors
from unweave.sae.activation_fns import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.sae.sae import SAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ARCHITECTURES = ("standard", "topk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "gated")
_TRAINING_KEYS = {
    "decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "use_sparse_activations",
    "aux_loss_coefficient", "topk_threshold_lr", "jumprelu_init_threshold", "jumprelu_bandwidth",
    "jumprelu_sparsity_loss_mode", "l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient",
    "jumprelu_tanh_scale", "jumprelu_ste_to_input", "target_l0",
}  # fmt: skip
_KNOWN_KEYS = _TRAINING_KEYS | {
    "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "reshape_activations",
    "architecture", "metadata", "k", "rescale_acts_by_decoder_norm", "matryoshka_widths", "use_matryoshka_aux_loss",
}  # fmt: skip


def _architecture(sae: SAE) -> str:
    """SAELens' name of the architecture that was trained."""
    if isinstance(sae.activation, BatchTopK) and "matryoshka_widths" in sae.metadata:
        return "matryoshka_batchtopk"
    return "standard" if isinstance(sae.activation, ReLU) else sae.activation.name


def _common_config(sae: SAE, architecture: str) -> dict[str, Any]:
    return {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }


def _weights(sae: SAE) -> dict[str, Tensor]:
    names = {n: n for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if isinstance(sae.activation, Gated):
        names |= {"b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"}
    return {file: getattr(sae, ours).detach().cpu().contiguous() for ours, file in names.items()}


def _write(folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder = Path(folder)
    with atomic_path(folder / WEIGHTS) as path:
        write_tensors(path, tensors)
    write_json(folder / CONFIG, config)
    return folder


def save(sae: SAE, folder: str | Path) -> Path:
    """Write the inference form to `folder` (made if missing) and return the folder.

    Raises:
        UnweaveError: If a BatchTopK SAE has no threshold yet.
    """
    activation, tensors = sae.activation, _weights(sae)
    if isinstance(activation, ReLU | Gated):
        config = _common_config(sae, _architecture(sae))
    elif isinstance(activation, TopK):
        config = _common_config(sae, "topk") | {"k": activation.k, "rescale_acts_by_decoder_norm": False}
    else:
        config = _common_config(sae, "jumprelu")
        assert sae.threshold is not None
        if sae.threshold.isnan().any():
            raise UnweaveError("this BatchTopK SAE has no threshold yet, so its inference form cannot be saved.")
        tensors["threshold"] = sae.threshold.detach().float().cpu().clamp(min=0).expand(sae.d_sae).contiguous()
    metadata = _lens_version() | {"training_architecture": _architecture(sae)} | sae.metadata
    return _write(folder, config | {"metadata": metadata}, tensors)


def save_training_form(sae: SAE, folder: str | Path, training_config: dict[str, Any]) -> Path:
    """Write the form that training can go on from, in SAELens' training layout.

    Args:
        sae: The SAE.
        folder: Made if missing.
        training_config: SAELens' training keys for this architecture (`l1_coefficient`, `aux_loss_coefficient`, ...).
    """
    tensors, config = _weights(sae), _common_config(sae, _architecture(sae))
    if isinstance(sae.activation, TopK | BatchTopK):
        config |= {"k": sae.activation.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(sae.activation, BatchTopK):
        assert sae.threshold is not None
        tensors["topk_threshold"] = sae.threshold.detach().double().cpu()
        if "matryoshka_widths" in sae.metadata:
            config |= {"matryoshka_widths": sae.metadata["matryoshka_widths"], "use_matryoshka_aux_loss": False}
    elif isinstance(sae.activation, JumpReLU):
        assert sae.threshold is not None
        tensors["threshold"] = sae.threshold.detach().float().cpu().contiguous()
    return _write(folder, config | training_config | {"metadata": _lens_version() | sae.metadata}, tensors)


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
    if config["architecture"] not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UnweaveError(f"{str(path)!r} has the architecture {config['architecture']!r}, which is none of {known}.")
    for key, supported in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if config.get(key, supported) not in (supported, None):
            raise UnweaveError(f"{str(path)!r} asks for {key}={config[key]!r}, which this SAE class does not apply.")
    return config


def _activation(config: dict[str, Any], path: Path) -> Activation:
    architecture = config["architecture"]
    if architecture.endswith("topk"):
        if "k" not in config:
            raise UnweaveError(f"{str(path)!r} is a {architecture} SAE without k.")
        return (TopK if architecture == "topk" else BatchTopK)(config["k"])
    if architecture == "jumprelu":
        trained = {"init_threshold": "jumprelu_init_threshold", "bandwidth": "jumprelu_bandwidth"}
        return JumpReLU(**{name: config[key] for name, key in trained.items() if key in config})
    return Gated() if architecture == "gated" else ReLU()


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

    unknown = {k: v for k, v in config.items() if k not in _KNOWN_KEYS}
    metadata = dict(config.get("metadata") or {}) | ({"unknown_keys": unknown} if unknown else {})
    if "matryoshka_widths" in config:
        metadata["matryoshka_widths"] = config["matryoshka_widths"]
    sae = SAE(
        config["d_in"], config["d_sae"], _activation(config, folder / CONFIG),
        apply_b_dec_to_input=config["apply_b_dec_to_input"], metadata=metadata,
        generator=torch.Generator(),
    )  # fmt: skip
    if "topk_threshold" in tensors:
        tensors["threshold"] = tensors.pop("topk_threshold").float()
    expected = sae.state_dict()
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
    extra = sorted(tensors.keys() - expected.keys())
    if extra:
        raise UnweaveError(
            f"{str(path)!r} holds the tensor {extra[0]!r}, which a {config['architecture']} SAE has not."
        )

    stored = _DTYPES[str(tensors["W_dec"].dtype).removeprefix("torch.")]
    sae = sae.to(dtype or stored)
    if sae.threshold is not None:
        sae.threshold.data = sae.threshold.data.float()
    if isinstance(sae.activation, Gated):
        tensors["b_enc"] = tensors.pop("b_gate")
    sae.load_state_dict(tensors)
    if config.get("rescale_acts_by_decoder_norm") and config["architecture"].endswith("topk"):
        _fold_ranking_norms(sae)
    return sae.to(device).requires_grad_(False)


@torch.no_grad()
def _fold_ranking_norms(sae: SAE) -> None:
    """SAELens may rank by `pre * norm` and divide again in decode: on unit rows that is the plain form."""
    norms = sae.W_dec.norm(dim=1).clamp(min=1e-8)
    sae.W_dec.div_(norms[:, None])
    sae.W_enc.mul_(norms)
    sae.b_enc.mul_(norms)
