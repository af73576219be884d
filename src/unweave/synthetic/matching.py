"""Which latent stands for which true feature: pairs of vectors by the absolute value of their cosine.

A latent that points against a feature has found its line as well, so the sign does not count. Similarities are
computed in tiles, so no more than one tile of them is in memory unless the exact matching needs them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from unweave._errors import UnweaveError

EXACT_UP_TO = 20_000
"""Vectors on the longer side up to which the matching is optimal; its time grows with their third power."""
NEIGHBOURS = 32
"""How many of its most similar vectors each one may choose from before the greedy matching takes what is left."""
_TILE_ROWS, _TILE_COLUMNS = 1024, 16_384
_TILE_ELEMENTS = 2**25


class Matching(NamedTuple):
    """One-to-one pairs of two sets of vectors, as many as the smaller set has, ordered by `a`."""

    a: Int64[Tensor, " n"]
    """Row in the first set."""
    b: Int64[Tensor, " n"]
    """Row in the second set."""
    similarity: Float[Tensor, " n"]
    """`|cos|` of the pair."""
    method: Literal["hungarian", "greedy"]
    """Whether the sum of the similarities is the largest there is, or what a greedy choice gave: a lower bound."""


def match(
    features_a: Float[Tensor, "n d"], features_b: Float[Tensor, "m d"], *, exact_up_to: int = EXACT_UP_TO
) -> Matching:
    """Pair the rows of two sets so that the sum of `|cos|` is large, each row at most once.

    Up to `exact_up_to` rows the sum is the largest possible (the Hungarian method). Beyond, pairs are taken from each
    row's `NEIGHBOURS` most similar ones, strongest first; rows whose neighbours are all taken then get the most similar
    row that is left.

    Args:
        features_a: One vector in each row, of any length.
        features_b: The other set.
        exact_up_to: Rows of the larger set up to which the matching is exact.

    Returns:
        The pairs, on the CPU.

    Raises:
        UnweaveError: If a set is empty, the widths differ, or a value is NaN or infinite.
    """
    a, b = _units(features_a, features_b)
    if max(len(a), len(b)) <= exact_up_to:
        return _hungarian(a, b)
    if len(a) <= len(b):
        rows, columns, similarity = _greedy(a, b)
    else:
        columns, rows, similarity = _greedy(b, a)
    order = rows.argsort()
    return Matching(rows[order].cpu(), columns[order].cpu(), similarity[order].cpu(), "greedy")


def mean_correlation_coefficient(features_a: Float[Tensor, "n d"], features_b: Float[Tensor, "m d"]) -> float:
    """Mean `|cos|` over the `min(n, m)` pairs of `match`, from 0 to 1.

    Beyond 20,000 rows the matching is greedy and the number a lower bound; `match` says which it was.
    """
    return float(match(features_a, features_b).similarity.double().mean())


def best_features(
    sae_features: Float[Tensor, "m d"], gt_features: Float[Tensor, "f d"]
) -> tuple[Int64[Tensor, " m"], Float[Tensor, " m"]]:
    """The true feature with the largest `|cos|` to each latent, and that `|cos|`; several latents may share one."""
    a, b = _units(sae_features, gt_features)
    index = torch.zeros(len(a), dtype=torch.int64, device=a.device)
    similarity = a.new_full((len(a),), -1.0)
    for rows, left, tile in _tiles(a, b):
        found, where = tile.max(dim=1)
        better = found > similarity[rows]
        index[rows] = torch.where(better, where + left, index[rows])
        similarity[rows] = torch.where(better, found, similarity[rows])
    return index, similarity


def feature_uniqueness(sae_features: Float[Tensor, "m d"], gt_features: Float[Tensor, "f d"]) -> float:
    """Number of distinct best-matching features, divided by the number of latents; at most `min(1, f / m)`."""
    return len(best_features(sae_features, gt_features)[0].unique()) / len(sae_features)


def _units(features_a: Tensor, features_b: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets with rows of norm 1, in one dtype of at least float32; zero rows stay zero."""
    for name, features in (("first", features_a), ("second", features_b)):
        if features.ndim != 2 or features.numel() == 0:
            raise UnweaveError(f"the {name} set of vectors must be (n, d) with n, d > 0, got {tuple(features.shape)}.")
        if not features.isfinite().all():
            raise UnweaveError(f"the {name} set of vectors holds values that are NaN or infinite.")
    if features_a.shape[1] != features_b.shape[1]:
        raise UnweaveError(
            f"the two sets of vectors have different widths, {features_a.shape[1]} and {features_b.shape[1]}."
        )
    dtype = torch.promote_types(torch.promote_types(features_a.dtype, features_b.dtype), torch.float32)
    a, b = features_a.detach().to(dtype), features_b.detach().to(features_a.device, dtype)
    return normalize(a, dim=1), normalize(b, dim=1)


def _tiles(a: Tensor, b: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """Rows of a, first column of b, and the `|cos|` between them, for all of both."""
    for top in range(0, len(a), _TILE_ROWS):
        rows = slice(top, min(top + _TILE_ROWS, len(a)))
        for left in range(0, len(b), _TILE_COLUMNS):
            yield rows, left, (a[rows] @ b[left : left + _TILE_COLUMNS].T).abs_().clamp_(max=1)


def _hungarian(a: Tensor, b: Tensor) -> Matching:
    from scipy.optimize import linear_sum_assignment

    cost = torch.empty(len(a), len(b), dtype=torch.float64)  # what scipy computes in, so that it makes no copy
    for rows, left, tile in _tiles(a, b):
        cost[rows, left : left + tile.shape[1]] = tile
    cost.neg_()
    found_a, found_b = (torch.from_numpy(found) for found in linear_sum_assignment(cost.numpy()))
    return Matching(found_a, found_b, -cost[found_a, found_b], "hungarian")


def _greedy(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A partner in b for every row of a, which has no more rows than b."""
    k = min(NEIGHBOURS, len(b))
    similarity = a.new_full((len(a), k), -1.0)
    index = torch.zeros(len(a), k, dtype=torch.int64, device=a.device)
    for rows, left, tile in _tiles(a, b):
        found, where = tile.topk(min(k, tile.shape[1]), dim=1)
        together = torch.cat([similarity[rows], found], dim=1)
        places = torch.cat([index[rows], where + left], dim=1)
        similarity[rows], chosen = together.topk(k, dim=1)
        index[rows] = places.gather(1, chosen)

    partner = torch.full((len(a),), -1, dtype=torch.int64, device=a.device)
    best = torch.zeros_like(similarity[:, 0])
    taken = torch.zeros(len(b), dtype=torch.bool, device=a.device)
    order = similarity.flatten().argsort(descending=True, stable=True)
    first, second, strength = order // k, index.flatten()[order], similarity.flatten()[order]
    while len(first):
        # A pair that is the strongest left for both of its rows is what taking pairs one by one would take as well.
        rank = torch.arange(len(first), device=a.device)
        top_a = rank.new_full((len(a),), len(first)).scatter_reduce(0, first, rank, "amin")
        top_b = rank.new_full((len(b),), len(first)).scatter_reduce(0, second, rank, "amin")
        mutual = (top_a[first] == rank) & (top_b[second] == rank)
        partner[first[mutual]], best[first[mutual]], taken[second[mutual]] = second[mutual], strength[mutual], True
        left_over = (partner[first] < 0) & ~taken[second]
        first, second, strength = first[left_over], second[left_over], strength[left_over]

    unmatched = (partner < 0).nonzero().flatten()
    unmatched = unmatched[similarity[unmatched, 0].argsort(descending=True, stable=True)]
    for rows_left in unmatched.split(max(_TILE_ELEMENTS // len(b), 1)):
        for row, cosines in zip(rows_left.tolist(), (a[rows_left] @ b.T).abs_().clamp_(max=1), strict=True):
            best[row], partner[row] = cosines.masked_fill_(taken, -1).max(dim=0)
            taken[partner[row]] = True
    return torch.arange(len(a), device=a.device), partner, best
