"""Which features fire: cells (row, feature) drawn one by one, at a cost that follows what fires, not rows × features.

A cell is the number `row * n_features + feature`. Every sampler returns the cells that fire in ascending order, each
at most once, for probabilities that it was made with. All of it runs on the CPU, whatever device the activations are
for: a seed then gives the same stream on every device.

Independent features ride on a Poisson process: a stretch of length `-log(1 - p)` holds no point with probability
`1 - p`, so points that fall on the features' stretches, laid end to end, fire each feature with exactly its own p,
independently. Points of such a process are cheap to draw already sorted.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Cells = Int64[Tensor, " nnz"]

OFTEN = 0.5  # above it, drawing every cell costs no more than twice what fires
# Few enough to stay in cache, for float64 to place them well within the narrowest stretches, and for PyTorch to use one
# thread: with more of them, so many small steps would mostly wait for each other.
_POINTS_AT_ONCE = 30_000
_BELOW_ONE = 1 - 2.0**-53


class Firing(Protocol):
    """A way to draw which features fire."""

    def draw(self, n_rows: int, rng: torch.Generator) -> Cells:
        """The cells that fire on the next `n_rows` rows."""
        ...


def sorted_points(length: float, rng: torch.Generator) -> Float[Tensor, " n"]:
    """Points of a Poisson process of rate 1 on [0, length), ascending, float64.

    Their number is a Poisson draw; given it, points are uniform, and sorted uniform points are the normalised partial
    sums of exponential gaps.
    """
    n = int(torch.poisson(torch.tensor([length], dtype=torch.float64), generator=rng))
    ends = torch.rand(n + 1, dtype=torch.float64, generator=rng).neg_().log1p_().cumsum_(0)
    return ends[:-1].mul_(length / ends[-1]).clamp_(max=length * _BELOW_ONE)


def union(*parts: Cells) -> Cells:
    """The cells of all parts, ascending, each once."""
    parts = tuple(part for part in parts if len(part))
    cells = parts[0] if len(parts) == 1 else torch.cat(parts).sort().values if parts else torch.empty(0).long()
    return torch.unique_consecutive(cells)


class Independent:
    """Features that fire independently of one another.

    Args:
        probabilities: Of each feature, in (0, 1].
    """

    def __init__(self, probabilities: Float[Tensor, " n_features"]) -> None:
        p = probabilities.detach().cpu()
        self.n_features = len(p)
        self._often = (p > OFTEN).nonzero().squeeze(1)
        self._p_often = p[self._often].float()  # uniform floats have 24 bits, as floats from 0.5 to 1 have
        stretches = -torch.log1p(-p.double().masked_fill(p > OFTEN, 0.0))
        ends = stretches.cumsum(0)
        self._length = float(ends[-1])
        if self._length:
            self._ends = ends / ends[-1]
            # Looking up where a point's bin begins spares most points the search.
            self._n_bins = 1 << min(22, (8 * self.n_features - 1).bit_length())
            bins = torch.arange(self._n_bins, dtype=torch.float64) / self._n_bins
            self._first = torch.searchsorted(self._ends, bins, right=True)

    def draw(self, n_rows: int, rng: torch.Generator) -> Cells:
        """The cells that fire on the next `n_rows` rows."""
        rare = torch.empty(0, dtype=torch.int64)
        if self._length:
            step = max(1, int(_POINTS_AT_ONCE / self._length))
            parts = [self._rare(start, min(step, n_rows - start), rng) for start in range(0, n_rows, step)]
            rare = torch.cat(parts) if parts else rare
        if not len(self._often):
            return rare
        step = max(1, _POINTS_AT_ONCE * 16 // len(self._often))
        parts = [self._frequent(start, min(step, n_rows - start), rng) for start in range(0, n_rows, step)]
        return union(rare, *parts)

    def _rare(self, start: int, n_rows: int, rng: torch.Generator) -> Cells:
        within = sorted_points(n_rows * self._length, rng).div_(self._length)
        rows = within.long().clamp_(max=n_rows - 1)
        within = within.sub_(rows).clamp_(max=_BELOW_ONE)
        features = self._first.index_select(0, (within * self._n_bins).long())
        further = (self._ends.index_select(0, features) <= within).nonzero().squeeze(1)
        features[further] = torch.searchsorted(self._ends, within[further], right=True)
        return torch.unique_consecutive(rows.add_(start).mul_(self.n_features).add_(features))

    def _frequent(self, start: int, n_rows: int, rng: torch.Generator) -> Cells:
        rows, which = (torch.rand(n_rows, len(self._often), generator=rng) < self._p_often).nonzero().unbind(1)
        return (rows + start) * self.n_features + self._often[which]
