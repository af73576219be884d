"""Absorption and splitting of hierarchies, on codes in which both are known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.sae import SparseCodes
from unweave.synthetic.absorption import HierarchyCalculator, parent_features
from unweave.synthetic.classification import ClassificationMetricsCalculator
from unweave.synthetic.matching import match
from unweave.synthetic.node import HierarchyNode

# Feature 0 is the parent of 1 and 2, through an organisational node of 3 as well; 4 is free.
TREE = HierarchyNode(0, [HierarchyNode(1), HierarchyNode(2), HierarchyNode(None, [HierarchyNode(3)])])


def truth(n=2000, seed=0):
    """Feature 0 on half of the samples, its children on a fifth of those, a free one."""
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(n, 5, generator=generator) < torch.tensor([0.5, 0.2, 0.2, 0.2, 0.3])
    fires[:, 1:4] &= fires[:, :1]
    return fires.float()


def scores(codes, acts, decoder, features=None, tree=TREE):
    features = torch.eye(5) if features is None else features
    classification = ClassificationMetricsCalculator(decoder, features)
    calculator = HierarchyCalculator(tree, match(decoder, features), len(decoder), len(features))
    half = len(codes) // 2
    for part in (slice(0, half), slice(half, None)):
        classification.add_batch(codes[part], acts[part])
        calculator.add_batch(SparseCodes.from_dense(codes[part]), acts[part])
    return calculator.compute(classification)


def test_parents_are_the_nearest_ancestors_with_a_feature():
    assert parent_features(TREE, 5).tolist() == [-1, 0, 0, 0, -1]
    deep = HierarchyNode(None, [HierarchyNode(2, [HierarchyNode(0)]), HierarchyNode(3)])
    assert parent_features([deep, HierarchyNode(4)], 5).tolist() == [2, -1, -1, -1, -1]
    with pytest.raises(UnweaveError, match="index 3, and there are 3"):
        parent_features(TREE, 3)


def test_the_truth_is_neither_absorbed_nor_split():
    acts = truth()
    result = scores(acts, acts, torch.eye(5))
    assert (result.num_edges, result.num_parents) == (3, 1)
    assert result.parent_recall_given_child == result.parent_recall_alone == 1
    assert result.absorption == 0
    assert (result.latents_per_parent, result.split_parents, result.firing_spread) == (1, 0, 1)


def test_a_parent_absorbed_by_one_child():
    acts = truth()
    codes = acts.clone()
    codes[:, 0] *= acts[:, 1] == 0
    result = scores(codes, acts, torch.eye(5))
    assert result.parent_recall_alone == 1
    # Of child 1 nothing is left, of the others what does not go together with child 1.
    others = [float((acts[acts[:, c] > 0, 1] == 0).double().mean()) for c in (2, 3)]
    assert result.parent_recall_given_child == pytest.approx(sum(others) / 3)
    assert result.absorption == pytest.approx(1 - sum(others) / 3)


def test_a_parent_that_is_not_found_is_not_absorbed():
    acts = truth()
    codes = acts.clone()
    codes[:, 0] = 0
    result = scores(codes, acts, torch.eye(5))
    assert result.parent_recall_alone == result.parent_recall_given_child == result.absorption == 0
    assert result.latents_per_parent == 0
    assert result.firing_spread is None
    fewer = scores(acts[:, 1:], acts, torch.eye(5)[1:])  # no latent is left to match the parent
    assert fewer.parent_recall_given_child == 0


def test_a_parent_split_in_two():
    acts = truth()
    even = (torch.arange(len(acts)) % 2 == 0).float()
    codes = torch.cat([acts[:, :1] * even[:, None], acts[:, 1:], acts[:, :1] * (1 - even)[:, None]], dim=1)
    decoder = torch.cat([torch.eye(5), torch.eye(5)[:1]])
    result = scores(codes, acts, decoder)
    assert (result.latents_per_parent, result.split_parents) == (2, 1)
    counts = [float((codes[:, i] > 0).sum()) for i in (0, 5)]
    assert result.firing_spread == pytest.approx(sum(counts) ** 2 / sum(c * c for c in counts))
    assert result.firing_spread > 1.9
    quiet = scores(torch.cat([acts, torch.zeros(len(acts), 1)], dim=1), acts, decoder)
    assert (quiet.latents_per_parent, quiet.split_parents, quiet.firing_spread) == (1, 0, 1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), density=st.sampled_from([0.0, 0.1, 0.5]))
def test_counts_equal_dense_ones(seed, density):
    """On codes and activations of no structure at all, with a two-level tree."""
    generator = torch.Generator().manual_seed(seed)
    acts, codes = ((torch.rand(30, 5, generator=generator) < density).float() for _ in range(2))
    tree = HierarchyNode(3, [HierarchyNode(0, [HierarchyNode(4)]), HierarchyNode(1)])
    parents, children = {0: 3, 4: 0, 1: 3}, {3: [0, 1], 0: [4]}
    decoder = torch.randn(5, 6, generator=generator)
    features = torch.randn(5, 6, generator=generator)
    latent = {int(b): int(a) for a, b in zip(*match(decoder, features)[:2], strict=True)}
    given_child, alone = {}, {}
    for c, p in parents.items():
        where = (acts[:, c] > 0) & (acts[:, p] > 0)
        if where.any():
            given_child[c] = float((codes[where, latent[p]] != 0).double().mean())
    for p, below in children.items():
        where = (acts[:, p] > 0) & ~(acts[:, below] > 0).any(1)
        if where.any():
            alone[p] = float((codes[where, latent[p]] != 0).double().mean())
    differences = [alone[parents[c]] - r for c, r in given_child.items() if parents[c] in alone]

    def mean(values):
        return pytest.approx(sum(values) / len(values)) if values else None

    result = scores(codes, acts, decoder, features, tree)
    assert result.num_edges == len(given_child)
    assert result.num_parents == sum(bool(acts[:, p].any()) for p in children)
    assert result.parent_recall_given_child == mean(list(given_child.values()))
    assert result.parent_recall_alone == mean(list(alone.values()))
    assert result.absorption == mean(differences)
