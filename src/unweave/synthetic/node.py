"""Trees of features: who fires only where another fires, and which children exclude one another.

All walks are loops over a queue, so a chain of a hundred thousand nodes is as good as a bush.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unweave._errors import UnweaveError, nearest

KEYS = (
    "feature_index", "children", "mutually_exclusive_children", "scale_children_by_parent", "feature_id", "id",
)  # fmt: skip
SHOWN_STEPS = 6


class HierarchyNode:
    """A feature and the features that fire only where it fires.

    Two nodes are equal if their trees are: indices, flags, identifiers and children in order.

    Args:
        feature_index: Index of the feature, or None for an organisational node, which has no feature of its own: its
            children see the activity of the nearest ancestor that has one, and at the root they see it always active.
        children: The nodes below.
        mutually_exclusive_children: Whether at most one child fires on a sample, drawn uniformly among those that
            would. Children without a feature do not compete. Needs two children or more.
        scale_children_by_parent: Whether children are multiplied by the parent's activation over its mean firing
            magnitude, rather than only set to 0 where the parent is silent.
        feature_id: A name, for messages and for you.

    Raises:
        UnweaveError: For an index that is no integer of at least 0, or exclusion with fewer than two children.
    """

    __slots__ = ("children", "feature_id", "feature_index", "mutually_exclusive_children", "scale_children_by_parent")
    __hash__ = None  # type: ignore[assignment]  # mutable, and equal by structure

    def __init__(
        self,
        feature_index: int | None = None,
        children: Sequence[HierarchyNode] | None = None,
        mutually_exclusive_children: bool = False,
        *,
        scale_children_by_parent: bool = False,
        feature_id: str | None = None,
    ) -> None:
        self.feature_index = None if feature_index is None else _index(feature_index)
        self.children = list(children or ())
        self.mutually_exclusive_children = _flag("mutually_exclusive_children", mutually_exclusive_children)
        self.scale_children_by_parent = _flag("scale_children_by_parent", scale_children_by_parent)
        self.feature_id = feature_id
        _check_exclusion(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> HierarchyNode:
        """The tree that `to_dict` wrote.

        Args:
            tree: Keys `feature_index`, `children`, `mutually_exclusive_children`, `scale_children_by_parent` and
                `feature_id`, each optional; `id` is read as `feature_id`, as hand-written trees have it.

        Raises:
            UnweaveError: For an unknown key, or what the constructor refuses.
        """
        queue, first_child = [tree], []
        for data in queue:  # grows as it is walked: the children of each follow one another
            _check_keys(data)
            first_child.append(len(queue))
            queue.extend(data.get("children") or ())
        nodes: list[HierarchyNode] = []
        for data, first in zip(reversed(queue), reversed(first_child), strict=True):
            n, end = len(data.get("children") or ()), len(queue) - first
            identifier = data.get("feature_id")
            identifier = data.get("id") if identifier is None else identifier
            node = cls(
                data.get("feature_index"),
                nodes[end - n : end][::-1],
                data.get("mutually_exclusive_children", False),
                scale_children_by_parent=data.get("scale_children_by_parent", False),
                feature_id=None if identifier is None else str(identifier),
            )
            nodes.append(node)
        return nodes[-1]

    def to_dict(self) -> dict[str, Any]:
        """The tree as nested dictionaries of plain values, for `from_dict`."""
        placed = walk([self], "root")
        found: list[dict[str, Any]] = [
            {
                "feature_index": node.feature_index,
                "mutually_exclusive_children": node.mutually_exclusive_children,
                "scale_children_by_parent": node.scale_children_by_parent,
                "feature_id": node.feature_id,
                "children": [],
            }
            for node, _, _ in placed
        ]
        for (_, parent, _), data in zip(placed[1:], found[1:], strict=True):
            found[parent]["children"].append(data)
        return found[0]

    def get_all_feature_indices(self) -> list[int]:
        """The indices of the tree, depth first: a node's own before its children's."""
        self.validate()
        stack: list[HierarchyNode] = [self]
        found: list[int] = []
        while stack:
            node = stack.pop()
            if node.feature_index is not None:
                found.append(node.feature_index)
            stack.extend(reversed(node.children))
        return found

    def validate(self) -> None:
        """Check the tree below this node.

        Raises:
            UnweaveError: For a loop, a node with two parents, a feature index that occurs twice, or exclusion among
                fewer than two children. The message names the node.
        """
        walk([self], "root")

    def __repr__(self, indent: int = 0) -> str:
        """One line per node: its index or `-`, `x` if its children exclude one another, `R` if it scales them."""
        stack, seen, lines = [(self, indent)], set(), []
        while stack:
            node, indent = stack.pop()
            known = id(node) in seen  # a broken tree can be looked at too
            lines.append(" " * indent + _line(node) + " ..." * known)
            seen.add(id(node))
            stack.extend((child, indent + 4) for child in reversed(node.children) if not known)
        return "\n".join(lines)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HierarchyNode):
            return NotImplemented
        pairs = [(self, other)]
        for a, b in pairs:
            if a is b:
                continue
            if _own(a) != _own(b) or len(a.children) != len(b.children):
                return False
            pairs.extend(zip(a.children, b.children, strict=True))
        return True


class Placed(NamedTuple):
    """A node of a forest, and where it is."""

    node: HierarchyNode
    parent: int
    """Position of its parent in the walk; -1 for a root."""
    child: int
    """Which child of its parent it is, or which root."""


def walk(roots: Sequence[HierarchyNode], name: str = "roots") -> list[Placed]:
    """All nodes of a forest, breadth first, checked.

    Args:
        roots: The trees.
        name: What messages call the forest; `root` for a single tree.

    Raises:
        UnweaveError: See `HierarchyNode.validate`; a feature index may occur only once in the whole forest.
    """
    placed = [Placed(root, -1, i) for i, root in enumerate(roots)]
    seen: dict[int, int] = {}
    of_feature: dict[int, int] = {}
    for i, (node, _, _) in enumerate(placed):  # grows as it is walked
        if not isinstance(node, HierarchyNode):
            raise UnweaveError(f"{path(placed, i, name)} is a {type(node).__name__}, not a HierarchyNode.")
        first = seen.setdefault(id(node), i)
        if first != i:
            raise UnweaveError(_seen_twice(placed, first, i, name))
        _check_exclusion(node, f" at {path(placed, i, name)}" if node.mutually_exclusive_children else "")
        if node.feature_index is not None and of_feature.setdefault(node.feature_index, i) != i:
            first = of_feature[node.feature_index]
            raise UnweaveError(
                f"feature index {node.feature_index} occurs twice: {describe(placed, first, name)}, "
                f"and {describe(placed, i, name)}."
            )
        placed.extend(Placed(child, i, j) for j, child in enumerate(node.children))
    return placed


def path(placed: Sequence[Placed], i: int, name: str = "roots") -> str:
    """Where a node is, such as `roots[0].children[2]`; the middle of a long path is left out."""
    steps = []
    while i >= 0:
        steps.append(placed[i].child)
        i = placed[i].parent
    start = name if name == "root" else f"{name}[{steps[-1]}]"
    rest = [f".children[{child}]" for child in reversed(steps[:-1])]
    if len(rest) > SHOWN_STEPS:
        half = SHOWN_STEPS // 2
        rest = [*rest[:half], f" ... {len(rest) - 2 * half} levels ... ", *rest[-half:]]
    return start + "".join(rest)


def describe(placed: Sequence[Placed], i: int, name: str = "roots") -> str:
    """A node for messages: its feature, its identifier and its path."""
    return f"{_label(placed[i].node)} at {path(placed, i, name)}"


def _seen_twice(placed: Sequence[Placed], first: int, i: int, name: str) -> str:
    above = placed[i].parent
    while above >= 0 and above != first:
        above = placed[above].parent
    label = _label(placed[i].node)
    if above == first:
        return (
            f"the hierarchy has a loop: {label} at {path(placed, first, name)} is below itself "
            f"at {path(placed, i, name)}."
        )
    return f"{label} has two parents: it is at {path(placed, first, name)} and at {path(placed, i, name)}."


def _label(node: HierarchyNode) -> str:
    what = "an organisational node" if node.feature_index is None else f"feature {node.feature_index}"
    return what if node.feature_id is None else f"{what} (id {node.feature_id!r})"


def _line(node: HierarchyNode) -> str:
    flags = "x" * node.mutually_exclusive_children + "R" * node.scale_children_by_parent
    parts = ["-" if node.feature_index is None else str(node.feature_index), flags]
    if node.feature_id is not None:
        parts.append(f"({node.feature_id})")
    return " ".join(part for part in parts if part)


def _own(node: HierarchyNode) -> tuple[object, ...]:
    return (
        node.feature_index, node.feature_id, node.mutually_exclusive_children, node.scale_children_by_parent,
    )  # fmt: skip


def _check_exclusion(node: HierarchyNode, where: str = "") -> None:
    if node.mutually_exclusive_children and len(node.children) < 2:
        raise UnweaveError(
            f"{_label(node)}{where} has mutually_exclusive_children and {len(node.children)} of them; "
            "exclusion needs at least 2."
        )


def _check_keys(tree: object) -> None:
    if not isinstance(tree, Mapping):
        raise UnweaveError(f"a node of a hierarchy is a dictionary, got {type(tree).__name__}.")
    for key in tree:
        if key not in KEYS:
            raise UnweaveError(f"a node of a hierarchy has no key {key!r}{nearest(str(key), KEYS)}.")


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UnweaveError(f"{name} must be True or False, got {value!r}.")
    return value


def _index(value: object) -> int:
    try:
        index = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        index = -1
    if isinstance(value, bool) or index < 0:
        raise UnweaveError(f"feature_index must be an integer of at least 0 or None, got {value!r}.")
    return index
