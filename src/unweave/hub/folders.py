"""What a folder holds that can be shared: SAEs, those of a run, a synthetic model, cached activations, tokens."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from unweave._errors import UnweaveError
from unweave._files import write_tensors
from unweave.hub import card
from unweave.hub.card import Entry, join
from unweave.sae.files import CONFIG, WEIGHTS

EVALUATION, PAGE, SPARSITY = "eval.json", "features.html", "sparsity.safetensors"
_SYNTHETIC = "synthetic_model_config.json"


@dataclass
class Upload:
    """What a folder holds that can be pushed.

    Attributes:
        kind: What it is.
        files: Files here, by their name in the repository.
        saes: Of SAEs, what the page says of each.
        usage: Of anything else, code that loads it.
        facts: Of anything else, what the page says.
    """

    kind: Literal["saes", "synthetic model", "activations", "tokens"]
    files: dict[str, Path] = field(default_factory=dict)
    saes: list[Entry] = field(default_factory=list)
    usage: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def repo_type(self) -> Literal["model", "dataset"]:
        return "model" if self.kind in ("saes", "synthetic model") else "dataset"


@contextmanager
def gathered(folder: Path, subfolder: str | None, repo_id: str) -> Iterator[Upload]:
    """What there is to push; files that are made for it live as long as this."""
    if not folder.is_dir():
        raise UnweaveError(f"there is no folder {str(folder)!r} to push.")
    with tempfile.TemporaryDirectory() as made:
        if (folder / _SYNTHETIC).is_file():
            yield _synthetic(folder, subfolder or "", repo_id)
        elif (kind := _data_kind(folder)) is not None:
            yield _data(folder, subfolder or "", kind, repo_id)
        else:
            yield _saes(folder, subfolder, Path(made))


def _saes(folder: Path, subfolder: str | None, scratch: Path) -> Upload:
    upload = Upload("saes")
    found = sorted(
        p.parent for p in folder.rglob(CONFIG)
        if (p.parent / WEIGHTS).is_file() and not {"training", "checkpoints"} & set(p.relative_to(folder).parts)
    )  # fmt: skip
    if not found:
        raise UnweaveError(
            f"{str(folder)!r} holds nothing that can be pushed: no SAE ({CONFIG} and {WEIGHTS}), no synthetic model "
            f"({_SYNTHETIC}) and no cached activations or tokens."
        )
    for i, place in enumerate(found):
        config = read_json(place / CONFIG)
        if len(found) == 1:
            path = _default_name(config, place) if subfolder is None else subfolder
        else:
            parts = place.relative_to(folder).parts
            below = PurePosixPath(*parts[1:] if parts[0] == "saes" else parts)
            path = str(PurePosixPath(subfolder or "", below))
        files = {name: place / name for name in (CONFIG, WEIGHTS, SPARSITY, EVALUATION, PAGE)}
        files |= {p.name: p for p in place.glob("eval_*.json")}
        if place.name == "sae":  # of a run, whose reports lie beside the one SAE that it has
            beside = {name: place.parent / name for name in (EVALUATION, PAGE)}
            files |= {name: p for name, p in beside.items() if p.is_file() and not files[name].is_file()}
        files = {name: p for name, p in files.items() if p.is_file()}
        evaluation = read_json(files[EVALUATION]) if EVALUATION in files else None
        if evaluation is not None and SPARSITY not in files:
            files[SPARSITY] = _sparsity(evaluation, scratch / f"{i}.safetensors")
        upload.files |= {join(path, name): p for name, p in files.items()}
        results = card.results_of(evaluation) if evaluation is not None else []
        upload.saes.append(Entry(path, config, results, PAGE in files))
    return upload


def _default_name(config: Mapping[str, Any], place: Path) -> str:
    metadata = config.get("metadata") or {}
    name = metadata.get("hook_name") or metadata.get("hf_hook_name") or place.name
    return re.sub(r"[^\w.-]", "_", str(name))


def _sparsity(evaluation: Mapping[str, Any], path: Path) -> Path:
    """SAELens' file of frequencies: log10 of the share of tokens that each latent fired on."""
    import torch

    densities = [max(0.0, latent["feature_density"]) for latent in evaluation["eval_result_details"]]
    write_tensors(path, {"sparsity": torch.tensor([math.log10(d + 1e-10) for d in densities])})
    return path


def _synthetic(folder: Path, subfolder: str, repo_id: str) -> Upload:
    from unweave.synthetic.files import MODEL_FILES

    config = read_json(folder / _SYNTHETIC)
    where = f'"{repo_id}"' + (f', "{subfolder}"' if subfolder else "")
    return Upload(
        "synthetic model",
        {join(subfolder, name): folder / name for name in MODEL_FILES if (folder / name).is_file()},
        usage=f"from unweave.synthetic import SyntheticModel\n\nmodel = SyntheticModel.from_pretrained({where})",
        facts={key: config.get(key) for key in ("num_features", "hidden_dim", "seed")},
    )


def _data_kind(folder: Path) -> Literal["activations", "tokens"] | None:
    """Whether a folder holds cached activations (ours, or a saved data set as SAELens') or tokens."""
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return "activations"
    if not (folder / "manifest.json").is_file():
        return None
    kinds: dict[str, Literal["activations", "tokens"]] = {"unweave-cache": "activations", "unweave-tokens": "tokens"}
    manifest = read_json(folder / "manifest.json")
    kind = kinds.get(str(manifest.get("format")))
    if kind is not None and not manifest.get("complete"):
        raise UnweaveError(f"{str(folder)!r} is not finished, so it cannot be pushed: finish it first.")
    return kind


def _data(folder: Path, subfolder: str, kind: Literal["activations", "tokens"], repo_id: str) -> Upload:
    if (folder / ".tmp_shards").is_dir():
        raise UnweaveError(f"{str(folder)!r} is not finished (it has .tmp_shards), so it cannot be pushed.")
    files = {
        join(subfolder, p.relative_to(folder).as_posix()): p for p in sorted(folder.rglob("*"))
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    }  # fmt: skip
    below = f', "{subfolder}"' if subfolder else ""
    usage = f'from unweave.hub import pull\n\nfolder = pull("{repo_id}"{below}, kind="dataset")'
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    facts = {key: value for key, value in manifest.items() if isinstance(value, str | int | float)}
    return Upload(kind, files, usage=usage, facts=facts | {"files": len(files)})


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text_of(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnweaveError(f"{str(path)!r} is damaged: {error}.") from error
    if not isinstance(value, dict):
        raise UnweaveError(f"{str(path)!r} is damaged: it holds no object.")
    return value
