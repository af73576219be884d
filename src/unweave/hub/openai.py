"""OpenAI's sparse_autoencoder (Gao et al., arXiv 2406.04093): one PyTorch file; TopK takes layer-normed inputs."""

from __future__ import annotations

from typing import Any

from unweave._errors import UnweaveError
from unweave.hub.layout import plain, take
from unweave.hub.source import Source
from unweave.sae import Activation, ReLU, TopK
from unweave.sae.draft import Draft
from unweave.sae.normalization import PerToken

FILES = ("*.pt", "*.pth")
LAYOUT = {
    "W_enc": "encoder.weight M d", "b_enc": "latent_bias M", "W_dec": "decoder.weight d M", "b_dec": "pre_bias d",
}  # fmt: skip
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_SETTINGS = ("activation", "activation_state_dict")


def matches(source: Source) -> bool:
    return any({"pre_bias", "latent_bias"} <= set(source.keys(name)) for name in source.find(*FILES)[:1])


def read(source: Source) -> Draft:
    name = source.one(*FILES)
    value = dict(source.torch(name))
    settings = {key: value.pop(key) for key in _SETTINGS if key in value}
    tensors = source.only_tensors(value, name)
    if "decoder.weight" not in tensors and "encoder.weight" in tensors:  # tied
        tensors["decoder.weight"] = tensors["encoder.weight"].T
    activation = _activation(settings, source)
    weights = take(tensors, LAYOUT, source, ignored=STATISTICS)
    per_token: PerToken | None = "layer_norm" if isinstance(activation, TopK) else None
    return plain(weights, activation, source, metadata={}, pre_bias=True, per_token=per_token)


def _activation(settings: dict[str, Any], source: Source) -> Activation:
    state, name = settings.get("activation_state_dict") or {}, settings.get("activation")
    match name:
        case "ReLU":
            return ReLU()
        case "TopK":
            after = state.get("postact_fn", "ReLU")
            if after != "ReLU":
                raise UnweaveError(f"{source} is a TopK SAE that ends in {after!r}; known is 'ReLU'.")
            if "k" not in state:
                raise UnweaveError(f"{source} is a TopK SAE without k.")
            return TopK(int(state["k"]))
        case "Identity":
            raise UnweaveError(f"{source} has the activation 'Identity', whose codes are dense and signed: no SAE's.")
    raise UnweaveError(f"{source} has the activation {name!r}, which is none of TopK, ReLU, Identity.")
