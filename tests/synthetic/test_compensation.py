"""Compensated firing: the equations against enumeration, and rates as measured after the hierarchy (pitfall 353)."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.synthetic import compensation
from unweave.synthetic.compensation import compensate, solve
from unweave.synthetic.hierarchy import Hierarchy
from unweave.synthetic.modifier import hierarchy_modifier
from unweave.synthetic.node import HierarchyNode as Node


def winning(q: list[float]) -> list[float]:
    """How often each member wins, by going through all outcomes."""
    found = [0.0] * len(q)
    for active in itertools.product([False, True], repeat=len(q)):
        chance = math.prod(p if a else 1 - p for p, a in zip(q, active, strict=True))
        for i, a in enumerate(active):
            found[i] += chance * a / max(1, sum(active))
    return found


@settings(deadline=None, max_examples=80)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=7), st.sampled_from([1e-4, 0.3, 0.9, 0.999, 1 - 1e-9, 1.0]))
def test_the_solution_wins_as_often_as_asked(shares, total):
    rates = [total * share / sum(shares) for share in shares]
    q = solve(torch.tensor([[*rates, 0.0]], dtype=torch.float64))[0]
    assert bool(((q >= 0) & (q <= 1)).all())
    assert q[-1] == 0
    assert winning(q.tolist()) == pytest.approx([*rates, 0.0], rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("total", [0.05, 0.9, 1 - 1e-6, 1.0])
@pytest.mark.parametrize("n", [100, 3000])
def test_large_groups_need_no_more_nodes(n, total):
    rates = torch.rand(1, n, dtype=torch.float64).square()
    rates *= total / rates.sum()
    q = solve(rates)[0]
    # The same integral by the midpoint rule with a hundred times as many points.
    s = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    logs = torch.log1p(-q[:, None] * (1 - s))
    won = q * (logs.sum(0) - logs).exp().mean(1)
    torch.testing.assert_close(won, rates[0], rtol=1e-4, atol=0.0)
    assert float(torch.log1p(-q).sum().exp()) == pytest.approx(1 - total, abs=1e-9)


def forest() -> list[Node]:
    """Three levels, exclusion at every level, an organisational exclusive root, and one inside a tree."""
    exclusive = Node(0, [Node(3, [Node(4), Node(5), Node(6)], True), Node(7)], True)
    inside = Node(None, [Node(10), Node(11), Node(None, [Node(12)])], True)
    return [
        Node(None, [exclusive, Node(1), Node(2, [Node(8)])], True),
        Node(9, [inside, Node(13, [Node(14)])]),
    ]


REQUESTED = [0.3, 0.2, 0.4, 0.15, 0.05, 0.04, 0.03, 0.1, 0.25, 0.5, 0.2, 0.2, 0.1, 0.4, 0.3, 0.02]


def measured(roots, probabilities, n=200_000, seed=0):
    """Rates after the hierarchy, of features that fire independently before it."""
    rng = torch.Generator().manual_seed(seed)
    x = (torch.rand(n, len(probabilities), generator=rng, dtype=torch.float64) < probabilities).float()
    return (hierarchy_modifier(roots, seed=seed)(x) > 0).double().mean(0)


def assert_rates(found, wanted, n=200_000):
    # z bound 5: 6e-7 for each of 16 features, 1e-5 in all.
    assert float(((found - wanted).abs() / (wanted * (1 - wanted) / n).sqrt()).max()) < 5


def test_measured_rates_are_the_requested_ones():
    wanted = torch.tensor(REQUESTED, dtype=torch.float64)
    firing, rates = compensate(forest(), wanted)
    torch.testing.assert_close(rates, wanted)
    assert_rates(measured(forest(), firing), wanted)
    with pytest.raises(AssertionError):  # and without compensation they are not
        assert_rates(measured(forest(), wanted), wanted)
    factors = Hierarchy(forest()).compute_probability_correction_factors(wanted)
    torch.testing.assert_close(factors * wanted, firing)
    assert factors[[9, 15]].tolist() == [1, 1]
    assert bool((factors >= 1).all())
    assert Hierarchy(forest()).compute_probability_correction_factors(wanted.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "feature", "path", "reachable"),
    [
        ({13: 0.8}, 13, r"roots\[1\].children\[1\]", 0.5),
        ({1: 0.5}, 0, r"roots\[0\].children\[0\]", 0.3 / 1.2),
        ({14: 0.5}, 14, r"roots\[1\].children\[1\].children\[0\]", 0.4),
    ],
)
def test_a_request_out_of_reach_gets_what_can_be_reached(change, feature, path, reachable):
    wanted = torch.tensor(REQUESTED, dtype=torch.float64)
    for f, p in change.items():
        wanted[f] = p
    message = rf"feature {feature} at {path}, requested {wanted[feature]:.4g}, reachable {reachable:.4g}\."
    with pytest.warns(UserWarning, match=message):
        firing, rates = compensate(forest(), wanted)
    assert float(rates[feature]) == pytest.approx(reachable)
    assert bool((rates <= wanted + 1e-12).all())
    assert bool((firing <= 1).all())
    assert_rates(measured(forest(), firing), rates)


def test_a_float32_request_that_just_fits_gets_no_warning():
    probabilities = torch.full((10,), 0.1)
    firing, rates = compensate([Node(None, [Node(i) for i in range(10)], True)], probabilities)
    assert firing.dtype == torch.float32
    torch.testing.assert_close(rates, probabilities)
    assert bool((firing <= 1).all())


def test_groups_of_all_sizes_are_solved_in_parts(monkeypatch):
    roots, probabilities = [], []
    for size in (2, 5, 3, 5, 9, 2):
        first = len(probabilities)
        roots.append(Node(None, [Node(first + i) for i in range(size)], True))
        probabilities += [0.9 / size / (1 + i % 3) for i in range(size)]
    wanted = torch.tensor(probabilities, dtype=torch.float64)
    whole = compensate(roots, wanted)
    monkeypatch.setattr(compensation, "ENTRIES", 30)
    parts = compensate(roots, wanted)
    torch.testing.assert_close(parts.firing_probabilities, whole.firing_probabilities)
    for root in roots:
        members = root.get_all_feature_indices()
        assert winning(whole.firing_probabilities[members].tolist()) == pytest.approx(wanted[members].tolist())


def test_no_forest_and_deep_forests():
    wanted = torch.tensor([0.5, 0.25])
    assert torch.equal(compensate([], wanted).firing_probabilities, wanted)
    tree = Node(0)
    for i in range(1, 2000):
        tree = Node(i, [tree])
    firing, _ = compensate([tree], torch.full((2000,), 0.2))
    assert firing[:-1].eq(1).all()
    assert float(firing[-1]) == pytest.approx(0.2)


def test_complaints():
    with pytest.raises(UnweaveError, match=r"at least \(3,\) for this hierarchy, got shape \(2,\)"):
        compensate([Node(2)], torch.ones(2))
    for wrong in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(UnweaveError, match=rf"must be in \(0, 1\], got {wrong:g} for feature 1"):
            compensate([Node(0)], torch.tensor([0.5, wrong]))
