"""How often each latent fires."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave.evaluation.sums import CodeSums


def feature_density(sums: CodeSums) -> Float[Tensor, " d_sae"]:
    """Share of tokens that each latent fires on; NaN if there were no tokens."""
    return sums.counts().double() / sums.n_tokens


def consistent_activation_heuristic(sums: CodeSums) -> Float[Tensor, " d_sae"]:
    """Firings per prompt that has at least one firing; NaN for a latent that never fired."""
    return sums.counts().double() / sums.prompt_counts()


def density_histogram(sums: CodeSums, bins_per_decade: int = 2) -> dict[str, Any]:
    """How log10 of the density is distributed over the latents.

    The lowest bin holds the least density that the sample can resolve, one firing; dead latents are counted apart.

    Returns:
        `log10_edges`: n + 1 edges, the last 0. `counts`: latents in each bin, the upper edge belonging to the bin.
        `dead`: latents without a firing.
    """
    density = feature_density(sums)
    density = density[density > 0]
    decades = math.ceil(math.log10(max(sums.n_tokens, 10)))
    n_bins = decades * bins_per_decade
    from_the_top = (-density.log10() * bins_per_decade).floor().long().clamp(max=n_bins - 1)
    counts: Int64[Tensor, " n_bins"] = torch.bincount(from_the_top, minlength=n_bins).flip(0)
    return {
        "log10_edges": [-decades + i / bins_per_decade for i in range(n_bins + 1)],
        "counts": counts.tolist(),
        "dead": sums.d_sae - len(density),
    }
