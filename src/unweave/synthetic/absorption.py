"""What becomes of a hierarchy in an SAE: parents that are absorbed by their children, parents that are split.

A child fires only where its parent fires, so an SAE saves a latent by letting the child's latent write the parent's
direction as well. The parent's latent then has a hole where the child fires: it is absorbed (Chanin et al., arXiv
2409.14507). Split is a parent whose firing is spread over several latents.

"Parent" is the nearest ancestor with a feature of its own, "its latent" the one that it is matched with one to one, if
there is one; a parent without is never recalled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae import SparseCodes
from unweave.synthetic.classification import ClassificationMetricsCalculator
from unweave.synthetic.joint import as_codes, check_same_rows, values_at
from unweave.synthetic.matching import Matching
from unweave.synthetic.node import HierarchyNode, walk

if TYPE_CHECKING:
    from unweave.synthetic.hierarchy import Hierarchy


@dataclass(frozen=True)
class HierarchyScores:
    """Absorption and splitting, as means over the edges (parent, child) or the parents for which they are defined.

    None where there is no such edge or parent.

    Attributes:
        num_edges: Pairs of a parent and a child that were active together.
        num_parents: Features with children that were active at all.
        parent_recall_given_child: Of the samples on which an edge's child and parent are active, the share on which
            the parent's latent fires. Low is absorbed (or the parent was not found at all: see the next).
        parent_recall_alone: Of the samples on which a parent is active and none of its children, the share on which
            its latent fires.
        absorption: Mean over edges of the parent's recall alone minus its recall given the child: 0 for none, 1 for a
            parent's latent that fires exactly where the child does not.
        latents_per_parent: Live latents whose best-matching feature is the parent; 1 is ideal.
        split_parents: Share of the parents with more than one such latent.
        firing_spread: Over how many of these latents a parent's firing is spread: `(Σ n_i)² / Σ n_i²` with `n_i` the
            samples on which latent i and the parent are active. 1 for one latent, 2 for two that fire equally often;
            parents without any are left out.
    """

    num_edges: int
    num_parents: int
    parent_recall_given_child: float | None
    parent_recall_alone: float | None
    absorption: float | None
    latents_per_parent: float | None
    split_parents: float | None
    firing_spread: float | None


def parent_features(
    hierarchy: Hierarchy | HierarchyNode | Sequence[HierarchyNode], num_features: int
) -> Int64[Tensor, " num_features"]:
    """The parent of each feature: its nearest ancestor with a feature of its own, -1 if there is none.

    Args:
        hierarchy: A `Hierarchy`, a node, or a sequence of nodes.
        num_features: Number of features.

    Raises:
        UnweaveError: If the trees are no valid hierarchy, or an index is outside the dictionary.
    """
    if isinstance(hierarchy, HierarchyNode):
        placed = walk([hierarchy])
    else:
        placed = walk(hierarchy if isinstance(hierarchy, Sequence) else hierarchy.roots)
    nearest: list[int] = []  # of each node: its own feature, or that of the nearest ancestor with one
    parents = torch.full((num_features,), -1, dtype=torch.int64)
    for node, above, _ in placed:
        ancestor = nearest[above] if above >= 0 else -1
        if node.feature_index is None:
            nearest.append(ancestor)
            continue
        if node.feature_index >= num_features:
            raise UnweaveError(
                f"the hierarchy has feature index {node.feature_index}, and there are {num_features} features."
            )
        parents[node.feature_index] = ancestor
        nearest.append(node.feature_index)
    return parents


class HierarchyCalculator:
    """Counts over batches, from which absorption follows; splitting follows from the classification's counts.

    Args:
        hierarchy: A `Hierarchy`, a node, or a sequence of nodes.
        matching: Latents (`a`) and the features (`b`) that they are matched with.
        num_latents: Number of latents.
        num_features: Number of true features.
    """

    def __init__(
        self,
        hierarchy: Hierarchy | HierarchyNode | Sequence[HierarchyNode],
        matching: Matching,
        num_latents: int,
        num_features: int,
    ) -> None:
        device = matching.a.device
        self.num_latents = num_latents
        self.parent_of = parent_features(hierarchy, num_features).to(device)
        self.latent_of = matching.a.new_full((num_features,), -1).index_put((matching.b,), matching.a)
        zeros = self.parent_of.new_zeros(num_features)
        self.with_child, self.recalled_with_child = zeros.clone(), zeros.clone()
        """By child: samples on which it and its parent are active, and those of them that the parent's latent is."""
        self.alone, self.recalled_alone = zeros.clone(), zeros.clone()
        """By parent: samples on which it is active and no child of it, and those of them that its latent is."""

    def add_batch(self, sae_latents: Tensor | SparseCodes, gt_feature_acts: Tensor | SparseCodes) -> None:
        """Add the codes `(n, m)` and the true activations `(n, f)` of the same samples: dense, COO or `SparseCodes`."""
        latents, features = (as_codes(x).to(self.parent_of.device) for x in (sae_latents, gt_feature_acts))
        n_features = len(self.parent_of)
        check_same_rows(latents, features, self.num_latents, n_features)
        features = features.where(features.values > 0)
        rows, indices = features.rows, features.indices

        parents = self.parent_of[indices]
        edge = values_at(features, rows, parents) > 0  # a child whose parent is active too
        rows_edge, parent, child = rows[edge], parents[edge], indices[edge]
        recalled = values_at(latents, rows_edge, self.latent_of[parent]) != 0
        self.with_child += torch.bincount(child, minlength=n_features)
        self.recalled_with_child += torch.bincount(child[recalled], minlength=n_features)

        accompanied = torch.isin(rows * n_features + indices, rows_edge * n_features + parent)
        rows, indices = rows[~accompanied], indices[~accompanied]
        recalled = values_at(latents, rows, self.latent_of[indices]) != 0
        self.alone += torch.bincount(indices, minlength=n_features)
        self.recalled_alone += torch.bincount(indices[recalled], minlength=n_features)

    def compute(self, classification: ClassificationMetricsCalculator) -> HierarchyScores:
        """The scores.

        Args:
            classification: The counts of the same samples, for splitting.
        """
        recall_with_child = self.recalled_with_child.double() / self.with_child  # NaN where undefined
        recall_alone = self.recalled_alone.double() / self.alone
        child = (self.with_child > 0).nonzero().flatten()
        is_parent = torch.zeros_like(self.parent_of, dtype=torch.bool)
        is_parent[self.parent_of[self.parent_of >= 0]] = True
        present = classification.present.to(self.parent_of.device)
        parents = (is_parent & (present > 0)).nonzero().flatten()

        best, live = classification.best.to(parents.device), classification.live.to(parents.device)
        hits = classification.true_positives.to(parents.device).double()
        n_features = len(self.parent_of)
        n_latents = torch.bincount(best[live], minlength=n_features)[parents].double()
        total = torch.bincount(best, weights=hits, minlength=n_features)[parents]
        squares = torch.bincount(best, weights=hits.square(), minlength=n_features)[parents]
        return HierarchyScores(
            num_edges=len(child),
            num_parents=len(parents),
            parent_recall_given_child=_mean(recall_with_child[child]),
            parent_recall_alone=_mean(recall_alone[parents]),
            absorption=_mean(recall_alone[self.parent_of[child]] - recall_with_child[child]),
            latents_per_parent=_mean(n_latents),
            split_parents=_mean((n_latents > 1).double()),
            firing_spread=_mean(total.square() / squares),
        )


def _mean(values: Float64[Tensor, " n"]) -> float | None:
    """Mean of the values that are defined."""
    values = values.double()
    values = values[~values.isnan()]
    return float(values.mean()) if len(values) else None
