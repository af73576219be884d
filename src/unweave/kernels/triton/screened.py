"""Exact top-k at the speed of a bfloat16 product: a shortlist from the product, its values computed again in fp32.

The product misorders values that are closer than its error. If the error of every pre-activation of a row is at most
`eps`, nothing outside the shortlist is larger than the shortlist's smallest screened value plus `eps`. Where the k-th
largest exact value lies strictly above that, the selection is the one that an fp32 product would give.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from unweave.kernels.triton.launch import FLOAT_OR_BF16, Arguments
from unweave.kernels.triton.sddmm import sddmm
from unweave.kernels.triton.select import topk

SPARE = 8


class Screened(NamedTuple):
    """A selection made among exact values."""

    indices: Int64[Tensor, "n k"]
    """Latents, ascending."""
    values: Float[Tensor, "n k"]
    """Their pre-activations, computed in fp32."""
    certified: Bool[Tensor, " n"]
    """Whether the row's selection is proven to be that of exact pre-activations; on the device."""


def topk_screened(
    pre: Float[Tensor, "n m"],
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "m d"],
    bias: Float[Tensor, " m"],
    eps: Float[Tensor, " n"],
    k: int,
    *,
    spare: int = SPARE,
    magnitude: bool = False,
) -> Screened:
    """The `k` largest of `x @ weight.T + bias` of each row, found with the help of a less exact product.

    Args:
        pre: `x @ weight.T + bias` up to an error, bfloat16 or float32.
        x: float32.
        weight: The encoder's weights latent by latent, float32.
        bias: float32.
        eps: Bound of each row's errors in `pre`, float32; it should include the rounding of the fp32 values themselves.
        k: From 1 to m.
        spare: Size of the shortlist beyond `k`. A row that is not certified needs more, or exact pre-activations.
        magnitude: Whether sizes are compared instead of values.
    """
    args = Arguments("topk_screened")
    args.take("pre", pre, "n m", *FLOAT_OR_BF16, gaps=True)
    args.take("x", x, "n d", torch.float32)
    args.take("weight", weight, "m d", torch.float32)
    args.take("bias", bias, "m", torch.float32)
    args.take("eps", eps, "n", torch.float32)
    n, m = pre.shape
    args.require(1 <= k <= m, f"k must lie between 1 and the number of latents, {m}, got {k}.")
    args.require(spare >= 0, f"spare must not be negative, got {spare}.")

    width = min(k + spare, m)
    shortlist = topk(pre, width, magnitude=magnitude)
    offsets = torch.arange(n + 1, device=pre.device) * width
    exact = sddmm(shortlist.indices.flatten(), offsets, x, weight).view(n, width) + bias[shortlist.indices]
    chosen = topk(exact, k, magnitude=magnitude)
    indices = shortlist.indices.gather(1, chosen.indices)
    if width == m:
        return Screened(indices, chosen.values, torch.ones(n, dtype=torch.bool, device=pre.device))
    seen, kept = (t.abs() if magnitude else t for t in (shortlist.values, chosen.values))
    return Screened(indices, chosen.values, kept.amin(1) > seen.amin(1).float() + eps)
