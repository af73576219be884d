"""Forests of features made to measure, and what they do to firing rates."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.synthetic.compensation import Compensation, compensate
from unweave.synthetic.modifier import HierarchyModifier
from unweave.synthetic.node import HierarchyNode, walk


@dataclass(frozen=True)
class HierarchyConfig:
    """How `generate_hierarchy` builds a forest.

    Args:
        total_root_nodes: Number of trees.
        branching_factor: Children of each parent: a number of at least 2, or the smallest and the largest of a range
            that every parent draws from uniformly.
        max_depth: Depth of the leaves; roots have depth 0.
        mutually_exclusive_portion: Part of the eligible parents whose children exclude one another, in [0, 1].
        mutually_exclusive_min_depth: Smallest depth of an eligible parent.
        mutually_exclusive_max_depth: Largest depth of an eligible parent; None for no limit.
        compensate_probabilities: Whether a synthetic model raises firing probabilities so that the rates after the
            hierarchy are the requested ones.
        scale_children_by_parent: Whether every parent scales its children by its own activation.

    Raises:
        UnweaveError: For a value out of range.
    """

    total_root_nodes: int = 100
    branching_factor: int | tuple[int, int] = 100
    max_depth: int = 2
    mutually_exclusive_portion: float = 0.0
    mutually_exclusive_min_depth: int = 0
    mutually_exclusive_max_depth: int | None = None
    compensate_probabilities: bool = False
    scale_children_by_parent: bool = False

    def __post_init__(self) -> None:
        _at_least("total_root_nodes", self.total_root_nodes, 1)
        if isinstance(self.branching_factor, Sequence):  # a list, where it comes from JSON
            object.__setattr__(self, "branching_factor", tuple(self.branching_factor))
        bounds = self.branching_range
        if len(bounds) != 2 or bounds[0] > bounds[1]:
            raise UnweaveError(
                f"branching_factor must be a number or a (smallest, largest) pair, got {self.branching_factor!r}."
            )
        _at_least("branching_factor", bounds[0], 2)
        _at_least("max_depth", self.max_depth, 1)
        if not 0 <= self.mutually_exclusive_portion <= 1:
            raise UnweaveError(
                f"mutually_exclusive_portion must be in [0, 1], got {self.mutually_exclusive_portion!r}."
            )
        _at_least("mutually_exclusive_min_depth", self.mutually_exclusive_min_depth, 0)
        if self.mutually_exclusive_max_depth is not None:
            _at_least(
                "mutually_exclusive_max_depth", self.mutually_exclusive_max_depth, self.mutually_exclusive_min_depth
            )

    @property
    def branching_range(self) -> tuple[int, int]:
        """Fewest and most children of a parent."""
        factor = self.branching_factor
        return factor if isinstance(factor, tuple) else (factor, factor)


class Hierarchy:
    """A forest and the modifier that applies it.

    Two hierarchies are equal if their trees are.

    Args:
        roots: The trees.
        modifier: What applies them; built from the trees if None.
        seed: Of the modifier's draws, if it is built here. None draws one from PyTorch's global state.

    Raises:
        UnweaveError: For a bad forest, see `hierarchy_modifier`.
    """

    __hash__ = None  # type: ignore[assignment]  # trees are mutable, and equal by structure

    def __init__(
        self, roots: Sequence[HierarchyNode], modifier: HierarchyModifier | None = None, *, seed: int | None = None
    ) -> None:
        self.roots = list(roots)
        self.modifier = HierarchyModifier(self.roots, seed) if modifier is None else modifier

    @property
    def feature_indices_used(self) -> set[int]:
        """The features that have a place in the forest."""
        return {node.feature_index for node, _, _ in walk(self.roots) if node.feature_index is not None}

    def compensate(self, probabilities: Float[Tensor, " num_features"]) -> Compensation:
        """Firing probabilities that leave each feature the requested rate; see `compensation.compensate`."""
        return compensate(self.roots, probabilities)

    def compute_probability_correction_factors(
        self, base_probabilities: Float[Tensor, " num_features"]
    ) -> Float[Tensor, " num_features"]:
        """What to multiply requested rates by to get the probabilities to fire with.

        At least 1 for a feature below another one or in an exclusive group, unless its request cannot be met; 1 for
        all others. See `compensation.compensate` for what is exact, what cannot be met, and errors.
        """
        exact = base_probabilities.to(torch.float64)
        return (self.compensate(exact).firing_probabilities / exact).to(base_probabilities.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `from_dict`: `roots`, and `seed` of the modifier."""
        return {"roots": [root.to_dict() for root in self.roots], "seed": self.modifier.seed}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Hierarchy:
        """The hierarchy that `to_dict` wrote, its draws at their start.

        Args:
            data: `roots`, and `seed` unless the file is SAELens', which has none.

        Raises:
            UnweaveError: For a bad forest or a missing `roots`.
        """
        if "roots" not in data:
            raise UnweaveError(f"a hierarchy needs the key 'roots', got {sorted(map(str, data))}.")
        return cls([HierarchyNode.from_dict(root) for root in data["roots"]], seed=data.get("seed"))

    def __eq__(self, other: object) -> bool:
        return self.roots == other.roots if isinstance(other, Hierarchy) else NotImplemented

    def __repr__(self) -> str:
        n = len(self.feature_indices_used)
        return f"Hierarchy({len(self.roots)} trees, {n} features, seed={self.modifier.seed})"


def generate_hierarchy(num_features: int, config: HierarchyConfig, seed: int | None = None) -> Hierarchy:
    """A forest over the first features.

    Indices are handed out breadth first, roots first, until the depth is reached or the features run out; features
    that are left stay free. Of the parents with at least 2 children in the range of depths, the portion asked for,
    rounded down and drawn at random, gets exclusive children.

    Args:
        num_features: Number of features.
        config: Shape of the forest.
        seed: Of everything drawn, and of the modifier's draws. None draws one from PyTorch's global state.

    Raises:
        UnweaveError: For num_features below 1.
    """
    _at_least("num_features", num_features, 1)
    seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
    rng = torch.Generator().manual_seed(seed)
    few, many = config.branching_range
    last = config.mutually_exclusive_max_depth
    used = min(config.total_root_nodes, num_features)
    roots = level = [HierarchyNode(i) for i in range(used)]
    eligible: list[HierarchyNode] = []
    for depth in range(config.max_depth):
        parents: list[HierarchyNode] = []
        for node, n in zip(level, torch.randint(few, many + 1, (len(level),), generator=rng).tolist(), strict=True):
            end = min(used + n, num_features)
            node.children = [HierarchyNode(i) for i in range(used, end)]
            used = end
            if node.children:
                node.scale_children_by_parent = config.scale_children_by_parent
                parents.append(node)
        if depth >= config.mutually_exclusive_min_depth and (last is None or depth <= last):
            eligible += [node for node in parents if len(node.children) >= 2]
        level = [child for node in parents for child in node.children]
    drawn = torch.randperm(len(eligible), generator=rng)[: int(config.mutually_exclusive_portion * len(eligible))]
    for i in drawn.tolist():
        eligible[i].mutually_exclusive_children = True
    return Hierarchy(roots, seed=int(torch.randint(2**63 - 1, (), generator=rng)))


def _at_least(name: str, value: object, least: int) -> None:
    try:
        fine = operator.index(value) >= least  # type: ignore[arg-type]
    except TypeError:
        fine = False
    if not fine:
        raise UnweaveError(f"{name} must be an integer of at least {least}, got {value!r}.")
