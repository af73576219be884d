"""What files say about transcoders, crosscoders and cross-layer transcoders beyond what they say about SAEs.

The architecture is that of the SAE with the coder's kind behind it: `skip_transcoder`, `jumprelu_transcoder`,
`topk_crosscoder`. SAELens knows the transcoders of ReLU and JumpReLU; it refuses the other names, which are ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
    architecture = f"{architecture}_glu" if sae.glu else architecture
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
    glu: bool,
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
            d_in, d_sae, activation, apply_b_dec_to_input=pre_bias, tied=tied, glu=glu, metadata=metadata,
            generator=unused,
        )  # fmt: skip
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
    if glu and not kind.endswith("transcoder"):
        raise UnweaveError(f"{str(path)!r} asks for a gated linear unit, which a {kind} has not.")
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
    return Transcoder(d_in, config["d_out"], d_sae, activation, skip=skip, glu=glu, metadata=metadata, generator=unused)
