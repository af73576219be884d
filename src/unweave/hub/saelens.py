"""SAELens 6: our own files' layout, which `unweave.sae` reads and writes; here is what a run leaves beside it.

A checkpoint before a run's end takes activations that are scaled or whitened, by numbers in files of their own.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from unweave._errors import UnweaveError
from unweave.hub.source import Source
from unweave.sae import SAE, Normalization, fold_input_scale, fold_normalization
from unweave.sae.draft import Draft
from unweave.sae.files import KNOWN_KEYS
from unweave.sae.reading import draft, read_config, read_weights

SCALED, WHITENED = "expected_average_only_in", "covariance_whitening"
SCALE = "norm_scaling_factor"
FILES = (None, "cfg.json", "sae_weights.safetensors")  # the folder, or a file of it


def matches(source: Source) -> bool:
    return source.file in FILES and source.has("cfg.json") and not source.has("sae.safetensors")


def read(source: Source) -> Draft:
    config = read_config(source.folder) | {k: v for k, v in source.overrides.items() if k in KNOWN_KEYS}
    kind = config.get("normalize_activations")
    if kind not in (SCALED, WHITENED):
        return draft(config, weights_of(source), source.folder)
    made = draft(config | {"normalize_activations": "none"}, weights_of(source), source.folder)
    scale = _scale(source, default=None if kind == SCALED else 1.0)
    if kind == SCALED:
        made.folds = [*made.folds, lambda sae: fold_input_scale(sae, scale)]
        return made
    whitening = source.tensors("activation_whitening.safetensors")
    mean, matrix, inverse = (whitening[name].double() for name in ("mean", "matrix", "inverse_matrix"))
    # (s x - mean) @ matrix = s (x - mean / s) @ matrix
    normalization = Normalization("whiten", scale, mean / scale, matrix, inverse)
    made.folds = [*made.folds, lambda sae: fold_normalization(sae, normalization)]
    return made


def weights_of(source: Source) -> dict[str, Tensor]:
    return source.shapes(read_weights(source.folder))


def _scale(source: Source, default: float | None = None) -> float:
    """The factor that inputs were multiplied by in training."""
    if SCALE in source.hints:
        return float(source.hints[SCALE])
    if source.has("activation_scaler.json"):
        scale = source.json("activation_scaler.json").get("scaling_factor")
        if scale is not None:
            return float(scale)
    if default is not None:
        return default
    raise UnweaveError(
        f"{source} was trained on scaled activations ({SCALED}), and its files do not say by which factor: pass "
        f"{SCALE}=, or 1 if it is folded into the weights already."
    )


def write(sae: SAE, folder: Path) -> None:
    sae.save(folder)
