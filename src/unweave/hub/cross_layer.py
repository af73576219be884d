"""Cross-layer transcoders, whose files are one for each layer or have one axis more.

Beware of two groupings: decoders from layer i to all later outputs (Gemma Scope 2, circuit-tracer), or those of all
earlier layers into output j (Llamascopium).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._mapped import fill
from unweave.sae import Activation, CrossLayerTranscoder
from unweave.sae.draft import Draft, on_meta


class Layer(NamedTuple):
    """One layer of a cross-layer transcoder."""

    weights: dict[str, Tensor]
    """`W_enc`, `b_enc`, maybe `threshold`, and of the output of this layer `b_dec` and maybe `skip (d, d_out)`."""
    decoder: Tensor
    """What it writes to its own output and those of all later layers, side by side: `(M, ...)`."""


def cross_layer(
    layers: Sequence[Layer],
    activation: Activation,
    where: object,
    *,
    reads: Mapping[str, int],
    writes: Mapping[str, int],
    metadata: dict[str, Any],
) -> Draft:
    """The draft of a whole cross-layer transcoder.

    Raises:
        UnweaveError: If the layers have different shapes, or only some have thresholds or a skip.
    """
    first, n = layers[0].weights["W_enc"].shape, len(layers)
    m, widths = first[1], list(writes.values())
    for i, (weights, decoder) in enumerate(layers):
        shapes = [tuple(weights["W_enc"].shape), tuple(decoder.shape)]
        if shapes != [tuple(first), (m, sum(widths[i:]))]:
            raise UnweaveError(f"layer {i} of {where} has weights of the shapes {shapes}, unlike layer 0.")
        if weights.keys() != layers[0].weights.keys():
            odd = min(weights.keys() ^ layers[0].weights.keys())
            raise UnweaveError(f"some layers of {where} have a {odd!r}, and others have none.")
    skip = "skip" in layers[0].weights
    made = on_meta(lambda: CrossLayerTranscoder(reads, writes, m, activation, skip=skip, metadata=metadata))
    dtype = reduce(torch.promote_types, (layer.weights["W_enc"].dtype for layer in layers))
    rows = torch.empty(n * m, first[0], dtype=dtype, device=layers[0].weights["W_enc"].device)
    for own, layer in zip(rows.split(m), layers, strict=True):
        fill(own, layer.weights["W_enc"].T)
    tensors: dict[str, Tensor] = {
        name: torch.cat([layer.weights[name] for layer in layers])
        for name in ("b_enc", "b_dec", "threshold")
        if name in layers[0].weights
    }
    if skip:
        tensors["W_skip"] = torch.stack([layer.weights["skip"] for layer in layers])
    tensors |= {f"W_dec.{i}": layer.decoder for i, layer in enumerate(layers)}
    return Draft(made, tensors | {"W_enc": rows.T}, str(where))
