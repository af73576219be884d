"""What firing should look like: rates and magnitudes under a hierarchy, correlations under a Gaussian copula."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from unweave.synthetic.generator import ActivationGenerator
from unweave.synthetic.magnitudes import positive_gaussian_moments
from unweave.synthetic.tables import Tables

QUADRATURE = 48
"""Nodes of the integrals over correlations: 1e-10 up to correlations of 0.95."""
EXCLUSION_NODES = 40
"""Nodes of the integral over exclusive groups, which are exact for up to 80 siblings."""


class Expected(NamedTuple):
    """What a generator's features should do."""

    rates: Float64[Tensor, " features"]
    """Probability that each is above 0."""
    magnitudes: Float64[Tensor, " features"]
    """Its mean where it is."""


def expected_firing(generator: ActivationGenerator, tables: Tables | None) -> Expected:
    """Rates and mean magnitudes, of features that fire independently before the hierarchy is applied.

    Args:
        generator: Probabilities and magnitudes.
        tables: The hierarchy that modifies them (`tables.tabulate`), or None.
    """
    rates = generator.firing_probabilities.double().cpu()
    means = generator.mean_firing_magnitudes.double().cpu()
    magnitudes, _ = positive_gaussian_moments(means, generator.std_firing_magnitudes.cpu())
    if tables is None or not len(tables.level):
        return Expected(rates, magnitudes)
    rates, magnitudes = rates.clone(), magnitudes.clone()
    wins = _chance_to_win(rates[: len(tables.group)], tables)
    for level in range(int(tables.level.max()) + 1):
        features = (tables.level == level).nonzero().flatten()
        parents = tables.parent[features]
        below = parents >= 0
        rates[features] *= wins[features] * torch.where(below, rates[parents], 1.0)
        scaled, above = features[below & tables.scaled[features]], parents[below & tables.scaled[features]]
        magnitudes[scaled] *= magnitudes[above] / means[above]
    return Expected(rates, magnitudes)


def _chance_to_win(firing: Float64[Tensor, " n"], tables: Tables) -> Float64[Tensor, " n"]:
    """Probability that a feature which fires within its exclusive group is the one that is kept.

    Against N others it wins with 1 / (1 + N), whose mean is `∫₀¹ Π_j (1 - q_j + q_j s) ds` over the others j.
    """
    members = (tables.group >= 0).nonzero().flatten()
    chance = torch.ones_like(firing)
    if len(members):
        group, q = tables.group[members], firing[members]
        total = torch.zeros_like(q)
        for point, weight in zip(*np.polynomial.legendre.leggauss(EXCLUSION_NODES), strict=True):
            own = torch.log1p(-q * (1 - point) / 2)
            everybody = torch.zeros(int(group.max()) + 1, dtype=q.dtype).index_add_(0, group, own)
            total += weight / 2 * (everybody[group] - own).exp()
        chance[members] = total
    return chance


def firing_correlations(
    probabilities: Float[Tensor, " n"], correlations: Float[Tensor, "n n"]
) -> Float64[Tensor, "n n"]:
    """Correlations of firing (0 or 1) that a Gaussian copula gives to features of given rates.

    The covariance of two thresholded Gaussians of correlation r is Plackett's integral
    `1/2π ∫₀^asin(r) exp(-(s² + t² - 2 s t sin θ) / (2 cos² θ)) dθ`, at the thresholds s and t.

    Args:
        probabilities: Firing rates, in (0, 1).
        correlations: Of the Gaussians; below 1 in absolute value off the diagonal.
    """
    p = probabilities.double()
    t = torch.special.ndtri(1 - p)
    end = torch.asin(correlations.double().clamp(-1, 1).fill_diagonal_(0))
    squares, product = t[:, None].square() + t.square(), t[:, None] * t
    covariance = torch.zeros_like(end)
    for point, weight in zip(*np.polynomial.legendre.leggauss(QUADRATURE), strict=True):
        angle = end * (point + 1) / 2
        covariance += weight * torch.exp(-(squares - 2 * product * angle.sin()) / (2 * angle.cos().square()))
    deviation = (p * (1 - p)).sqrt()
    return (covariance * end / (4 * math.pi) / (deviation[:, None] * deviation)).fill_diagonal_(1)


def expected_correlations(generator: ActivationGenerator, chosen: Tensor) -> Float64[Tensor, "chosen chosen"] | None:
    """Correlations of the firing of some features; None where modifiers change what fires."""
    if generator.modify_activations:
        return None
    rates = generator.firing_probabilities.double().cpu()[chosen]
    if generator.correlation_matrix is not None:
        return firing_correlations(rates, generator.correlation_matrix.cpu()[chosen][:, chosen])
    if generator.correlation_factor is not None:
        factor = generator.correlation_factor.cpu()[chosen].double()
        return firing_correlations(rates, factor @ factor.T)
    return torch.eye(len(chosen), dtype=torch.float64)
