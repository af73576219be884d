"""SAEs on disk, in SAELens' own layout, so that every tool that reads SAELens' files reads these.

A folder holds `cfg.json` and `sae_weights.safetensors`. `save` writes the inference form: BatchTopK becomes JumpReLU
with one common threshold. `save_training_form` keeps what training had: the k, and BatchTopK's scalar threshold. The
reader of both is `unweave.sae.reading`.

Activation functions that SAELens does not have (GroupMax, TanhReLU, registered ones) get an architecture of their own
name, so that other readers refuse them instead of reading them wrongly. Their fields stand in `metadata.unweave`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from unweave._errors import UnweaveError
from unweave._files import atomic_path, write_json, write_tensors
from unweave.sae import temporal_files
from unweave.sae.activation import describe
from unweave.sae.activation_fns import AbsTopK, BatchTopK, Gated, TopK
from unweave.sae.coder_files import KEYS, coder_config, name_of
from unweave.sae.pursuit import MatchingPursuit, Pursuit
from unweave.sae.sae import SAE
from unweave.sae.temporal import TemporalSAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = {
    "standard": "relu", "topk": "topk", "abstopk": "abstopk", "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk", "jumprelu": "jumprelu", "gated": "gated",
    "matching_pursuit": "matching_pursuit",
}  # fmt: skip
"""SAELens' architectures, and our name of the activation function."""
FIELDS = {
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
KNOWN_KEYS = _TRAINING_KEYS | set(temporal_files.KEYS) | {
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
    """What a file holds, as views of the SAE's own memory wherever it lies there."""
    weights = {name: tensor for name, tensor in sae.state_dict().items() if name != "threshold"}
    if isinstance(sae.activation, Gated):
        weights["b_gate"] = weights.pop("b_enc")
    if sae.tied and not isinstance(sae.activation, Pursuit):
        weights["W_enc"] = sae.W_enc.detach()  # what other readers expect
    return weights


def _pursuit_config(sae: SAE) -> dict[str, Any]:
    """SAELens' keys of a pursuit; it neither subtracts nor adds `b_dec` unless it does both."""
    if isinstance(sae.activation, Pursuit) and not sae.apply_b_dec_to_input and sae.b_dec.any():
        raise UnweaveError("a pursuit whose b_dec is added but not subtracted has no form in SAELens' layout.")
    if not isinstance(sae.activation, MatchingPursuit):
        return {}
    return {key: getattr(sae.activation, FIELDS[key]) for key in _PURSUIT_KEYS}


def _threshold(sae: SAE) -> Tensor:
    """The threshold of every latent, as SAELens keeps it."""
    assert sae.threshold is not None
    return sae.threshold.detach().float().cpu().clamp(min=0).expand(sae.d_sae).contiguous()


def _metadata(sae: SAE, *, all_fields: bool) -> dict[str, Any]:
    """What a file says beside SAELens' keys: where the SAE is from and, if those do not, what its activation is."""
    metadata = _lens_version() | {"training_architecture": name_of(sae, _architecture(sae))} | sae.metadata
    metadata.pop("unweave", None)
    if all_fields or sae.activation.name not in ARCHITECTURES.values():
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
