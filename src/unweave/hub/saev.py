"""saev (Stevens et al.): one line of JSON, then a PyTorch file.

Until 2025-07-31 the decoder's bias was subtracted from the input, and inputs were centred and scaled by numbers that
are in no file; the header's schema tells. saev's own loader of today ignores both.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from unweave._errors import UnweaveError
from unweave._files import atomic_path
from unweave.hub.layout import plain, take, value_of
from unweave.hub.source import Source
from unweave.hub.torch_files import read_torch
from unweave.hub.writing import only_plain, save_torch, weights_of, with_pre_bias
from unweave.sae import SAE, Activation, BatchTopK, Normalization, RawTopK, ReLU, fold_normalization
from unweave.sae.draft import Draft

FILES = ("*.pt", "*.bin")
LAYOUT = {"W_enc": "W_enc d M", "b_enc": "b_enc M", "W_dec": "W_dec M d", "b_dec": "b_dec d"}
SCHEMA = 5
_LONGEST_HEADER = 1 << 16


def matches(source: Source) -> bool:
    return any(_header(source.inside(name))[0] is not None for name in source.find(*FILES)[:1])


def read(source: Source) -> Draft:
    path = source.inside(source.one(*FILES))
    header, start = _header(path)
    if header is None:
        raise UnweaveError(f"{source} does not begin with a line of JSON, as saev's files do.")
    schema = int(header.get("schema", 0))
    if not 0 <= schema <= SCHEMA:
        raise UnweaveError(f"{source} has the schema {schema} of saev; known are those up to {SCHEMA}.")
    config = header if schema == 0 else header["cfg"]
    width = config.get("d_model", config.get("d_vit"))
    latents = config.get("d_sae") or (width * config["exp_factor"] if width and "exp_factor" in config else None)
    tensors = source.only_tensors(read_torch(path, start), path.name)
    threshold = tensors.pop("activation.threshold", None)
    weights = take(tensors, LAYOUT, source, expected={"d": width, "M": latents})
    activation = _activation(header, config, source)
    if isinstance(activation, BatchTopK):  # without a threshold only whole batches have codes
        found = float("nan") if threshold is None else value_of(threshold, "activation.threshold", source)
        weights["threshold"] = torch.tensor(found)
    if schema == 2 or (schema == 1 and "activation" in config):
        warnings.warn(
            f"{source} is of about 31 July 2025, when saev stopped to subtract the decoder's bias from the input: its "
            f"schema, {schema}, says that {'it was still subtracted' if schema == 1 else 'it is not'}, and builds of "
            "that day may have done otherwise, so compare the reconstruction with what is published.",
            stacklevel=2,
        )
    old = schema < 2
    normalization = _normalization(source, weights["W_enc"].shape[0]) if old else None
    folds = [] if normalization is None else [lambda sae: fold_normalization(sae, normalization)]
    return plain(weights, activation, source, metadata={"saev": header}, pre_bias=old, folds=folds)


def _header(path: Path) -> tuple[dict[str, Any] | None, int]:
    """The first line, and where the rest begins; None if the file does not begin with JSON."""
    with path.open("rb") as file:
        line = file.readline(_LONGEST_HEADER)
        if not line.startswith(b"{") or not line.endswith(b"\n"):
            return None, 0
        try:
            header = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            return None, 0
        return header, file.tell()


def _activation(header: dict[str, Any], config: dict[str, Any], source: Source) -> Activation:
    found = config.get("activation", header.get("cls", "Relu"))
    name, params = found, config
    if isinstance(found, dict):
        name, params = found.get("cls", found.get("key")), found.get("params", found)
    match str(name).lower():
        case "relu":
            return ReLU()
        case "topk":
            return RawTopK(int(params["top_k"]))
        case "batchtopk":
            return BatchTopK(float(params["top_k"]))
    raise UnweaveError(f"{source} has the activation {name!r}, which is none of Relu, TopK, BatchTopK.")


def _normalization(source: Source, width: int) -> Normalization | None:
    """What old files were trained on, which the caller knows."""
    mean, scale = source.hints.get("mean"), source.hints.get("scale")
    if source.hints.get("normalized"):
        return None
    if mean is None or scale is None:
        raise UnweaveError(
            f"{source} is of before August 2025, when saev centred and scaled its inputs by numbers that are in no "
            "file: pass mean= and scale= (x becomes (x - mean) / scale), or normalized=True if your activations are "
            "centred and scaled already."
        )
    centre = torch.as_tensor(mean, dtype=torch.float32)
    if centre.shape != (width,):
        raise UnweaveError(f"mean has the shape {tuple(centre.shape)}, and {source} takes ({width},).")
    return Normalization("center", 1 / float(scale), centre)


def write(sae: SAE, folder: Path) -> None:
    only_plain(sae, "saev")
    activations = {ReLU: "Relu", RawTopK: "TopK", BatchTopK: "BatchTopK"}
    if type(sae.activation) not in activations:
        raise UnweaveError(
            "saev has Relu, BatchTopK and a TopK that keeps negative codes (RawTopK), not "
            f"{type(sae.activation).__name__}."
        )
    weights = with_pre_bias(sae, weights_of(sae), wanted=False)
    tensors = {name: weights[name] for name in LAYOUT}
    params: dict[str, Any] = {}
    if not isinstance(sae.activation, ReLU):
        params["top_k"] = sae.activation.k  # type: ignore[attr-defined]
    if isinstance(sae.activation, BatchTopK):
        if sae.activation.k % 1:
            raise UnweaveError(f"saev has whole k only, and this SAE has k={sae.activation.k}.")
        if sae.threshold is None or sae.threshold.isnan():
            raise UnweaveError("this BatchTopK SAE has no threshold yet, which inference compares with: calibrate it.")
        params["top_k"], tensors["activation.threshold"] = int(sae.activation.k), sae.threshold.detach().cpu()
    config = {
        "d_model": sae.d_in, "d_sae": sae.d_sae,
        "activation": {"cls": activations[type(sae.activation)], "params": params},
    }  # fmt: skip
    header = {"schema": SCHEMA, "cfg": config, "cls": "SparseAutoencoderConfig", "commit": "", "lib": "unweave"}
    with atomic_path(folder / "sae.pt") as path:
        save_torch(tensors, path)
        saved = path.read_bytes()
        path.write_bytes(json.dumps(header).encode() + b"\n" + saved)
