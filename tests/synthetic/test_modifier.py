"""The hierarchy's result against a plain description of it, sample by sample; its draws, forms and complaints."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave import SparseCodes
from unweave._errors import UnweaveError
from unweave.synthetic import modifier as module
from unweave.synthetic.modifier import HierarchyModifier, hierarchy_modifier
from unweave.synthetic.node import HierarchyNode as Node

K = 14


@st.composite
def forests(draw):
    """Up to 3 trees over a part of K features, in random order, with organisational nodes anywhere."""
    indices = list(draw(st.permutations(range(K))))
    nodes = []
    for i in range(draw(st.integers(1, 16))):
        own = indices.pop() if indices and draw(st.integers(0, 3)) else None
        nodes.append(Node(own, scale_children_by_parent=draw(st.booleans())))
        if i >= 3 or draw(st.booleans()):
            above = draw(st.integers(-1, i - 1))
            if above >= 0:
                nodes[above].children.append(nodes[i])
    for node in nodes:
        node.mutually_exclusive_children = len(node.children) > 1 and draw(st.booleans())
    below = {id(child) for node in nodes for child in node.children}
    return [node for node in nodes if id(node) not in below]


def make_batch(n: int = 40, seed: int = 0) -> torch.Tensor:
    """Half of the entries active, some negative."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, K, generator=rng) + 0.5
    return x * torch.randint(-1, 3, (n, K), generator=rng).clamp(-1, 1)


def check_sample(roots, x, y, means):
    """Raise unless `y` is what a hierarchy makes of `x` under some outcome of the draws."""
    free = set(range(len(x)))
    stack = [(root, None, False) for root in roots]
    while stack:
        node, above, scaled = stack.pop()
        f = node.feature_index
        if f is not None:
            free.discard(f)
            expected = gated(x, y, f, above, scaled, means)
            assert y[f] in (0, pytest.approx(expected, rel=1e-6))
        here = above if f is None else f
        competing = [c.feature_index for c in node.children if c.feature_index is not None]
        active = [c for c in competing if gated(x, y, c, here, node.scale_children_by_parent, means) > 0]
        if node.mutually_exclusive_children and len(competing) > 1:
            assert sum(y[c] > 0 for c in active) == min(1, len(active))
            kept = [c for c in competing if c not in active]
        else:
            kept = competing
        for c in kept:
            assert y[c] == pytest.approx(gated(x, y, c, here, node.scale_children_by_parent, means), rel=1e-6)
        stack.extend((child, here, node.scale_children_by_parent) for child in node.children)
    for root in roots:
        if root.feature_index is not None:
            assert y[root.feature_index] == x[root.feature_index]
    for f in free:
        assert y[f] == x[f]


def gated(x, y, f, above, scaled, means):
    """What the final activation of the parent leaves of a feature."""
    if above is None:
        return x[f]
    if y[above] <= 0:
        return 0.0
    return x[f] * (y[above] / means[above] if scaled else 1.0)


@settings(deadline=None, max_examples=60)
@given(forests(), st.integers(0, 5))
def test_every_form_does_what_the_description_says(roots, seed):
    x, generator = make_batch(seed=seed), SimpleNamespace(mean_firing_magnitudes=torch.rand(K) + 0.5)
    modifier = hierarchy_modifier(roots, seed=seed)
    before = x.clone()
    dense = modifier(x, generator)
    assert torch.equal(x, before)
    means = generator.mean_firing_magnitudes.tolist()
    for given_, made in zip(x.tolist(), dense.tolist(), strict=True):
        check_sample(roots, given_, made, means)

    codes = SparseCodes.from_dense(x)
    entries = codes.values.clone()
    of_codes = modifier.fork(seed)(codes, generator)
    assert torch.equal(codes.values, entries)
    assert torch.equal(of_codes.to_dense(), dense)
    assert bool((of_codes.values != 0).all())
    coo = x.to_sparse()
    of_coo = modifier.fork(seed)(coo, generator)
    assert of_coo.is_coalesced()
    assert torch.equal(of_coo.to_dense(), dense)
    assert torch.equal(coo.to_dense(), x)


def test_the_parts_make_no_difference(monkeypatch):
    roots = [Node(None, [Node(i, [Node(7 + i)]) for i in range(7)], True)]
    x = make_batch(200)
    whole = hierarchy_modifier(roots, seed=1)(x)
    monkeypatch.setattr(module, "CACHED", {"dense": 3 * K, "sparse": 5})
    assert torch.equal(hierarchy_modifier(roots, seed=1)(x), whole)
    assert torch.equal(hierarchy_modifier(roots, seed=1)(SparseCodes.from_dense(x)).to_dense(), whole)


def test_organisational_children_do_not_compete():
    roots = [Node(0, [Node(1), Node(2), Node(None, [Node(3)])], mutually_exclusive_children=True)]
    y = hierarchy_modifier(roots, seed=0)(torch.ones(50, 4))
    assert bool((y[:, 3] == 1).all())
    assert bool((y[:, 1] + y[:, 2] == 1).all())


def test_a_loser_takes_what_is_below_it_along():
    roots = [Node(None, [Node(0, [Node(1, [Node(2)])]), Node(3, [Node(4)])], mutually_exclusive_children=True)]
    y = hierarchy_modifier(roots, seed=0)(torch.ones(200, 5))
    assert torch.equal(y[:, :3], y[:, :1].expand(-1, 3))
    assert torch.equal(y[:, 3:], 1 - y[:, :1].expand(-1, 2))
    assert 0 < float(y[:, 0].mean()) < 1


def test_scaling_follows_the_chain():
    tree = Node(0, [Node(1, [Node(2)], scale_children_by_parent=True)], scale_children_by_parent=True)
    generator = SimpleNamespace(mean_firing_magnitudes=torch.tensor([2.0, 0.5, 9.0]))
    y = hierarchy_modifier(tree)(torch.tensor([[3.0, 1.0, 1.0], [0.0, 1.0, 1.0]]), generator)
    assert torch.equal(y, torch.tensor([[3.0, 1.5, 3.0], [0.0, 0.0, 0.0]]))


def test_survivors_are_uniform_and_independent():
    n, sizes = 60_000, (2, 3, 5)
    roots, first = [], 0
    for size in sizes:
        roots.append(Node(None, [Node(first + i) for i in range(size)], mutually_exclusive_children=True))
        first += size
    modifier = hierarchy_modifier(roots, seed=0)
    y = modifier(torch.ones(n, first))
    shares = torch.cat([torch.full((size,), 1 / size) for size in sizes]).double()
    # z bound 5: 6e-7 for each of 10 shares, 45 pairs of features, 9 neighbouring samples and 9 calls: < 1e-4 in all.
    standard = (y.double() - shares) / (shares * (1 - shares)).sqrt()
    assert float(standard.mean(0).abs().max()) < 5 / n**0.5
    products = standard.T @ standard / n
    block = torch.block_diag(*(torch.ones(size, size) for size in sizes)).bool()
    assert float(products[~block].abs().max()) < 5 / n**0.5
    later = (modifier(torch.ones(n, first)).double() - shares) / (shares * (1 - shares)).sqrt()
    assert float((standard[1:] * standard[:-1]).mean(0).abs().max()) < 5 / (n - 1) ** 0.5
    assert float((standard * later).mean(0).abs().max()) < 5 / n**0.5


def test_survivors_of_a_large_set_are_uniform():
    n, size = 40_000, 1000
    modifier = hierarchy_modifier(Node(None, [Node(i) for i in range(size)], mutually_exclusive_children=True), seed=2)
    rows = torch.arange(n).repeat_interleave(4)
    members = (torch.arange(n)[:, None] + torch.tensor([0, 250, 500, 750])).remainder(size).sort(1).values
    codes = SparseCodes.from_entries(rows, members.flatten(), torch.ones(4 * n), n, size)
    won = modifier(codes)
    assert torch.equal(won.offsets, torch.arange(n + 1))
    places = (won.indices[:, None] == members).nonzero()[:, 1]
    counts = torch.bincount(places, minlength=4).double()
    assert float((counts - n / 4).abs().max()) < 5 * (n * 3 / 16) ** 0.5  # z bound 5, 4 places: 2e-6


def test_seeds():
    tree = Node(0, [Node(1), Node(2), Node(3)], mutually_exclusive_children=True)
    x = torch.ones(100, 4)
    a = hierarchy_modifier(tree, seed=5)
    first, second = a(x), a(x)
    assert not torch.equal(first, second)
    torch.manual_seed(99)
    b = a.fork(5)
    assert torch.equal(b(x), first)
    assert torch.equal(b(x), second)
    assert not torch.equal(a.fork(6)(x), first)
    unseeded = hierarchy_modifier(tree)
    assert unseeded.seed != hierarchy_modifier(tree).seed
    assert torch.equal(unseeded(x), hierarchy_modifier(tree, seed=unseeded.seed)(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_strides(dtype):
    tree = Node(3, [Node(1, [Node(2), Node(0)], True), Node(5)], scale_children_by_parent=True)
    generator = SimpleNamespace(mean_firing_magnitudes=torch.full((K,), 0.5))
    x = make_batch().to(dtype)
    y = hierarchy_modifier(tree, seed=0)(x.T.contiguous().T, generator)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert torch.equal(hierarchy_modifier(tree, seed=0)(SparseCodes.from_dense(x), generator).to_dense(), y)
    assert float(y.count_nonzero()) < float(x.count_nonzero())


@pytest.mark.parametrize("form", ["dense", "coo", "codes"])
def test_nothing_to_do(form):
    def convert(x):
        return {"dense": lambda: x, "coo": x.to_sparse, "codes": lambda: SparseCodes.from_dense(x)}[form]()

    def back(y):
        return y if form == "dense" else y.to_dense()

    tree = Node(0, [Node(1), Node(2)], mutually_exclusive_children=True)
    for x in (torch.zeros(3, 4), torch.zeros(0, 4), -torch.ones(2, 4)):
        expected = x.clone()
        expected[:, 1:3] = 0
        assert torch.equal(back(hierarchy_modifier(tree)(convert(x))), expected)
    x = make_batch()
    assert torch.equal(back(hierarchy_modifier([])(convert(x))), x)
    assert torch.equal(back(hierarchy_modifier([Node(None, [Node(2)]), Node(0)])(convert(x))), x)


def test_explicit_zeros_are_inactive():
    codes = SparseCodes(torch.tensor([0, 1, 1, 2]), torch.tensor([0.0, 1, 1, 1]), torch.tensor([0, 2, 4]), 3)
    y = hierarchy_modifier(Node(0, [Node(1)]))(codes)
    assert y.indices.tolist() == [2]
    assert y.offsets.tolist() == [0, 0, 1]


def test_a_chain_deeper_than_the_stack():
    n = 3000
    tree = Node(0)
    for i in range(1, n):
        tree = Node(i, [tree])
    x = torch.ones(3, n)
    x[1, 2000], x[2, n - 1] = 0, 0
    modifier = hierarchy_modifier(tree)
    y = modifier(x)
    assert y.sum(1).tolist() == [n, n - 2001, 0]
    assert torch.equal(modifier(SparseCodes.from_dense(x)).to_dense(), y)


def test_a_million_features():
    k = 1_000_000
    tree = Node(k - 1, [Node(5), Node(999, [Node(0)])], mutually_exclusive_children=True)
    rows = torch.arange(200).repeat_interleave(4)
    codes = SparseCodes.from_entries(rows, torch.tensor([0, 5, 999, k - 1]).repeat(200), torch.ones(800), 200, k)
    y = hierarchy_modifier(tree, seed=0)(codes)
    assert set(y.offsets.diff().tolist()) == {2, 3}  # parent and 5, or parent, 999 and 0


def test_complaints():
    scaling = Node(1, [Node(0)], scale_children_by_parent=True, feature_id="cat")
    x = torch.ones(2, 3)
    with pytest.raises(
        UnweaveError, match=r"feature 4 at roots\[1\].children\[0\] is outside activations of 3 features"
    ):
        hierarchy_modifier([Node(0), Node(1, [Node(4)])])(x)
    with pytest.raises(UnweaveError, match=r"feature 1 \(id 'cat'\) at roots\[0\] scales .* second argument"):
        hierarchy_modifier(scaling)(x)
    for means, message in [
        (torch.ones(2), r"must have shape \(3,\), got \(2,\)"),
        (torch.tensor([1.0, 0.0, 1.0]), r"feature 1 \(id 'cat'\) at roots\[0\] .* above 0, got 0\."),
    ]:
        with pytest.raises(UnweaveError, match=message):
            hierarchy_modifier(scaling)(x, SimpleNamespace(mean_firing_magnitudes=means))
    for wrong in (torch.ones(3), torch.ones(2, 3, 3), torch.ones(3).to_sparse()):
        with pytest.raises(UnweaveError, match="a hierarchy applies to a dense or COO tensor"):
            hierarchy_modifier(Node(0))(wrong)
    with pytest.raises(UnweaveError, match="occurs twice"):
        HierarchyModifier([Node(0), Node(0)])
