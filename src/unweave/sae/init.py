"""Where weights start: decoder directions from data, and the middle of the activations for the decoder's bias."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from unweave._errors import UnweaveError

MEDIAN_SAMPLES = 32_768
"""Activations that a geometric median is taken of."""


def geometric_median(
    x: Float[Tensor, "n d"], *, max_iterations: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d"]:
    """The point whose distances to all rows have the smallest sum, by Weiszfeld's iteration in float64.

    Unlike the mean it hardly moves with a few outliers.

    Args:
        x: Points; of more than `MEDIAN_SAMPLES` the first count.
        max_iterations: Iterations at most.
        tolerance: Movement, relative to the mean distance, below which it stops.
    """
    points = x[:MEDIAN_SAMPLES].double()
    if len(points) == 0:
        raise UnweaveError("there are no activations to take a geometric median of.")
    median = points.mean(0)
    for _ in range(max_iterations):
        distances = (points - median).norm(dim=1)
        mean = distances.mean()
        if mean == 0:
            break
        weights = 1 / distances.clamp(min=1e-12 * mean)  # on a point itself the weight would be infinite
        moved = (weights @ points) / weights.sum()
        done = (moved - median).norm() <= tolerance * mean
        median = moved
        if done:
            break
    return median.to(x.dtype)


def middle(x: Float[Tensor, "n d"], kind: Literal["mean", "zeros", "geometric_median"]) -> Float[Tensor, " d"]:
    """The middle of some activations, where a decoder's bias starts."""
    match kind:
        case "mean":
            return x.float().mean(0)
        case "geometric_median":
            return geometric_median(x.float())
        case "zeros":
            return x.new_zeros(x.shape[1], dtype=torch.float32)
    raise UnweaveError(f"b_dec starts at 'mean', 'zeros' or 'geometric_median', got {kind!r}.")


def data_directions(
    x: Float[Tensor, "n d"], n: int, generator: torch.Generator, *, share: float = 0.8
) -> Float[Tensor, "n d"]:
    """Unit rows that point mostly where activations lie: fewer latents are dead at the start than with random ones.

    Each row is the direction of `share * u + (1 - share) * r`, with u the direction of an activation from the mean of
    all and r a random direction (saev, whose mixture is of vectors and not of directions). Every activation is used
    once before one is used again.

    Args:
        x: Activations, at least two.
        n: Number of rows.
        generator: Source of the draws, on the CPU.
        share: Of the data, from 0 to 1.
    """
    if not 0 <= share <= 1 or len(x) < 2:
        raise UnweaveError(f"data directions need share from 0 to 1 and two activations, got {share} and {len(x)}.")
    centred = normalize(x.float().cpu() - x.float().mean(0).cpu(), dim=1)
    rounds = [torch.randperm(len(x), generator=generator) for _ in range(-(-n // len(x)))]
    chosen = centred[torch.cat(rounds)[:n]]
    random = normalize(torch.randn(n, x.shape[1], generator=generator), dim=1)
    return normalize(share * chosen + (1 - share) * random, dim=1)
