"""The hierarchy applied to activations: children gated or scaled by their parents, one survivor among exclusive ones.

There is no loop over samples or nodes, only one over levels. Dense activations are taken as columns, whatever their
density; COO tensors and `SparseCodes` as entries, so that a million features cost what their active entries do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae.codes import SparseCodes
from unweave.synthetic.node import HierarchyNode, describe, walk
from unweave.synthetic.tables import Level, Tables, split_levels, tabulate

Batch = TypeVar("Batch", Tensor, SparseCodes)

CACHED = {"dense": 1 << 20, "sparse": 1 << 16}
"""On the CPU, samples are taken in parts of so many activations or entries: what stays in cache is several times as
fast as fresh memory."""


class HasMagnitudes(Protocol):
    """What scaling by the parent asks of the second argument; an `ActivationGenerator` has it."""

    @property
    def mean_firing_magnitudes(self) -> Float[Tensor, " num_features"]:
        """Mean magnitude of each feature where it fires."""


class _Call(NamedTuple):
    """What one call needs, where the batch is."""

    tables: Tables
    levels: list[Level]
    means: Float[Tensor, " num_features"] | None
    """None if no node scales."""
    key: int
    """Of this call's draws."""


def hierarchy_modifier(roots: HierarchyNode | Sequence[HierarchyNode], seed: int | None = None) -> HierarchyModifier:
    """The modifier of a forest; see `HierarchyModifier`. An empty sequence gives one that changes nothing.

    Raises:
        UnweaveError: For a loop, a node with two parents, a feature index that occurs twice, or exclusion among fewer
            than two children.
    """
    return HierarchyModifier(roots, seed)


class HierarchyModifier:
    """Makes activations obey a hierarchy.

    A feature is active where its activation is above 0. Level by level from the roots: a child whose parent is
    inactive becomes 0, or is multiplied by the parent's activation over the parent's mean magnitude where the node
    above it has `scale_children_by_parent`; then one of the active children of each exclusive node is drawn uniformly
    and the others become 0; then the next level sees what is left.

    The same seed draws the same survivors call by call, whatever the form, the dtype and the device of the batch.

    Args:
        roots: One tree, or several.
        seed: Of the draws. None draws one from PyTorch's global state; it is kept as `seed`.

    Raises:
        UnweaveError: See `hierarchy_modifier`.
    """

    takes_codes = True
    """An `ActivationGenerator` may hand over `SparseCodes` as they are."""

    def __init__(self, roots: HierarchyNode | Sequence[HierarchyNode], seed: int | None = None) -> None:
        self._placed = walk([roots] if isinstance(roots, HierarchyNode) else list(roots))
        self._tables = tabulate(self._placed)
        self._levels = split_levels(self._tables)
        self._n_groups = 1 + max(self._tables.group.tolist(), default=-1)
        self._scaling = self._tables.parent[self._tables.scaled].unique()
        self._ready: tuple[torch.device, int, Tables, list[Level]] | None = None
        self._start(seed)

    def _start(self, seed: int | None) -> None:
        self.seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        self._rng = torch.Generator().manual_seed(self.seed)

    def fork(self, seed: int | None = None) -> HierarchyModifier:
        """The same hierarchy with draws of its own, from their start."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._start(seed)
        return other

    def __call__(self, batch: Batch, generator: HasMagnitudes | None = None) -> Batch:
        """Apply the hierarchy.

        Args:
            batch: Activations, `(n, num_features)`: a dense tensor, a COO tensor, or `SparseCodes`.
            generator: Where scaling finds `mean_firing_magnitudes`, `(num_features,)`; needed only if a node scales.

        Returns:
            The same kind as the batch, which is left as it is. Of COO tensors and codes, entries that are 0 are gone.

        Raises:
            UnweaveError: For a batch of another shape or layout, a feature outside it, or scaling without positive
                mean magnitudes.
        """
        if isinstance(batch, SparseCodes):
            call = self._prepare(batch.d_sae, batch.values, generator)
            return batch.with_values(self._sparse(batch.rows, batch.indices, batch.values, call)).firing()
        if batch.ndim != 2 or batch.layout not in (torch.strided, torch.sparse_coo):
            raise UnweaveError(
                "a hierarchy applies to a dense or COO tensor (n, num_features) or to SparseCodes, got a "
                f"{batch.layout} tensor of shape {tuple(batch.shape)}."
            )
        call = self._prepare(batch.shape[1], batch, generator)
        if batch.layout == torch.strided:
            return self._dense(batch, call)
        batch = batch.coalesce()
        index = batch.indices()
        values = self._sparse(index[0], index[1], batch.values(), call)
        keep = values.nonzero().squeeze(1)
        index, values = index[:, keep], values[keep]
        return torch.sparse_coo_tensor(index, values, batch.shape, is_coalesced=True, check_invariants=False)

    def _dense(self, batch: Float[Tensor, "n k"], call: _Call) -> Float[Tensor, "n k"]:
        out = torch.empty_like(batch, memory_format=torch.contiguous_format)
        n, k = batch.shape
        size = max(1, CACHED["dense"] // max(k, 1) if batch.is_cpu else n)
        for start in range(0, n, size):
            part = out[start : start + size].copy_(batch[start : start + size])
            for level in call.levels:
                self._gate(part, level, call.means)
                if len(level.competing):
                    row, at = (part.index_select(1, level.competing) > 0).nonzero(as_tuple=True)
                    lost = self._lost((row + start) * self._n_groups + level.groups[at], call.key)
                    part[row[lost], level.competing[at[lost]]] = 0
        return out

    @staticmethod
    def _gate(part: Float[Tensor, "n k"], level: Level, means: Float[Tensor, " k"] | None) -> None:
        """Gate and scale the columns of a level, in place."""
        if not level.has_parents:
            return
        whole, n = level.first is not None, len(level.features)
        children = part.narrow(1, level.first or 0, n) if whole else part.index_select(1, level.features)
        parents = part.index_select(1, level.parents)
        silent = parents <= 0
        if level.has_scaled and means is not None:
            children *= torch.where(level.scaled, parents / means[level.parents], 1)
        children.masked_fill_(silent, 0)
        if not whole:
            part.index_copy_(1, level.features, children)

    def _sparse(
        self, rows: Int64[Tensor, " nnz"], features: Int64[Tensor, " nnz"], values: Float[Tensor, " nnz"], call: _Call
    ) -> Float[Tensor, " nnz"]:
        out = values.clone()
        for start, end in _parts(rows):
            self._descend(rows[start:end], features[start:end], out[start:end], call)
        return out

    def _descend(
        self, rows: Int64[Tensor, " n"], features: Int64[Tensor, " n"], values: Float[Tensor, " n"], call: _Call
    ) -> None:
        """Gate, scale and draw among the entries of some samples, in place.

        Args:
            rows: Ascending.
            features: Ascending within a sample.
        """
        tables, means = call.tables, call.means
        keys = rows * len(tables.level) + features  # ascending, so that the parent of an entry is found by bisection
        depth, order = tables.level[features].sort(stable=True)
        by_depth = order.split(torch.bincount(depth + 1).tolist())[1:]  # the first are those left alone
        for level, at in enumerate(by_depth):
            feature = features[at]
            if level:
                parent = tables.parent[feature]
                wanted = keys[at] - feature + parent
                found = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
                above = values[found].where(keys[found] == wanted, 0)
                own = values[at]
                if means is not None:
                    own = own * torch.where(tables.scaled[feature], above / means[parent], 1)
                values[at] = own.masked_fill_(above <= 0, 0)
            if self._n_groups:
                group = tables.group[feature]
                competing = ((group >= 0) & (values[at] > 0)).nonzero().squeeze(1)
                at = at[competing]
                contest, by_contest = (rows[at] * self._n_groups + group[competing]).sort(stable=True)
                values[at[by_contest[self._lost(contest, call.key)]]] = 0

    @staticmethod
    def _lost(contests: Int64[Tensor, " n"], key: int) -> Bool[Tensor, " n"]:
        """Which entries lose: in each run of equal, ascending numbers all but one, drawn uniformly."""
        found, counts = contests.unique_consecutive(return_counts=True)
        contested = (counts > 1).nonzero().squeeze(1)
        lost = (counts > 1).repeat_interleave(counts, output_size=len(contests))
        sizes = counts[contested]
        winner = (_mix(found[contested], key) * sizes) >> 32
        lost[(counts.cumsum(0) - counts)[contested] + winner] = False
        return lost

    def _prepare(self, k: int, like: Tensor, generator: HasMagnitudes | None) -> _Call:
        if self._ready is None or self._ready[:2] != (like.device, k):
            if k < len(self._tables.level):
                largest = self._describe(len(self._tables.level) - 1)
                raise UnweaveError(f"{largest} is outside activations of {k} features.")
            tables = self._tables.padded(k).to(like.device)
            self._ready = (like.device, k, tables, [level.to(like.device) for level in self._levels])
        key = int(torch.randint(2**63 - 1, (), generator=self._rng))
        return _Call(*self._ready[2:], self._means(k, like, generator), key)

    def _means(self, k: int, like: Tensor, generator: HasMagnitudes | None) -> Float[Tensor, " k"] | None:
        if not len(self._scaling):
            return None
        if generator is None:
            raise UnweaveError(
                f"{self._describe(int(self._scaling[0]))} scales what is below it by its mean firing magnitude; "
                "give the modifier the ActivationGenerator as its second argument."
            )
        means = generator.mean_firing_magnitudes.to(like.device, like.dtype)
        if means.shape != (k,):
            raise UnweaveError(f"mean_firing_magnitudes must have shape ({k},), got {tuple(means.shape)}.")
        used = means[self._scaling.to(like.device)]
        if not bool((used > 0).all()):
            f = int(self._scaling[int((used > 0).int().argmin())])
            raise UnweaveError(
                f"{self._describe(f)} scales what is below it, so its mean firing magnitude must be above 0, "
                f"got {float(means[f]):g}."
            )
        return means

    def _describe(self, feature: int) -> str:
        return describe(self._placed, next(i for i, p in enumerate(self._placed) if p.node.feature_index == feature))


def _parts(rows: Int64[Tensor, " nnz"]) -> Iterator[tuple[int, int]]:
    """Cuts between samples, so that a part stays in cache."""
    n = len(rows)
    cuts = rows[:: CACHED["sparse"]].contiguous() if rows.is_cpu else rows[:1]
    bounds = [*torch.searchsorted(rows, cuts).unique().tolist(), n]
    return pairwise(bounds)


def _mix(numbers: Int64[Tensor, " n"], key: int) -> Int64[Tensor, " n"]:
    """32 random bits for each number: SplitMix64 of `key` at these steps (Steele, Lea and Flood, 2014).

    A hash rather than a generator, because then a draw depends on the sample and the contest alone, not on the form of
    the batch or the device it is on.
    """
    z = numbers * _signed(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return _shifted(z ^ _shifted(z, 31), 32)


def _shifted(bits: Int64[Tensor, " n"], by: int) -> Int64[Tensor, " n"]:
    """A shift to the right that takes in zeros, where int64 takes in its sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    """The int64 with the same bits as an unsigned number."""
    return number - (number >> 63 << 64)
