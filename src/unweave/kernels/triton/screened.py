"""Top-k at the speed of a bfloat16 product: a shortlist from the product, its values computed again in fp32.

The product misorders values that are closer than its error. A latent that belongs to the k largest can be missed only
if rounding puts more than `spare` others before it; where `k + spare` is at least the number of latents, nothing can.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.kernels.triton.launch import FLOAT_OR_BF16, Arguments
from unweave.kernels.triton.sddmm import sddmm
from unweave.kernels.triton.select import Chosen, topk

SPARE = 8


def topk_screened(
    pre: Float[Tensor, "n m"],
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "m d"],
    bias: Float[Tensor, " m"],
    k: int,
    *,
    spare: int = SPARE,
    magnitude: bool = False,
) -> Chosen:
    """The `k` largest of `x @ weight.T + bias` of each row, found with the help of a less exact product.

    Args:
        pre: `x @ weight.T + bias` up to an error, bfloat16 or float32.
        x: float32.
        weight: The encoder's weights latent by latent, float32.
        bias: float32.
        k: From 1 to m.
        spare: Size of the shortlist beyond `k`.
        magnitude: Whether sizes are compared instead of values.

    Returns:
        The selection, with the values of an fp32 product.
    """
    args = Arguments("topk_screened")
    args.take("pre", pre, "n m", *FLOAT_OR_BF16, gaps=True)
    args.take("x", x, "n d", torch.float32)
    args.take("weight", weight, "m d", torch.float32)
    args.take("bias", bias, "m", torch.float32)
    n, m = pre.shape
    args.require(1 <= k <= m, f"k must lie between 1 and the number of latents, {m}, got {k}.")
    args.require(spare >= 0, f"spare must not be negative, got {spare}.")

    width = min(k + spare, m)
    shortlist = topk(pre, width, magnitude=magnitude).indices
    offsets = torch.arange(n + 1, device=pre.device) * width
    exact = sddmm(shortlist.flatten(), offsets, x, weight).view(n, width) + bias[shortlist]
    chosen = topk(exact, k, magnitude=magnitude)
    return Chosen(shortlist.gather(1, chosen.indices), chosen.values)
