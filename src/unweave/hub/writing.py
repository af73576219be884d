"""What writers of foreign formats share: what they refuse, and tensors that lie as those formats have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.hub.layout import product
from unweave.sae import SAE, Transcoder


def only_autoencoders_and_transcoders(sae: SAE, name: str) -> None:
    """Refuse coders with several hooks, temporal SAEs, gated linear units and what normalises every token.

    Raises:
        UnweaveError: With the reason.
    """
    if type(sae) not in (SAE, Transcoder):
        raise UnweaveError(f"{name} has no form for a {type(sae).__name__}.")
    if sae.glu:
        raise UnweaveError(f"{name} has no form for pre-activations that a gated linear unit multiplies.")
    if sae.per_token is not None:
        raise UnweaveError(f"this SAE normalises every token ({sae.per_token}), which {name} does not.")


def only_plain(sae: SAE, name: str) -> None:
    """Refuse everything but autoencoders that take activations as they are.

    Raises:
        UnweaveError: With the reason.
    """
    only_autoencoders_and_transcoders(sae, name)
    if isinstance(sae, Transcoder):
        raise UnweaveError(f"{name} has no form for a Transcoder.")


def weights_of(sae: SAE) -> dict[str, Tensor]:
    """The weights of an SAE by our names, contiguous on the CPU; of a tied one with the encoder that it uses."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    weights["W_enc"] = sae.W_enc.detach().cpu().contiguous()
    return weights


def with_pre_bias(sae: SAE, weights: dict[str, Tensor], wanted: bool) -> dict[str, Tensor]:
    """The weights of an SAE that gives the same codes with `b_dec` subtracted from its input, or without."""
    if wanted == sae.apply_b_dec_to_input:
        return weights
    shift = product(weights["b_dec"].double(), weights["W_enc"]) * (1 if wanted else -1)
    moved = {"b_enc": weights["b_enc"].double() + shift}
    if "b_mag" in weights:
        moved["b_mag"] = weights["b_mag"].double() + shift * weights["r_mag"].double().exp()
    return weights | {name: tensor.to(weights[name].dtype) for name, tensor in moved.items()}


def thresholds_of(sae: SAE) -> Tensor:
    """The threshold of every latent; of an SAE that has one for all of them, that one.

    Those below 0 mean what 0 means here, where codes are never negative; elsewhere they may let negative codes through.

    Raises:
        UnweaveError: If there is none yet.
    """
    assert sae.threshold is not None
    if sae.threshold.isnan().any():
        raise UnweaveError(
            f"this {type(sae.activation).__name__} SAE has no threshold yet, which inference compares with: calibrate "
            "it."
        )
    return sae.threshold.detach().cpu().clamp(min=0).expand(sae.d_sae).contiguous()


def metadata_for(sae: SAE, model: str) -> dict[str, Any]:
    """The model's name under the key that a format has for it, if it is known."""
    return {model: sae.metadata["model_name"]} if "model_name" in sae.metadata else {}


def save_torch(value: Any, path: Path) -> None:
    """`torch.save`, of copies that are no views: those would be written with all of what they are views of."""
    if isinstance(value, dict):
        value = {name: item.clone() if isinstance(item, Tensor) else item for name, item in value.items()}
    torch.save(value, path)
