"""overcomplete (Fel): its state dictionaries, where the encoder is one linear layer. Its pickled modules are refused.

Rows of the dictionary are normalised in every forward, by L2 unless its author chose otherwise, which no file says:
rows that are not nearly unit are therefore asked about. JumpReLU keeps `h >= threshold`, which is `h >` the next
smaller number. The activation function is a class of Python's and in no file either, so the caller names it.
"""

from __future__ import annotations

import torch

from unweave._errors import UnweaveError
from unweave.hub.layout import plain, take
from unweave.hub.source import Source
from unweave.sae import SAE, Activation, JumpReLU
from unweave.sae.draft import Draft

FILES = ("*.pt", "*.pth")
LAYOUT = {"W_enc": "encoder.final_block.0.weight M d", "b_enc": "encoder.final_block.0.bias M",
          "W_dec": "dictionary._weights M d"}  # fmt: skip
_STORED = {entry.split()[0] for entry in LAYOUT.values()}
_SETTINGS = ("dictionary.multiplier", "dictionary._fused_dictionary", "thresholds", "bandwidth")
_NEARLY_UNIT = 0.2
"""How far an optimiser's last step may have taken rows from the norm 1 that the forward before it gave them."""


def matches(source: Source) -> bool:
    return any("dictionary._weights" in source.keys(name) for name in source.find(*FILES)[:1])


def read(source: Source) -> Draft:
    tensors = source.tensors(source.one(*FILES))
    settings = {name: tensors.pop(name) for name in _SETTINGS if name in tensors}
    if "encoder.weight" in tensors:
        raise UnweaveError(
            f"the encoder of {source} is tied to its dictionary (it has 'encoder.weight' alone), and "
            "only untied encoders of one linear layer are read."
        )
    if norm := [name for name in tensors if name.startswith("encoder.") and name not in _STORED]:
        raise UnweaveError(
            f"the encoder of {source} is more than one linear layer (it has {norm[0]!r}), which no SAE here computes."
        )
    weights = take(tensors, LAYOUT, source)
    activation = source.hints.get("activation")
    if "thresholds" in settings:
        activation = JumpReLU()
        theta = settings["thresholds"].float().exp().flatten().expand(len(weights["b_enc"]))
        weights["threshold"] = torch.nextafter(theta, torch.zeros_like(theta))
    if not isinstance(activation, Activation):
        raise UnweaveError(f"no file says the activation function of {source}: pass activation=, such as TopK(k).")
    kind = source.hints.get("normalization")
    if kind not in (None, "l2", "identity"):
        raise UnweaveError(f"normalization is 'l2' or 'identity' here, and not {kind!r}.")
    multiplier = settings.get("dictionary.multiplier", torch.zeros(()))

    def normalise(sae: SAE) -> None:
        norms = torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True)
        if kind is None and (norms - 1).abs().max() > _NEARLY_UNIT:
            raise UnweaveError(
                f"the rows of the dictionary in {source} have norms from {norms.min():.3g} to {norms.max():.3g}, and "
                "no file says how they are normalised: pass normalization='l2' or 'identity'."
            )
        sae.W_dec.mul_(multiplier.exp())
        if kind != "identity":
            sae.W_dec.div_(norms + 1e-8)

    return plain(weights, activation, source, metadata={}, folds=[normalise])
