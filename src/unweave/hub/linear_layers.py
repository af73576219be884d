"""SAEs that are two linear layers and nothing else: Goodfire's, qresearch's for DeepSeek-R1, and those of e2e_sae.

ReLU, no pre-encoder bias, no config beside the file that says anything about the SAE.
"""

from __future__ import annotations

import re

import torch

from unweave._errors import UnweaveError
from unweave.hub.layout import plain, take
from unweave.hub.source import Source
from unweave.sae import SAE, ReLU
from unweave.sae.draft import Draft

FILES = ("*.pt", "*.pth")
GOODFIRE = {
    "W_enc": "encoder_linear.weight M d", "b_enc": "encoder_linear.bias M", "W_dec": "decoder_linear.weight d M",
    "b_dec": "decoder_linear.bias d",
}  # fmt: skip
DEEPSEEK_R1 = {ours: entry.replace("_linear", "") for ours, entry in GOODFIRE.items()}
E2E = {"W_enc": "encoder.0.weight M d", "b_enc": "encoder.0.bias M", "W_dec": "decoder.weight d M"}


def _has(source: Source, layout: dict[str, str]) -> bool:
    names = {entry.split()[0] for entry in layout.values()}
    return any(names == set(source.keys(name)) for name in source.find(*FILES)[:1])


def matches_goodfire(source: Source) -> bool:
    return _has(source, GOODFIRE)


def matches_deepseek_r1(source: Source) -> bool:
    return _has(source, DEEPSEEK_R1)


def read_goodfire(source: Source) -> Draft:
    return _read(source, GOODFIRE)


def read_deepseek_r1(source: Source) -> Draft:
    return _read(source, DEEPSEEK_R1)


def _read(source: Source, layout: dict[str, str]) -> Draft:
    name = source.one(*FILES)
    weights = take(source.tensors(name), layout, source)
    found = re.search(r"^(?:.*/)?(.*?)(?:-SAE)?-l(\d+)\.", name)
    metadata = {"hf_hook_name": f"model.layers.{found[2]}", "file_name": found[1]} if found else {}
    return plain(weights, ReLU(), source, metadata=metadata)


def matches_e2e(source: Source) -> bool:
    return source.has("final_config.yaml") and bool(source.find(*FILES))


def read_e2e(source: Source) -> Draft:
    """One position of a file, which has an SAE at each; the rows of the decoder have unit norm in every forward."""
    tensors = source.tensors(source.one(*FILES))
    positions = sorted({name.removesuffix(".decoder.weight") for name in tensors if name.endswith(".decoder.weight")})
    wanted = str(source.hints.get("position", positions[0] if len(positions) == 1 else "")).replace(".", "-")
    by_name = {position.removeprefix("saes."): position for position in positions}
    if wanted not in by_name:
        known = ", ".join(by_name) or "no position"
        raise UnweaveError(f"{source} has SAEs at {known}: pass position= with one of these.")
    prefix = f"{by_name[wanted]}."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    layout = E2E | ({"b_dec": "decoder.bias d"} if "decoder.bias" in own else {})
    metadata = {"hook_name": wanted.replace("-", ".")}
    return plain(take(own, layout, source), ReLU(), source, metadata=metadata, folds=[_unit_rows])


def _unit_rows(sae: SAE) -> None:
    sae.W_dec.div_(torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True).clamp(min=1e-12))
