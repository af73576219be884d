"""Temporal SAEs in SAELens' layout: its keys and tensors from an SAE, and an SAE from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae.activation_fns import ReLU, TopK
from unweave.sae.temporal import Temporal, TemporalSAE

SCALED = "constant_scalar_rescale"
"""SAELens' name for one stored factor."""
KEYS = (
    "n_heads", "n_attn_layers", "bottleneck_factor", "sae_diff_type", "kval_topk", "tied_weights",
    "activation_normalization_factor",
)  # fmt: skip


def config_of(sae: TemporalSAE) -> dict[str, Any]:
    """What its `cfg.json` says beside the common keys.

    Raises:
        UnweaveError: If it is tied and its bias is added but not subtracted, which the layout has no form for.
    """
    if sae.tied and not sae.apply_b_dec_to_input and sae.b_dec.any():
        raise UnweaveError("SAELens has no layout for a tied temporal SAE whose b_dec is added but not subtracted.")
    values = (
        sae.settings.n_heads, sae.settings.n_layers, sae.settings.bottleneck,
        "topk" if isinstance(sae.activation, TopK) else "relu", getattr(sae.activation, "k", None), sae.tied, sae.scale,
    )  # fmt: skip
    return {"architecture": "temporal", "normalize_activations": SCALED} | dict(zip(KEYS, values, strict=True))


def tensors_of(sae: TemporalSAE) -> dict[str, Tensor]:
    """Its tensors; the encoder's factor is no part of them."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in sae.state_dict().items()}
    if not sae.tied:
        tensors["W_enc"] = (tensors["W_enc"] / sae.encoder_scale).contiguous()
    return tensors


def sae_for(config: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, Any], path: str) -> TemporalSAE:
    """An SAE of the shape that a file asks for; of the file's tensors, the encoder is brought to its units.

    Raises:
        UnweaveError: If a key is missing or its value is unknown.
    """
    missing = [key for key in KEYS[:6] if key not in config]
    if missing:
        raise UnweaveError(f"{path!r} is a temporal SAE without {missing[0]}.")
    if config["sae_diff_type"] not in ("topk", "relu"):
        raise UnweaveError(f"{path!r} has sae_diff_type={config['sae_diff_type']!r}, which is neither topk nor relu.")
    ranked = config["sae_diff_type"] == "topk" and config["kval_topk"] is not None
    settings = Temporal(
        n_heads=config["n_heads"], n_layers=config["n_attn_layers"], bottleneck=config["bottleneck_factor"],
        tied=config["tied_weights"],
    )  # fmt: skip
    sae = TemporalSAE(
        config["d_in"], config["d_sae"], TopK(config["kval_topk"]) if ranked else ReLU(), settings,
        apply_b_dec_to_input=config["apply_b_dec_to_input"], metadata=metadata, generator=torch.Generator(),
    )  # fmt: skip
    if config.get("normalize_activations") == SCALED:
        sae.scale = float(config.get("activation_normalization_factor", 1.0))
    if "W_enc" in tensors and not sae.tied:
        tensors["W_enc"] = tensors["W_enc"] * sae.encoder_scale
    if "b_dec" in tensors and sae.tied and not sae.apply_b_dec_to_input:
        tensors["b_dec"] = torch.zeros_like(tensors["b_dec"])  # SAELens leaves it out of both
    return sae
