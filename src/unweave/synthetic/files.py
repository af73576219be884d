"""Synthetic models on disk, in SAELens' own layout, with what that leaves out.

    synthetic_model_config.json    the `SyntheticModelConfig`
    synthetic_model.safetensors    feature_vectors (K, d), bias (d,), firing_probabilities (K,) as they are drawn with,
                                   correlation_factor (K, r) and correlation_diag (K,) if there are any;
                                   ours: mean_firing_magnitudes (K,), std_firing_magnitudes (K,), correlation_matrix
                                   (K, K) if there is one, generator_seed (1,), the 64 bits of an unsigned number
    hierarchy.json                 the trees, if there are any

Files without our tensors are SAELens'. Their magnitudes are made from the config, by its seed where they are random.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unweave._errors import UnweaveError, nearest
from unweave._files import atomic_path, write_json, write_tensors
from unweave.synthetic.correlation import LowRankCorrelationMatrix
from unweave.synthetic.dictionary import FeatureDictionary
from unweave.synthetic.generator import ActivationGenerator, CorrelationMatrixInput
from unweave.synthetic.hierarchy import Hierarchy
from unweave.synthetic.magnitudes import generate_magnitudes
from unweave.synthetic.model_config import MAGNITUDE_SEEDS, STREAM_SEED, SyntheticModelConfig

if TYPE_CHECKING:
    from unweave.synthetic.model import SyntheticModel

SYNTHETIC_MODEL_CONFIG_FILENAME = "synthetic_model_config.json"
SYNTHETIC_MODEL_WEIGHTS_FILENAME = "synthetic_model.safetensors"
SYNTHETIC_MODEL_HIERARCHY_FILENAME = "hierarchy.json"
MODEL_FILES = (
    SYNTHETIC_MODEL_CONFIG_FILENAME, SYNTHETIC_MODEL_WEIGHTS_FILENAME, SYNTHETIC_MODEL_HIERARCHY_FILENAME,
)  # fmt: skip

_NEEDED = ("feature_vectors", "bias", "firing_probabilities")


class Parts(NamedTuple):
    """What a model is built from."""

    cfg: SyntheticModelConfig
    feature_dict: FeatureDictionary
    activation_generator: ActivationGenerator
    hierarchy: Hierarchy | None


def write_model(model: SyntheticModel, folder: str | Path) -> Path:
    """Write a model to a folder; see `SyntheticModel.save`."""
    generator, hierarchy = model.activation_generator, model.hierarchy
    modifiers = [] if hierarchy is None else [hierarchy.modifier]
    if list(map(id, generator.given_modifiers)) != list(map(id, modifiers)):
        wanted = "none, as it has no hierarchy" if hierarchy is None else "the modifier of its hierarchy alone"
        raise UnweaveError(
            f"this synthetic model cannot be saved, as no file can hold its modifiers: its activation_generator has "
            f"{len(generator.given_modifiers)} and should apply {wanted}."
        )
    tensors = {
        "feature_vectors": model.feature_dict.feature_vectors,
        "bias": model.feature_dict.bias,
        "firing_probabilities": generator.firing_probabilities,
        "mean_firing_magnitudes": generator.mean_firing_magnitudes,
        "std_firing_magnitudes": generator.std_firing_magnitudes,
        "correlation_matrix": generator.correlation_matrix,
        "correlation_factor": generator.correlation_factor,
        "correlation_diag": generator.correlation_diag,
        "generator_seed": torch.tensor([generator.seed - 2**64 * (generator.seed >= 2**63)]),
    }
    folder = Path(folder)
    with atomic_path(folder / SYNTHETIC_MODEL_WEIGHTS_FILENAME) as path:
        write_tensors(path, {k: t for k, t in tensors.items() if t is not None})
    if hierarchy is not None:
        write_json(folder / SYNTHETIC_MODEL_HIERARCHY_FILENAME, hierarchy.to_dict())
    else:  # a model that was here before may have had one
        (folder / SYNTHETIC_MODEL_HIERARCHY_FILENAME).unlink(missing_ok=True)
    cfg = dataclasses.replace(model.cfg, dtype=str(generator.dtype))  # it may have been cast
    write_json(folder / SYNTHETIC_MODEL_CONFIG_FILENAME, cfg.to_dict())
    return folder


def read_model(folder: str | Path) -> Parts:
    """The parts of a saved model, on the CPU; see `SyntheticModel.load_from_disk`."""
    folder = Path(folder)
    config_path, path = folder / SYNTHETIC_MODEL_CONFIG_FILENAME, folder / SYNTHETIC_MODEL_WEIGHTS_FILENAME
    if not config_path.is_file():
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = "." if folder.is_dir() else nearest(folder.name, siblings) or "."
        missing = SYNTHETIC_MODEL_CONFIG_FILENAME if folder.is_dir() else "the folder"
        raise UnweaveError(f"there is no synthetic model in {str(folder)!r}: {missing} is missing{hint}")
    try:
        cfg = SyntheticModelConfig.from_dict(_read_json(config_path))
    except UnweaveError as error:
        raise UnweaveError(f"{str(config_path)!r} cannot be used: {error}") from error
    if not path.is_file():
        raise UnweaveError(f"there is no synthetic model in {str(folder)!r}: {path.name} is missing.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UnweaveError(f"{str(path)!r} is damaged: {error}.") from error
    _check_tensors(tensors, cfg, path)

    hierarchy = None
    trees = folder / SYNTHETIC_MODEL_HIERARCHY_FILENAME
    if trees.is_file():
        try:
            hierarchy = Hierarchy.from_dict(_read_json(trees))
        except UnweaveError as error:
            raise UnweaveError(f"{str(trees)!r} cannot be used: {error}") from error
    elif cfg.hierarchy is not None:
        raise UnweaveError(f"the model in {str(folder)!r} has a hierarchy, and {trees.name} is missing.")

    seed = cfg.seed_of(STREAM_SEED)
    if "generator_seed" in tensors:
        seed = int(tensors["generator_seed"]) % 2**64
    try:
        generator = ActivationGenerator(
            cfg.num_features,
            tensors["firing_probabilities"],
            _magnitudes("std_firing_magnitudes", tensors, cfg),
            _magnitudes("mean_firing_magnitudes", tensors, cfg),
            None if hierarchy is None else hierarchy.modifier,
            _correlation(tensors),
            dtype=cfg.dtype,
            seed=seed,
        )
        features = FeatureDictionary.from_vectors(tensors["feature_vectors"], tensors["bias"])
    except UnweaveError as error:
        raise UnweaveError(f"{str(path)!r} cannot be used: {error}") from error
    return Parts(cfg, features, generator, hierarchy)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnweaveError(f"{str(path)!r} is damaged: {error}.") from error
    if not isinstance(value, dict):
        raise UnweaveError(f"{str(path)!r} is damaged: it holds a {type(value).__name__}, not an object.")
    return value


def _check_tensors(tensors: dict[str, Tensor], cfg: SyntheticModelConfig, path: Path) -> None:
    low_rank = ("correlation_factor", "correlation_diag")
    needed = [*_NEEDED]
    if "correlation_matrix" not in tensors and (cfg.correlation is not None or any(n in tensors for n in low_rank)):
        needed += low_rank
    for name in needed:
        if name not in tensors:
            raise UnweaveError(f"{str(path)!r} lacks the tensor {name!r}.")
    k, d = cfg.num_features, cfg.hidden_dim
    for name, shape in (("feature_vectors", (k, d)), ("bias", (d,)), ("firing_probabilities", (k,))):
        if tensors[name].shape != shape:
            found = tuple(tensors[name].shape)
            raise UnweaveError(f"{name} in {str(path)!r} has the shape {found}, and its config says {shape}.")


def _correlation(tensors: dict[str, Tensor]) -> CorrelationMatrixInput | None:
    if "correlation_matrix" in tensors:
        return tensors["correlation_matrix"]
    if "correlation_factor" in tensors:
        return LowRankCorrelationMatrix(tensors["correlation_factor"], tensors["correlation_diag"])
    return None


def _magnitudes(name: str, tensors: dict[str, Tensor], cfg: SyntheticModelConfig) -> Tensor:
    if name in tensors:
        return tensors[name]
    config, seed = getattr(cfg, name), cfg.seed_of(MAGNITUDE_SEEDS[name])
    magnitudes = generate_magnitudes(cfg.num_features, config, seed)
    if seed is None and not torch.equal(magnitudes, generate_magnitudes(cfg.num_features, config)):
        warnings.warn(
            f"this model was saved without its {name}, which are random and have no seed: others were drawn.",
            stacklevel=5,
        )
    return magnitudes
