"""Hierarchies as sae-lens has them: equal results where nothing is drawn, equal shapes and rates where something is."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from unweave import SparseCodes
from unweave.synthetic.hierarchy import Hierarchy, HierarchyConfig, generate_hierarchy
from unweave.synthetic.node import HierarchyNode

# sae-lens warns while it is imported, which is no concern of ours.
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

K = 60


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    import sae_lens.synthetic

    return sae_lens.synthetic


def tree_for_them(tree: dict[str, Any]) -> dict[str, Any]:
    """`feature_id` spelt `id`, as their nodes read it."""
    children = [tree_for_them(child) for child in tree["children"]]
    return {**{k: v for k, v in tree.items() if k != "feature_id"}, "id": tree["feature_id"], "children": children}


def their_modifier(theirs: ModuleType, roots: list[HierarchyNode]) -> Any:
    return theirs.hierarchy_modifier([theirs.HierarchyNode.from_dict(tree_for_them(r.to_dict())) for r in roots])


def random_forest(seed: int, exclusive: bool = False, scale: bool = False) -> list[HierarchyNode]:
    """Trees over shuffled indices, with organisational nodes at any depth."""
    rng = torch.Generator().manual_seed(seed)
    indices = torch.randperm(K, generator=rng).tolist()[: K - 10]
    nodes: list[HierarchyNode] = []
    roots: list[HierarchyNode] = []
    for index in indices:
        a, b, c = torch.rand(3, generator=rng).tolist()
        node = HierarchyNode(None if a < 0.15 else index, scale_children_by_parent=scale and c < 0.5)
        (nodes[int(b * len(nodes))].children if nodes and c > 0.1 else roots).append(node)
        nodes.append(node)
    for node in nodes:
        node.mutually_exclusive_children = exclusive and len(node.children) > 1
    return roots


def activations(n: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.rand(n, K, generator=rng) - 0.3).relu()


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equal_results_where_nothing_is_drawn(theirs: ModuleType, seed: int, scale: bool) -> None:
    roots = random_forest(seed, scale=scale)
    x, generator = activations(300, seed), SimpleNamespace(mean_firing_magnitudes=torch.rand(K) + 0.5)
    ours, peer = Hierarchy(roots).modifier, their_modifier(theirs, roots)
    rest = (generator,) if scale else ()
    expected = peer(x, *rest)
    assert 0.01 < float((expected > 0).sum() / (x > 0).sum()) < 0.9
    torch.testing.assert_close(ours(x, *rest), expected)
    torch.testing.assert_close(ours(x.to_sparse(), *rest).to_dense(), peer(x.to_sparse(), *rest).to_dense())
    torch.testing.assert_close(ours(SparseCodes.from_dense(x), *rest).to_dense(), expected)


@pytest.mark.parametrize("seed", range(3))
def test_equal_rates_where_survivors_are_drawn(theirs: ModuleType, seed: int) -> None:
    n = 40_000
    roots = random_forest(seed, exclusive=True)
    x = activations(n, seed)
    torch.manual_seed(seed)
    a, b = ((m(x) > 0).double().mean(0) for m in (Hierarchy(roots, seed=0).modifier, their_modifier(theirs, roots)))
    # z bound 5 for each of 60 features and 3 forests: 1e-4. The activations are the same, so the bound is wide.
    p = (a + b) / 2
    assert float(((a - b).abs() / (2 * p * (1 - p) / n).sqrt().clamp(min=1e-9)).max()) < 5


@pytest.mark.parametrize(
    "options",
    [
        {"total_root_nodes": 3, "branching_factor": 4, "max_depth": 2},
        {"total_root_nodes": 3, "branching_factor": 4, "max_depth": 2, "mutually_exclusive_portion": 0.5},
        {"total_root_nodes": 7, "branching_factor": 3, "max_depth": 4, "mutually_exclusive_portion": 0.29,
         "mutually_exclusive_min_depth": 1, "mutually_exclusive_max_depth": 2, "scale_children_by_parent": True},
        {"total_root_nodes": 500, "branching_factor": 2, "max_depth": 1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_features", [10, 60, 333])
def test_generated_forests_have_the_same_shape(theirs: ModuleType, options: dict[str, Any], num_features: int) -> None:
    ours = generate_hierarchy(num_features, HierarchyConfig(**options), seed=0)
    peer = theirs.generate_hierarchy(num_features, theirs.HierarchyConfig(**options), seed=0)
    assert ours.feature_indices_used == set(peer.feature_indices_used)

    def shape(tree: Any, exclusive: list[bool]) -> Any:
        exclusive.append(tree.mutually_exclusive_children)
        own = (tree.feature_index, tree.scale_children_by_parent and bool(tree.children))  # without any it says nothing
        return own, [shape(child, exclusive) for child in tree.children]

    flags: tuple[list[bool], list[bool]] = [], []
    assert [shape(r, flags[0]) for r in ours.roots] == [shape(r, flags[1]) for r in peer.roots]
    assert sum(flags[0]) == sum(flags[1])


def test_files_are_read_both_ways(theirs: ModuleType) -> None:
    roots = [HierarchyNode(0, [HierarchyNode(1, feature_id="cat"), HierarchyNode(2)], True), HierarchyNode(None)]
    ours = Hierarchy(roots, seed=0)
    peer = type(theirs.generate_hierarchy(5, theirs.HierarchyConfig())).from_dict(ours.to_dict())
    assert Hierarchy.from_dict(peer.to_dict()) == ours
    assert peer.roots[0].children[0].feature_id == "cat"


def test_their_correction_is_an_approximation_of_ours(theirs: ModuleType) -> None:
    """Equal without exclusion; close for rare siblings."""
    options = {"total_root_nodes": 3, "branching_factor": 3, "max_depth": 2}
    p = torch.linspace(0.3, 0.01, 39)
    for portion, rtol in ((0.0, 1e-6), (1.0, 0.2)):
        ours = generate_hierarchy(39, HierarchyConfig(**options, mutually_exclusive_portion=portion))
        peer = theirs.generate_hierarchy(39, theirs.HierarchyConfig(**options, mutually_exclusive_portion=portion))
        requested = p if not portion else p ** torch.tensor([1.0] * 3 + [3.0] * 9 + [5.0] * 27)
        found = ours.compute_probability_correction_factors(requested)
        expected = torch.as_tensor(peer.compute_probability_correction_factors(requested))
        torch.testing.assert_close(found, expected, rtol=rtol, atol=0.0)
