"""SAELens' layout, read: from `cfg.json` and tensors to an SAE or another coder, in its inference or training form.

Shapes are checked before anything is filled in, unknown keys are kept as metadata, and nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._mapped import map_tensors
from unweave.sae import temporal_files
from unweave.sae.activation import ACTIVATIONS, Activation
from unweave.sae.activation_fns import Gated
from unweave.sae.coder_files import build, split_name
from unweave.sae.draft import Draft, on_meta, rename_gate
from unweave.sae.files import ARCHITECTURES, CONFIG, FIELDS, KNOWN_KEYS, WEIGHTS
from unweave.sae.normalization import PER_TOKEN
from unweave.sae.sae import SAE

Config = dict[str, Any]


def read_config(folder: Path) -> Config:
    """The `cfg.json` of a folder, as it is.

    Raises:
        UnweaveError: If it is missing or no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UnweaveError(f"there is no SAE in {str(folder)!r}: {CONFIG} is missing.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnweaveError(f"{str(path)!r} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UnweaveError(f"{str(path)!r} is no JSON object.")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, mapped.

    Raises:
        UnweaveError: If the file is missing or damaged.
    """
    if not (folder / WEIGHTS).is_file():
        raise UnweaveError(f"there is no SAE in {str(folder)!r}: {WEIGHTS} is missing.")
    return map_tensors(folder / WEIGHTS)


def _check(config: Config, where: str) -> None:
    missing = [k for k in ("architecture", "d_in", "d_sae", "apply_b_dec_to_input") if k not in config]
    if missing:
        raise UnweaveError(f"{where} lacks the key {missing[0]!r}.")
    for key in ("d_in", "d_sae"):
        if not isinstance(config[key], int):
            raise UnweaveError(f"{where} has {key}={config[key]!r}, which is no whole number.")
    scalings = ("none", temporal_files.SCALED) if config["architecture"] == "temporal" else ("none", *PER_TOKEN)
    for key, supported in (("normalize_activations", scalings), ("reshape_activations", ("none", "hook_z"))):
        if config.get(key) not in (*supported, None):
            raise UnweaveError(f"{where} asks for {key}={config[key]!r}, which this SAE class does not apply.")


def _activation(config: Config, where: str) -> Activation:
    """The activation function: what our metadata says of this architecture, and SAELens' keys on top."""
    architecture = config["architecture"]
    own = ((config.get("metadata") or {}).get("unweave") or {}).get("activation") or {}
    kind = ARCHITECTURES.get(architecture) or (architecture if own.get("type") == architecture else None)
    if kind not in ACTIVATIONS:
        known = ", ".join(dict.fromkeys([*ARCHITECTURES, *ACTIVATIONS]))
        raise UnweaveError(f"{where} has the architecture {architecture!r}, which is none of {known}.")
    cls = ACTIVATIONS[kind]
    fields = {f.name for f in dataclasses.fields(cls)}
    values = {name: value for name, value in own.items() if name != "type"} if own.get("type") == kind else {}
    values |= {field: config[key] for key, field in FIELDS.items() if key in config and field in fields}
    if config.get("max_iterations", 0) is None:
        values["k"] = config["d_in"]  # what SAELens means by it
    if strange := sorted(values.keys() - fields):
        raise UnweaveError(f"{where} has {strange[0]!r}, which {cls.__name__} does not know.")
    if "k" in fields and "k" not in values:
        raise UnweaveError(f"{where} is a {architecture} SAE without k.")
    made = cls(**values)
    assert isinstance(made, Activation)
    return made


def draft(config: Config, tensors: dict[str, Tensor], folder: Path) -> Draft:
    """What SAELens' config and tensors say.

    Args:
        config: The keys of `cfg.json`, in the form of version 6.
        tensors: Those of `sae_weights.safetensors`; the draft takes them over.
        folder: Where they are from, for errors.

    Raises:
        UnweaveError: If the architecture is unknown, a key is missing, or config and tensors contradict each other.
    """
    where, file = repr(str(folder / CONFIG)), folder / WEIGHTS
    _check(config, where)
    named = config["architecture"]
    architecture, kind = split_name(named)
    glu, architecture = architecture.endswith("_glu"), architecture.removesuffix("_glu")
    config = config | {"architecture": architecture}
    unknown = {k: v for k, v in config.items() if k not in KNOWN_KEYS}
    metadata = dict(config.get("metadata") or {}) | ({"unknown_keys": unknown} if unknown else {})
    if "matryoshka_widths" in config:
        metadata["matryoshka_widths"] = config["matryoshka_widths"]
    if named == "temporal":
        sae: SAE = on_meta(lambda: temporal_files.sae_for(config, tensors, metadata, str(folder / CONFIG)))
    else:
        activation, tied = _activation(config, where), _is_tied(config, tensors)
        sae = on_meta(lambda: build(kind, config, activation, folder / CONFIG, tied=tied, glu=glu, metadata=metadata))
    if "topk_threshold" in tensors:
        tensors["threshold"] = tensors.pop("topk_threshold").float()
    if "log_threshold" in tensors:  # some older JumpReLU checkpoints
        tensors["threshold"] = tensors.pop("log_threshold").float().exp()
    if "threshold" in tensors and sae.threshold is not None and sae.threshold.ndim == 0:
        tensors["threshold"] = _common(tensors["threshold"], file)
    if config.get("normalize_activations") in PER_TOKEN:
        sae.per_token = config["normalize_activations"]
    if isinstance(sae.activation, Gated):
        rename_gate(tensors, repr(str(file)))
    ranks_by_norm = config.get("rescale_acts_by_decoder_norm") and architecture.endswith("topk")
    stored_names = {"b_enc": "b_gate"} if isinstance(sae.activation, Gated) else {}
    return Draft(
        sae, tensors, repr(str(file)), [fold_ranking_norms] if ranks_by_norm else [], stored_names, f"{named} SAE"
    )


def load(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> SAE:
    """Read an SAE (inference or training form) from a folder in SAELens' layout of version 6.

    Args:
        folder: Folder with `cfg.json` and `sae_weights.safetensors`.
        device: Where to put the weights.
        dtype: Cast the weights to this; by default they keep the file's. Thresholds are always float32.

    Raises:
        UnweaveError: If a file is missing, damaged, of an unknown architecture, or its shapes contradict its config.
    """
    folder = Path(folder)
    return draft(read_config(folder), read_weights(folder), folder).build(dtype=dtype, device=device)


def _is_tied(config: Config, tensors: dict[str, Tensor]) -> bool:
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
def fold_ranking_norms(sae: SAE) -> None:
    """Give decoder rows unit norm, in place, where latents are ranked by `pre * norm` and not by `pre`.

    SAELens may do so, and divide again in decode: on unit rows that is the plain form.
    """
    found = [torch.linalg.vector_norm(block, dim=1, dtype=torch.float32) for block in sae.decoders]
    norms = torch.cat(found).clamp(min=1e-8)
    for block, own in sae.with_decoders(norms):
        block.div_(own[:, None])
    sae.W_enc.mul_(norms)
    sae.b_enc.mul_(norms)
