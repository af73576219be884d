"""Which probabilities to fire with, so that features below a hierarchy fire as often as requested.

Given that its parent fires, a child fires with some probability q of its own; one of an exclusive group then also has
to win. With siblings that fire independently it wins against N others with probability 1 / (1 + N), and

    E[1 / (1 + N)] = ∫₀¹ Π_j (1 - q_j + q_j s) ds

over the other siblings j, a polynomial that Gauss-Legendre quadrature integrates exactly. The winning probabilities of
a group are a one-to-one map of the q in [0, 1]ⁿ onto all rates that sum to at most 1, so each feasible request has
exactly one solution, which Newton's method finds.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.synthetic.node import HierarchyNode, Placed, describe, walk
from unweave.synthetic.tables import Tables, split_levels, tabulate

MAX_NODES = 40
"""Quadrature is exact with one node for every two siblings. Because Π (1 - q_j) is 1 minus the sum of the rates, at
least `SLACK`, the q sum to at most 28, and for such an integrand 40 nodes leave an error below rounding."""
SLACK = 1e-12
"""Rates that sum to 1 are asked to sum to this much less: at 1 itself the equations are singular."""
TOLERANCE = 1e-6
"""Relative excess that is taken for the rounding of a float32 request."""
PRECISION = 1e-10
"""Relative error of the rates that Newton's method stops at."""
ENTRIES = 1 << 22
"""Groups are solved in parts of so many siblings times quadrature nodes."""
STEPS = 100


class Compensation(NamedTuple):
    """What to fire with, and what comes out."""

    firing_probabilities: Float[Tensor, " num_features"]
    """Probability with which each feature fires before the hierarchy is applied."""
    rates: Float[Tensor, " num_features"]
    """Rate at which it fires afterwards: the requested one, or the nearest that can be reached."""


def compensate(roots: Sequence[HierarchyNode], probabilities: Float[Tensor, " num_features"]) -> Compensation:
    """Firing probabilities under which a hierarchy leaves each feature the requested rate.

    Exact if features fire independently of each other before the hierarchy is applied.

    A child cannot fire more often than its parent, nor exclusive children together more often than theirs. Where the
    request asks for that, one warning names the feature furthest off, and the features get what can be reached: the
    child fires wherever its parent does; exclusive children share the parent's rate in the proportions requested.
    What is below them still gets its own request, as far as that leaves room.

    Args:
        roots: The forest.
        probabilities: Requested rates, each in (0, 1].

    Raises:
        UnweaveError: For probabilities outside (0, 1], fewer of them than the forest has features, or a bad forest.
    """
    placed = walk(roots)
    tables = tabulate(placed)
    size = len(tables.level)
    if probabilities.ndim != 1 or len(probabilities) < size:
        raise UnweaveError(
            f"probabilities must be one for each feature, at least ({size},) for this hierarchy, "
            f"got shape {tuple(probabilities.shape)}."
        )
    wrong = ~((probabilities > 0) & (probabilities <= 1))
    if bool(wrong.any()):
        i = int(wrong.int().argmax())
        raise UnweaveError(f"probabilities must be in (0, 1], got {float(probabilities[i]):g} for feature {i}.")

    requested = probabilities.detach().to("cpu", torch.float64)
    firing, rates = requested.clone(), requested.clone()
    for features, parents, *_ in split_levels(tables):
        above = torch.where(parents >= 0, rates[parents], 1.0)  # -1 reads the last one, which is then replaced
        firing[features], given_parent = _fire_within(requested[features] / above, tables.group[features])
        rates[features] = given_parent * above
    _warn(placed, tables, requested, rates)
    return Compensation(firing.to(probabilities), rates.to(probabilities))


def _fire_within(
    wanted: Float[Tensor, " n"], groups: Int64[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """What to fire with and the rate that comes out, given that the parents fire."""
    rates = wanted.clamp(max=1.0)
    firing = rates.clone()
    grouped = (groups >= 0).nonzero().squeeze(1)
    if not len(grouped):
        return firing, rates
    _, group, counts = groups[grouped].unique(return_inverse=True, return_counts=True)
    totals = torch.zeros(len(counts), dtype=wanted.dtype).index_add_(0, group, wanted[grouped])
    rates[grouped] = wanted[grouped] / totals.clamp(min=1.0)[group]

    # One row per group, by descending size: a part has as many columns as its first row needs.
    rank = torch.empty_like(counts)
    by_size = counts.argsort(descending=True)
    rank[by_size] = torch.arange(len(counts))
    row, order = rank[group].sort(stable=True)
    members, counts = grouped[order], counts[by_size]
    starts = counts.cumsum(0) - counts
    column = torch.arange(len(row)) - starts[row]
    first = 0
    while first < len(counts):
        width = int(counts[first])
        last = min(len(counts), first + max(1, ENTRIES // (width * min(width, MAX_NODES))))
        a, b = int(starts[first]), int(starts[last - 1] + counts[last - 1])
        place, some = (row[a:b] - first, column[a:b]), members[a:b]
        table = torch.zeros(last - first, width, dtype=wanted.dtype).index_put(place, rates[some])
        firing[some] = solve(table)[place]
        first = last
    return firing, rates


def solve(rates: Float[Tensor, "groups n"]) -> Float[Tensor, "groups n"]:
    """Probabilities with which the members of exclusive groups have to fire, to win at given rates.

    Args:
        rates: Of each member, summing to at most 1 in a row; 0 for places that a smaller group leaves empty.
    """
    rates = rates / (rates.sum(1, keepdim=True) / (1 - SLACK)).clamp(min=1.0)
    points, weights = (torch.from_numpy(a) / 2 for a in np.polynomial.legendre.leggauss(_n_nodes(rates.shape[1])))
    missed = 0.5 - points  # 1 - s
    # Exact for equal rates and in the limit of small ones: shares of -log Π (1 - q), which is known.
    total = rates.sum(1, keepdim=True)
    q = -torch.expm1(torch.log1p(-total) * rates / total)
    for _ in range(STEPS):
        # (groups, n, nodes): one over each factor of the product, so that taking one out is a multiplication.
        without = 1 / (1 - q[:, :, None] * missed)
        product = weights / without.prod(1)
        chance = (without * product[:, None]).sum(2)
        error = q * chance - rates
        if bool((error.abs() <= PRECISION * rates).all()):
            return q
        # The derivative is diag(slope) - diag(q) R Rᵀ, so a Newton step solves a system of one unknown per node.
        root = without * (missed * product).sqrt()[:, None]
        slope = chance + q * root.square().sum(2)
        scaled = root / slope[:, :, None]
        system = torch.eye(len(missed), dtype=q.dtype) - scaled.mT @ (q[:, :, None] * root)
        inner = torch.linalg.solve(system, -(scaled * error[:, :, None]).sum(1))
        step = (q * (root @ inner[:, :, None]).squeeze(2) - error) / slope
        q = (q + step).clamp(q / 10, 1 - (1 - q) / 10)  # towards a bound of [0, 1], never past it
    raise RuntimeError(f"the compensation of an exclusive group has not converged in {STEPS} steps.")


def _n_nodes(n: int) -> int:
    return min(-(-n // 2), MAX_NODES)


def _warn(placed: Sequence[Placed], tables: Tables, requested: Tensor, rates: Tensor) -> None:
    short = rates / requested
    n = int((short < 1 - TOLERANCE).sum())
    if n:
        worst = int(short.argmin())
        node = next(i for i, p in enumerate(placed) if p.node.feature_index == worst)
        warnings.warn(
            f"{n} of {len(tables.level)} features cannot fire as often as requested: a child fires at most as often as "
            "its parent, exclusive children together at most as often as theirs; the furthest off is "
            f"{describe(placed, node)}, requested {float(requested[worst]):.4g}, reachable {float(rates[worst]):.4g}.",
            stacklevel=4,
        )
