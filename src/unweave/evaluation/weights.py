"""What the weights alone say: how similar each latent is to its nearest neighbour, and its encoder to its decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from unweave.sae import SAE

CPU_TILE, TILE = 512, 8192
"""Rows and columns of a tile of similarities: 1 MiB, which stays in a CPU's cache, or 256 MiB elsewhere."""


class WeightCosines(NamedTuple):
    """Cosine similarities of each latent's vectors; NaN where there is none."""

    max_encoder: Float[Tensor, " d_sae"]
    """Largest cosine of its encoder vector with another latent's."""
    max_decoder: Float[Tensor, " d_sae"]
    """Largest cosine of its decoder vector with another latent's."""
    encoder_decoder: Float[Tensor, " d_sae"]
    """Cosine of its own encoder and decoder vectors."""


def weight_cosines(sae: SAE) -> WeightCosines:
    """All of them, in float32 on the CPU."""
    cosines = max_cosine(sae.W_enc.T), max_cosine(sae.W_dec), encoder_decoder_cosine(sae.W_enc, sae.W_dec)
    return WeightCosines(*(cosine.cpu() for cosine in cosines))


def max_cosine(vectors: Float[Tensor, "n d"], tile: int | None = None) -> Float[Tensor, " n"]:
    """The largest cosine similarity of each vector with any other.

    Computed in tiles, of which symmetry spares half; the full `(n, n)` matrix is never in memory.

    Args:
        vectors: One vector in each row, of any length.
        tile: Rows and columns of a tile; by default small on a CPU, whose cache is small, and large elsewhere.

    Returns:
        Float32 on the vectors' device; NaN for a zero vector and where there is no other non-zero vector.
    """
    tile = tile or (CPU_TILE if vectors.device.type == "cpu" else TILE)
    units = normalize(vectors.detach().float(), dim=1)
    exists = (units != 0).any(1)
    units = units[exists]
    nearest = units.new_full((len(units),), -torch.inf)
    for top in range(0, len(units), tile):
        rows = units[top : top + tile]
        for left in range(top, len(units), tile):
            cosines = rows @ units[left : left + tile].T
            if left == top:
                cosines.fill_diagonal_(-torch.inf)
            nearest[top : top + tile] = torch.maximum(nearest[top : top + tile], cosines.amax(1))
            nearest[left : left + tile] = torch.maximum(nearest[left : left + tile], cosines.amax(0))
    result = vectors.new_full((len(vectors),), torch.nan, dtype=torch.float32)
    if len(units) > 1:
        result[exists] = nearest.clamp(-1, 1)
    return result


def encoder_decoder_cosine(
    W_enc: Float[Tensor, "d_in d_sae"], W_dec: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, " d_sae"]:
    """`cos(W_enc[:, i], W_dec[i])` of each latent; NaN where either is zero, or their widths differ."""
    if W_enc.shape[0] != W_dec.shape[1]:  # a transcoder between spaces
        return W_dec.new_full((len(W_dec),), torch.nan, dtype=torch.float32)
    encoder, decoder = W_enc.detach().T.float(), W_dec.detach().float()
    exists = (encoder != 0).any(1) & (decoder != 0).any(1)
    cosine = torch.linalg.vecdot(normalize(encoder, dim=1), normalize(decoder, dim=1)).clamp(-1, 1)
    return torch.where(exists, cosine, torch.nan)
