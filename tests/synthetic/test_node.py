"""Trees: what they accept, what they say, and that a chain of thousands is no deeper than the stack."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.synthetic.node import HierarchyNode, walk

DEEP = 3000


def chain(n: int) -> HierarchyNode:
    node = HierarchyNode(0)
    for i in range(1, n):
        node = HierarchyNode(i, [node])
    return node


@st.composite
def trees(draw):
    """A tree of up to 12 nodes, some organisational, indices each once."""
    n = draw(st.integers(1, 12))
    indices = draw(st.permutations(range(n)))
    parents = [draw(st.integers(0, i - 1)) for i in range(1, n)]
    nodes = []
    for i in range(n):
        own = None if draw(st.booleans()) and draw(st.booleans()) else indices[i]
        name = draw(st.sampled_from([None, "a", "b"]))
        nodes.append(HierarchyNode(own, scale_children_by_parent=draw(st.booleans()), feature_id=name))
    for i, parent in enumerate(parents, start=1):
        nodes[parent].children.append(nodes[i])
    for node in nodes:
        node.mutually_exclusive_children = len(node.children) > 1 and draw(st.booleans())
    return nodes[0]


@settings(deadline=None)
@given(trees())
def test_dictionaries_keep_everything(tree):
    data = json.loads(json.dumps(tree.to_dict()))
    again = HierarchyNode.from_dict(data)
    assert again == tree
    assert repr(again) == repr(tree)
    assert again.get_all_feature_indices() == tree.get_all_feature_indices()
    assert len(repr(tree).splitlines()) == len(walk([tree]))
    again.children.append(HierarchyNode(99))
    assert again != tree


@pytest.mark.parametrize("key", ["id", "feature_id"])
def test_both_spellings_of_an_id_are_read_and_one_is_written(key):
    node = HierarchyNode.from_dict({"feature_index": 3, key: "cat"})
    assert node.feature_id == "cat"
    assert node.to_dict()["feature_id"] == "cat"
    assert "id" not in node.to_dict()


def test_an_id_is_found_behind_an_empty_feature_id():
    assert HierarchyNode.from_dict({"feature_id": None, "id": "cat"}).feature_id == "cat"


def test_one_dictionary_in_two_places_makes_two_nodes():
    twice = {"children": []}
    tree = HierarchyNode.from_dict({"feature_index": 0, "children": [twice, twice]})
    tree.validate()
    assert tree.children[0] is not tree.children[1]


def test_indices_come_depth_first():
    tree = HierarchyNode(4, [HierarchyNode(None, [HierarchyNode(7), HierarchyNode(2)]), HierarchyNode(5)])
    assert tree.get_all_feature_indices() == [4, 7, 2, 5]


def test_repr():
    inner = HierarchyNode(1, [HierarchyNode(2), HierarchyNode(3)], True, scale_children_by_parent=True)
    tree = HierarchyNode(None, [inner, HierarchyNode(4, feature_id="cat")])
    assert repr(tree) == "-\n    1 xR\n        2\n        3\n    4 (cat)"
    assert tree.__repr__(2).startswith("  -\n      1")


@pytest.mark.parametrize("change", ["feature_index", "feature_id", "scale_children_by_parent", "children"])
def test_trees_that_differ_in_one_node_differ(change):
    a, b = chain(5), chain(5)
    assert a == b
    node = b.children[0].children[0]
    new = {"feature_index": 9, "feature_id": "x", "scale_children_by_parent": True, "children": []}[change]
    setattr(node, change, new)
    assert a != b
    assert a != "a tree"


def test_the_flag_that_old_code_would_hit_is_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        HierarchyNode(0, None, False, "cat")  # type: ignore[misc]
    with pytest.raises(UnweaveError, match="mutually_exclusive_children must be True or False, got 'cat'"):
        HierarchyNode(0, None, "cat")  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [-1, 1.5, "3", True])
def test_a_bad_index_is_named(index):
    with pytest.raises(UnweaveError, match=f"feature_index must be an integer of at least 0 or None, got {index!r}"):
        HierarchyNode(index)


def test_an_unknown_key_is_named():
    with pytest.raises(UnweaveError, match=r"no key 'feature_idx'; did you mean .*'feature_index'"):
        HierarchyNode.from_dict({"children": [{"feature_idx": 1}]})
    with pytest.raises(UnweaveError, match="is a dictionary, got int"):
        HierarchyNode.from_dict({"children": [3]})


@pytest.mark.parametrize("n", [0, 1])
def test_exclusion_needs_two_children(n):
    children = [HierarchyNode(i + 1) for i in range(n)]
    with pytest.raises(UnweaveError, match=rf"feature 0 \(id 'cat'\) has mutually_exclusive_children and {n} of them"):
        HierarchyNode(0, children, True, feature_id="cat")
    tree = HierarchyNode(9, [HierarchyNode(0, children)])
    tree.children[0].mutually_exclusive_children = True
    with pytest.raises(UnweaveError, match=r"feature 0 at root.children\[0\] has mutually_exclusive_children"):
        tree.validate()


def test_a_loop_is_named():
    below = HierarchyNode(2, feature_id="cat")
    tree = HierarchyNode(0, [HierarchyNode(1, [below])])
    below.children.append(tree.children[0])
    message = r"has a loop: feature 1 at root.children\[0\] is below itself at root.children\[0\].children\[0\].child"
    with pytest.raises(UnweaveError, match=message):
        tree.validate()
    with pytest.raises(UnweaveError, match="loop"):
        tree.get_all_feature_indices()
    assert "..." in repr(tree)


def test_a_node_with_two_parents_is_named():
    shared = HierarchyNode(None, feature_id="cat")
    tree = HierarchyNode(0, [HierarchyNode(1, [shared]), HierarchyNode(2, [shared])])
    message = (
        r"an organisational node \(id 'cat'\) has two parents: it is at root.children\[0\].children\[0\] "
        r"and at root.children\[1\].children\[0\]"
    )
    with pytest.raises(UnweaveError, match=message):
        tree.validate()


def test_an_index_that_occurs_twice_is_named():
    tree = HierarchyNode(0, [HierarchyNode(1, feature_id="a"), HierarchyNode(2, [HierarchyNode(1, feature_id="b")])])
    message = (
        r"feature index 1 occurs twice: feature 1 \(id 'a'\) at root.children\[0\], "
        r"and feature 1 \(id 'b'\) at root.children\[1\].children\[0\]"
    )
    with pytest.raises(UnweaveError, match=message):
        tree.validate()
    with pytest.raises(
        UnweaveError, match=r"feature index 1 occurs twice: feature 1 at roots\[0\], and .* at roots\[2\]"
    ):
        walk([HierarchyNode(1), HierarchyNode(0), HierarchyNode(1)])
    with pytest.raises(UnweaveError, match=r"roots\[1\] is a int, not a HierarchyNode"):
        walk([HierarchyNode(1), 3])  # type: ignore[list-item]


def test_a_chain_deeper_than_the_stack():
    tree = chain(DEEP)
    assert HierarchyNode.from_dict(tree.to_dict()) == tree
    assert tree.get_all_feature_indices() == list(range(DEEP))[::-1]
    assert repr(tree).splitlines()[-1].strip() == "0"
    deepest = tree
    while deepest.children:
        deepest = deepest.children[0]
    deepest.feature_index = DEEP - 1
    with pytest.raises(UnweaveError, match="occurs twice") as error:
        tree.validate()
    assert f"... {DEEP - 7} levels ..." in str(error.value)
    assert len(str(error.value)) < 300
    deepest.children.append(tree)
    with pytest.raises(UnweaveError):
        tree.validate()
