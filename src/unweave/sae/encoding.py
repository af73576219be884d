"""Encoders of one factor or two: with a gated linear unit (Dauphin et al., arXiv 1612.08083), as Llamascopium has it,

    pre = (x @ W_enc + b_enc) * sigmoid(x @ W_enc_glu + b_enc_glu)

and any activation function follows. With one factor, selections are those of `unweave.kernels`; with two, all
pre-activations of some rows are made at a time, because no bound on a product of products would leave many of them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from unweave import kernels
from unweave.kernels import Above, LargestOfBatch, Selection, Spec, select
from unweave.sae import ops
from unweave.sae.codes import DenseCodes

Encoders = Sequence[tuple[Float[Tensor, "d m"], Float[Tensor, " m"]]]
"""Weights and bias of each factor."""


def pre_activations(centred: Float[Tensor, "n d"], encoders: Encoders) -> Float[Tensor, "n m"]:
    """All of them."""
    first, *gates = (torch.addmm(b, centred, W) for W, b in encoders)
    return first * gates[0].sigmoid() if gates else first


def encode_select(centred: Float[Tensor, "n d"], encoders: Encoders, spec: Spec, max_density: float = 1.0) -> Selection:
    """What a selection keeps; see `unweave.kernels.encode_select`."""
    if len(encoders) == 1:
        return kernels.encode_select(centred, *encoders[0], spec, max_density=max_density)
    with torch.no_grad():
        if isinstance(spec, LargestOfBatch):
            found = encode_select(centred, encoders, Above(0.0))
            if len(found.values) <= spec.budget:
                return found
            return select.largest_of_batch(found, spec.budget)
        return kernels.select_by_rows(centred, lambda rows: pre_activations(rows, encoders), spec, max_density)


def encoded_at(
    x: Float[Tensor, "n d"], bias: Float[Tensor, " d"], encoders: Encoders, pre: ops.AnyCodes
) -> ops.AnyCodes:
    """Pre-activations of `x - bias` that are known at some entries, with gradients."""
    if len(encoders) == 1:
        return ops.encode_at(x, bias, *encoders[0], pre)
    with torch.no_grad():
        centred = x - bias
        made = [_factor_at(centred, W, b, pre) for W, b in encoders]
    first, gate = (ops.encode_at(x, bias, W, b, known) for (W, b), known in zip(encoders, made, strict=True))
    return cast(ops.AnyCodes, pre.with_values(first.values * gate.values.sigmoid()))


def _factor_at(centred: Tensor, W: Tensor, b: Tensor, entries: ops.AnyCodes) -> ops.AnyCodes:
    if isinstance(entries, DenseCodes):
        return cast(ops.AnyCodes, DenseCodes(torch.addmm(b, centred, W)))
    products = kernels.sddmm(entries.indices, entries.offsets, centred, W.T)
    return cast(ops.AnyCodes, entries.with_values(products + b[entries.indices]))
