"""What files say about transcoders, crosscoders and cross-layer transcoders beyond what they say about SAEs.

The architecture is that of the SAE with the coder's kind behind it: `skip_transcoder`, `jumprelu_transcoder`,
`topk_crosscoder`. SAELens knows the transcoders of ReLU and JumpReLU; it refuses the other names, which are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from unweave._errors import UnweaveError
from unweave.sae.activation import Activation
from unweave.sae.clt import CrossLayerPart, CrossLayerTranscoder
from unweave.sae.coders import Crosscoder, Transcoder
from unweave.sae.sae import SAE

KINDS = ("skip_transcoder", "transcoder", "crosscoder", "skip_clt", "clt")
KEYS = ("d_out", "widths", "reads", "writes")
"""Keys that a coder's config has beside an SAE's."""


def kind_of(sae: SAE) -> str | None:
    """The kind of coder; None for an SAE."""
    if isinstance(sae, CrossLayerPart):
        raise UnweaveError("this is a part of a cross-layer transcoder and shares its weights: save the whole.")
    if isinstance(sae, CrossLayerTranscoder):
        return "clt" if sae.W_skip is None else "skip_clt"
    if isinstance(sae, Transcoder):
        return "transcoder" if sae.W_skip is None else "skip_transcoder"
    return "crosscoder" if isinstance(sae, Crosscoder) else None


def coder_config(sae: SAE) -> dict[str, Any]:
    """The further keys of a coder's config."""
    if isinstance(sae, Transcoder):
        return {"d_out": sae.d_out}
    if isinstance(sae, CrossLayerTranscoder):
        return {"reads": sae.reads, "writes": sae.writes}
    return {"widths": sae.widths} if isinstance(sae, Crosscoder) else {}


def name_of(sae: SAE, architecture: str) -> str:
    """The architecture in a file, from that of an SAE with the same activation function."""
    kind = kind_of(sae)
    if kind is None:
        return architecture
    return kind if architecture == "standard" else f"{architecture}_{kind}"


def split_name(architecture: str) -> tuple[str, str | None]:
    """The inverse: the architecture of an SAE with the same activation function, and the kind of coder, if any."""
    for kind in KINDS:
        if architecture == kind:
            return "standard", kind
        if architecture.endswith(f"_{kind}"):
            return architecture.removesuffix(f"_{kind}"), kind
    return architecture, None


def build(
    kind: str | None,
    config: dict[str, Any],
    activation: Activation,
    path: Path,
    *,
    tied: bool,
    metadata: dict[str, Any],
) -> SAE:
    """An SAE or a coder in the shape that a config says, whose weights are still to be filled in.

    Raises:
        UnweaveError: If a coder's config lacks a key, or asks for what coders do not do.
    """
    unused, d_in, d_sae = torch.Generator(), config["d_in"], config["d_sae"]
    pre_bias = config["apply_b_dec_to_input"]
    if kind is None:
        return SAE(
            d_in, d_sae, activation, apply_b_dec_to_input=pre_bias, tied=tied, metadata=metadata, generator=unused
        )
    if pre_bias:
        raise UnweaveError(f"{str(path)!r} asks for apply_b_dec_to_input, and a {kind} subtracts no decoder bias.")
    if (normalize := config.get("normalize_activations") or "none") != "none":
        raise UnweaveError(
            f"{str(path)!r} asks for normalize_activations={normalize!r}, which a {kind} does not apply."
        )
    layers = ("reads", "writes")
    for key in {"crosscoder": ("widths",), "clt": layers, "skip_clt": layers}.get(kind, ("d_out",)):
        if key not in config:
            raise UnweaveError(f"{str(path)!r} lacks the key {key!r}.")
    skip = kind.startswith("skip_")
    if kind in ("clt", "skip_clt"):
        reads, writes = config["reads"], config["writes"]
        if sum(reads.values()) != d_in or d_sae % max(1, len(reads)):
            raise UnweaveError(f"{str(path)!r} has d_in={d_in} and d_sae={d_sae}, which do not go with its reads.")
        m = d_sae // max(1, len(reads))
        return CrossLayerTranscoder(reads, writes, m, activation, skip=skip, metadata=metadata, generator=unused)
    if kind == "crosscoder":
        coder = Crosscoder(config["widths"], d_sae, activation, metadata=metadata, generator=unused)
        if coder.d_in != d_in:
            raise UnweaveError(f"{str(path)!r} has d_in={d_in}, and its widths make {coder.d_in}.")
        return coder
    return Transcoder(d_in, config["d_out"], d_sae, activation, skip=skip, metadata=metadata, generator=unused)


def to_file(sae: SAE, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as a file has them: of a cross-layer transcoder without the zeros of its decoder."""
    return _packed(sae, weights) if isinstance(sae, CrossLayerTranscoder) else weights


def from_file(sae: SAE, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The inverse, for the SAE that `build` made.

    Raises:
        UnweaveError: If a decoder of a cross-layer transcoder is missing or has the wrong shape.
    """
    return _unpacked(sae, tensors, repr(str(path))) if isinstance(sae, CrossLayerTranscoder) else dict(tensors)


def _packed(coder: CrossLayerTranscoder, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as a file has them: `W_dec.i (M, ...)` are the decoders from layer i to its output and all later ones."""
    starts = [sum(list(coder.writes.values())[:i]) for i in range(coder.layers)]
    rows = weights["W_dec"].split(coder.latents_per_layer)
    decoders = {f"W_dec.{i}": part[:, start:] for i, (part, start) in enumerate(zip(rows, starts, strict=True))}
    return {name: tensor for name, tensor in weights.items() if name != "W_dec"} | decoders


def _unpacked(coder: CrossLayerTranscoder, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The inverse.

    Raises:
        UnweaveError: If a decoder is missing or has another shape than the coder's.
    """
    expected = _packed(coder, {"W_dec": coder.W_dec.detach()})
    for name, tensor in expected.items():
        if name not in tensors:
            raise UnweaveError(f"{where} lacks the tensor {name!r}.")
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, and its config says {tuple(tensor.shape)}"
            raise UnweaveError(f"{name} in {where} has the shape {shapes}.")
    parts = [pad(tensors[name], (coder.d_out - tensors[name].shape[1], 0)) for name in expected]
    return {name: t for name, t in tensors.items() if name not in expected} | {"W_dec": torch.cat(parts)}
