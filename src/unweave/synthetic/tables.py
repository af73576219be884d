"""A forest as vectors: what the modifier and the compensation compute with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from unweave.synthetic.node import Placed


class Tables(NamedTuple):
    """A forest by feature."""

    level: Int[Tensor, " num_features"]
    """How many ancestors with a feature; -1 for features that the forest leaves alone."""
    parent: Int64[Tensor, " num_features"]
    """The nearest ancestor with a feature; -1 if there is none."""
    group: Int64[Tensor, " num_features"]
    """Which set of mutually exclusive features it belongs to; -1 for none."""
    scaled: Bool[Tensor, " num_features"]
    """Whether it is multiplied by its parent's activation over the parent's mean magnitude."""

    def padded(self, num_features: int) -> Tables:
        """The tables, as long as the activations."""
        missing = num_features - len(self.level)
        pad = torch.nn.functional.pad
        return Tables(*(pad(t, (0, missing), value=0 if t is self.scaled else -1) for t in self))

    def to(self, device: torch.device) -> Tables:
        """The tables elsewhere."""
        return Tables(*(t.to(device) for t in self))


class Level(NamedTuple):
    """The features that have the same number of ancestors."""

    features: Int64[Tensor, " n"]
    """Ascending."""
    parents: Int64[Tensor, " n"]
    scaled: Bool[Tensor, " n"]
    competing: Int64[Tensor, " n_competing"]
    """Those of them that belong to an exclusive set, set by set, ascending within one."""
    groups: Int64[Tensor, " n_competing"]
    """Which set that is."""
    first: int | None
    """The first feature if none is missing up to the last; then a slice of the activations does without a copy."""
    has_parents: bool
    has_scaled: bool

    def to(self, device: torch.device) -> Level:
        """The level elsewhere."""
        return Level(*(t.to(device) if isinstance(t, Tensor) else t for t in self))  # type: ignore[arg-type]


def tabulate(placed: Sequence[Placed]) -> Tables:
    """The tables of a forest, as long as its largest index.

    Args:
        placed: The forest, as `walk` returns it.
    """
    size = 1 + max((node.feature_index for node, _, _ in placed if node.feature_index is not None), default=-1)
    level, parent, group, scaled = [-1] * size, [-1] * size, [-1] * size, [False] * size
    n_groups = 0
    nearest: list[int] = []  # of each node: the nearest feature at or above it
    depth: list[int] = []  # of each node: how many features there are at or above it
    group_below: list[int] = []
    for node, up, _ in placed:
        ancestor, n_above, own = (nearest[up], depth[up], group_below[up]) if up >= 0 else (-1, 0, -1)
        f = node.feature_index
        if f is not None:
            parent[f], group[f] = ancestor, own
            scaled[f] = ancestor >= 0 and placed[up].node.scale_children_by_parent
            level[f] = n_above if ancestor >= 0 or own >= 0 else -1
        nearest.append(ancestor if f is None else f)
        depth.append(n_above + (f is not None))
        contest = node.mutually_exclusive_children and sum(c.feature_index is not None for c in node.children) > 1
        group_below.append(n_groups if contest else -1)
        n_groups += contest
    narrow = torch.int16 if max(level, default=0) < 2**15 else torch.int32  # sorting by level costs per byte
    return Tables(
        torch.tensor(level, dtype=narrow),
        torch.tensor(parent, dtype=torch.int64),
        torch.tensor(group, dtype=torch.int64),
        torch.tensor(scaled, dtype=torch.bool),
    )


def split_levels(tables: Tables) -> list[Level]:
    """The forest level by level, from the roots."""
    depth, order = tables.level.sort(stable=True)
    found = []
    for features in order.split(torch.bincount(depth + 1).tolist())[1:]:
        if not len(features):
            continue
        competing = features[tables.group[features] >= 0]
        competing = competing[tables.group[competing].argsort(stable=True)]
        first, last = features[[0, -1]].tolist()
        found.append(Level(
            features=features,
            parents=tables.parent[features],
            scaled=tables.scaled[features],
            competing=competing,
            groups=tables.group[competing],
            first=first if last - first + 1 == len(features) else None,
            has_parents=int(tables.level[first]) > 0,
            has_scaled=bool(tables.scaled[features].any()),
        ))  # fmt: skip
    return found
