"""What firing should look like, against brute force: enumeration of a hierarchy, integrals of scipy."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from unweave.synthetic.correlation import generate_random_low_rank_correlation_matrix
from unweave.synthetic.expected import expected_correlations, expected_firing, firing_correlations
from unweave.synthetic.generator import ActivationGenerator
from unweave.synthetic.hierarchy import Hierarchy
from unweave.synthetic.node import HierarchyNode, walk
from unweave.synthetic.tables import tabulate

# 0 has exclusive children 1, 2 and 3; 1 has the child 4; 5 and 6 exclude each other at the top; 7 is free.
TREES = [
    HierarchyNode(
        0,
        [HierarchyNode(1, [HierarchyNode(4)], scale_children_by_parent=True), HierarchyNode(2), HierarchyNode(3)],
        mutually_exclusive_children=True,
    ),
    HierarchyNode(None, [HierarchyNode(5), HierarchyNode(6)], mutually_exclusive_children=True),
]
P = torch.tensor([0.5, 0.7, 0.3, 0.9, 0.4, 0.8, 0.6, 0.1])


def enumerated(p):
    """Rates by going through all outcomes; winners of a group are equally likely."""
    rates = np.zeros(len(p))
    for outcome in product([0, 1], repeat=len(p)):
        chance = np.prod([q if o else 1 - q for q, o in zip(p.tolist(), outcome, strict=True)])
        children = [i for i in (1, 2, 3) if outcome[i]] if outcome[0] else []
        tops = [i for i in (5, 6) if outcome[i]]
        rates[[0, 7]] += chance * np.array([outcome[0], outcome[7]])
        for i in children:
            rates[i] += chance / len(children)
            if i == 1 and outcome[4]:
                rates[4] += chance / len(children)
        for i in tops:
            rates[i] += chance / len(tops)
    return rates


def test_rates_under_a_hierarchy():
    generator = ActivationGenerator(8, P, seed=0)
    expected = expected_firing(generator, tabulate(walk(TREES)))
    np.testing.assert_allclose(expected.rates, enumerated(P), atol=1e-7)


def test_magnitudes_under_a_hierarchy():
    """Against a sample: the mean over n firings of std s is within 5 s / sqrt(n) (6e-7 for each feature)."""
    mean, std = torch.linspace(0.5, 2, 8), torch.linspace(1, 0.1, 8)
    hierarchy = Hierarchy(TREES, seed=0)
    generator = ActivationGenerator(8, P, std, mean, modify_activations=hierarchy.modifier, seed=0)
    expected = expected_firing(generator, tabulate(walk(TREES)))
    sample = generator.sample(40_000).double()
    fired = (sample > 0).sum(0)
    measured = sample.sum(0) / fired
    spread = (sample.square().sum(0) / fired - measured.square()).sqrt()
    assert ((measured - expected.magnitudes).abs() < 5 * spread / fired.sqrt()).all()
    assert abs(float(expected.magnitudes[4]) - float(mean[4])) > 0.1  # the scaling matters


def test_large_exclusive_groups():
    """With n rivals of equal rate q the chance to win is (1 - (1 - q)^n) / (n q)."""
    n, q = 200, 0.3
    trees = [HierarchyNode(None, [HierarchyNode(i) for i in range(n)], mutually_exclusive_children=True)]
    expected = expected_firing(ActivationGenerator(n, q, seed=0), tabulate(walk(trees)))
    np.testing.assert_allclose(expected.rates, np.full(n, (1 - (1 - q) ** n) / n), rtol=1e-6)


@pytest.mark.parametrize("r", [-0.9, -0.3, 0.0, 0.2, 0.95])
@pytest.mark.parametrize("p", [(0.5, 0.5), (0.01, 0.3), (0.9, 0.02)])
def test_correlations_of_firing(p, r):
    """Pr(both fire) from the bivariate normal distribution."""
    p = np.array(p)
    correlations = torch.tensor([[1.0, r], [r, 1.0]], dtype=torch.float64)
    found = firing_correlations(torch.tensor(p), correlations)
    thresholds = torch.special.ndtri(torch.tensor(p)).numpy()
    both = multivariate_normal.cdf(thresholds, mean=[0, 0], cov=correlations.numpy(), abseps=1e-12, releps=1e-12)
    expected = (both - p[0] * p[1]) / np.sqrt(p[0] * (1 - p[0]) * p[1] * (1 - p[1]))
    assert float(found[0, 1]) == float(found[1, 0]) == pytest.approx(expected, abs=2e-6)
    assert float(found[0, 0]) == 1


def test_where_correlations_come_from():
    low_rank = generate_random_low_rank_correlation_matrix(6, 2, 0.4, seed=0)
    chosen = torch.tensor([4, 1])
    by_factor = expected_correlations(ActivationGenerator(6, 0.2, correlation_matrix=low_rank, seed=0), chosen)
    factor = low_rank.correlation_factor
    full = (factor @ factor.T).fill_diagonal_(1)
    by_matrix = expected_correlations(ActivationGenerator(6, 0.2, correlation_matrix=full, seed=0), chosen)
    torch.testing.assert_close(by_factor, by_matrix, atol=1e-6, rtol=0)
    assert abs(float(by_factor[0, 1])) > 0.01
    assert torch.equal(expected_correlations(ActivationGenerator(6, 0.2, seed=0), chosen), torch.eye(2).double())
    modified = ActivationGenerator(6, 0.2, modify_activations=lambda batch: batch, seed=0)
    assert expected_correlations(modified, chosen) is None
