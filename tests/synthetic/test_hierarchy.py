"""Generated forests: their shape, their seeds, and what their configuration refuses."""

import json

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.synthetic.hierarchy import Hierarchy, HierarchyConfig, generate_hierarchy
from unweave.synthetic.node import HierarchyNode, walk


def by_depth(hierarchy):
    """The nodes of each depth."""
    placed = walk(hierarchy.roots)
    depth, found = [], []
    for node, parent, _ in placed:
        depth.append(0 if parent < 0 else depth[parent] + 1)
        found += [[]] * (depth[-1] == len(found))
        found[depth[-1]] = [*found[depth[-1]], node]
    return found


def test_indices_are_handed_out_breadth_first():
    hierarchy = generate_hierarchy(100, HierarchyConfig(3, 4, 2))
    levels = by_depth(hierarchy)
    assert [len(level) for level in levels] == [3, 12, 48]
    assert [node.feature_index for level in levels for node in level] == list(range(63))
    assert hierarchy.feature_indices_used == set(range(63))
    assert {len(node.children) for level in levels[:2] for node in level} == {4}


def test_features_run_out():
    hierarchy = generate_hierarchy(20, HierarchyConfig(3, 4, 5))
    assert [len(node.children) for node in by_depth(hierarchy)[1]] == [4, 1, *[0] * 10]
    assert len(generate_hierarchy(5, HierarchyConfig(8)).roots) == 5


def test_branching_is_drawn_from_the_range():
    hierarchy = generate_hierarchy(100_000, HierarchyConfig(300, (2, 4), 2))
    counts = torch.tensor([len(node.children) for level in by_depth(hierarchy)[:2] for node in level])
    assert set(counts.tolist()) == {2, 3, 4}
    n = len(counts)
    # z bound 5, three counts: 2e-6.
    assert float((torch.bincount(counts)[2:] - n / 3).abs().max()) < 5 * (n * 2 / 9) ** 0.5


@pytest.mark.parametrize(
    ("first", "last", "portion", "expected"),
    [(0, None, 0.5, 7), (0, 0, 1.0, 3), (1, 1, 1.0, 12), (1, None, 0.3, 3), (2, None, 1.0, 0), (0, None, 0.0, 0)],
)
def test_a_portion_of_the_parents_is_exclusive(first, last, portion, expected):
    hierarchy = generate_hierarchy(63, HierarchyConfig(3, 4, 2, portion, first, last))
    exclusive = [
        depth for depth, level in enumerate(by_depth(hierarchy)) for node in level if node.mutually_exclusive_children
    ]
    assert len(exclusive) == expected
    assert all(first <= depth and (last is None or depth <= last) for depth in exclusive)


def test_a_parent_with_one_child_is_not_eligible():
    hierarchy = generate_hierarchy(8, HierarchyConfig(3, 4, 1, 1.0))
    assert [(len(r.children), r.mutually_exclusive_children) for r in hierarchy.roots] == [
        (4, True),
        (1, False),
        (0, False),
    ]


def test_parents_scale_and_leaves_do_not():
    hierarchy = generate_hierarchy(20, HierarchyConfig(2, 3, 2, scale_children_by_parent=True))
    assert all(node.scale_children_by_parent == bool(node.children) for node, _, _ in walk(hierarchy.roots))


def test_seeds():
    config = HierarchyConfig(10, (2, 5), 2, 0.5)
    a, b = (generate_hierarchy(500, config, seed=3) for _ in range(2))
    x = torch.ones(20, 500)
    assert a == b
    assert torch.equal(a.modifier(x), b.modifier(x))
    assert a != generate_hierarchy(500, config, seed=4)
    state = torch.get_rng_state()
    generate_hierarchy(500, config, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert generate_hierarchy(500, config) != generate_hierarchy(500, config)


def test_a_file_gives_the_same_forest_and_the_same_draws():
    hierarchy = generate_hierarchy(200, HierarchyConfig(5, 3, 3, 0.5, scale_children_by_parent=False), seed=1)
    again = Hierarchy.from_dict(json.loads(json.dumps(hierarchy.to_dict())))
    x = torch.ones(20, 200)
    assert again == hierarchy
    assert torch.equal(again.modifier(x), hierarchy.modifier(x))
    assert Hierarchy.from_dict({"roots": hierarchy.to_dict()["roots"]}) == hierarchy
    with pytest.raises(UnweaveError, match=r"needs the key 'roots', got \['root'\]"):
        Hierarchy.from_dict({"root": []})


def test_a_modifier_of_ones_own_is_kept():
    root = HierarchyNode(0, [HierarchyNode(1)])
    own = Hierarchy([root]).modifier
    assert Hierarchy([root], own).modifier is own
    assert Hierarchy([root]) != "a forest"
    assert repr(Hierarchy([root], seed=4)) == "Hierarchy(1 trees, 2 features, seed=4)"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("total_root_nodes", 0), ("total_root_nodes", 1.5), ("branching_factor", 1), ("branching_factor", (4, 2)),
        ("branching_factor", (1, 3)), ("branching_factor", (2, 3, 4)), ("branching_factor", 2.5), ("max_depth", 0),
        ("mutually_exclusive_portion", 1.1), ("mutually_exclusive_portion", float("nan")),
        ("mutually_exclusive_min_depth", -1), ("mutually_exclusive_max_depth", -1),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(UnweaveError, match=field):
        HierarchyConfig(**{field: value})


def test_depths_in_order_and_lists():
    with pytest.raises(UnweaveError, match="mutually_exclusive_max_depth must be an integer of at least 3, got 2"):
        HierarchyConfig(mutually_exclusive_min_depth=3, mutually_exclusive_max_depth=2)
    assert HierarchyConfig(branching_factor=[2, 3]) == HierarchyConfig(branching_factor=(2, 3))
    with pytest.raises(UnweaveError, match="num_features must be an integer of at least 1, got 0"):
        generate_hierarchy(0, HierarchyConfig())
