"""What is random is compared with what was asked for at fixed seeds. Unless a test says otherwise, every comparison is
of a standardised difference with Z = 5, which a right sampler exceeds with probability 6e-7.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from torch import Tensor

from unweave import UnweaveError
from unweave.synthetic.copula import FullCopula, LowRankCopula, full_factor
from unweave.synthetic.correlation import LowRankCorrelationMatrix, generate_random_low_rank_correlation_matrix
from unweave.synthetic.firing import Firing, Independent, sorted_points, union

Z = 5.0


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fired(firing: Firing, n_features: int, n_rows: int, seed: int = 0) -> Tensor:
    """Dense (n_rows, n_features), after checking that cells ascend, which also means each is there once."""
    cells = firing.draw(n_rows, rng(seed))
    assert cells.dtype == torch.int64
    assert (cells.diff() > 0).all()
    dense = torch.zeros(n_rows * n_features, dtype=torch.bool)
    dense[cells] = True
    return dense.view(n_rows, n_features)


def assert_rates(hits: Tensor, n: int, p: Tensor) -> None:
    """Counts of a binomial with n trials."""
    p = p.double()
    spread = (n * p * (1 - p)).sqrt().clamp(min=1e-9)
    assert ((hits - n * p).abs() / spread).max() < Z


def joint_counts(fires: Tensor) -> Tensor:
    return fires.double().T @ fires.double()


MIXED = torch.tensor([0.5, 1e-4, 0.9, 0.03, 1.0, 0.2, 0.51, 0.003, 1.0, 0.4999])


def test_independent_features_fire_at_their_rates_and_independently():
    n = 400_000
    fires = fired(Independent(MIXED), len(MIXED), n)
    assert_rates(fires.sum(0), n, MIXED)
    p = MIXED.double()
    pairs = torch.triu_indices(len(p), len(p), 1)
    assert_rates(joint_counts(fires)[tuple(pairs)], n, p[pairs[0]] * p[pairs[1]])
    # Rows are independent too.
    assert_rates((fires[1:] & fires[:-1]).sum(0)[p < 1], n - 1, (p * p)[p < 1] * 1.0)


def test_all_patterns_of_independent_features():
    p, n = torch.tensor([0.3, 0.7, 0.1, 0.45]), 300_000
    patterns = fired(Independent(p), 4, n).long() @ torch.tensor([1, 2, 4, 8])
    expected = torch.stack(
        [torch.stack([p[i] if code >> i & 1 else 1 - p[i] for i in range(4)]).prod() for code in range(16)]
    )
    assert_rates(torch.bincount(patterns, minlength=16), n, expected)


def test_many_features_of_very_different_rates():
    p = torch.logspace(-6, -0.4, 20_000)
    n, counts = 4096, torch.zeros(20_000)
    for seed in range(4):
        counts += torch.bincount(Independent(p).draw(n, rng(seed)) % 20_000, minlength=20_000)
    # Too rare by themselves for a normal limit: sums of 200 neighbours. Bonferroni over 100 of them is within Z.
    mean, spread = (4 * n * q.double().view(100, 200).sum(1) for q in (p, p * (1 - p)))
    assert ((counts.view(100, 200).sum(1) - mean).abs() / spread.sqrt()).max() < Z


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([1.0, 0.999, 0.75, 0.5, 0.1, 1e-3, 1e-8]), min_size=1, max_size=12),
    st.integers(1, 300),
    st.integers(0, 2**32),
)
def test_cells_ascend_within_range_and_certain_features_always_fire(p, n_rows, seed):
    cells = Independent(torch.tensor(p)).draw(n_rows, rng(seed))
    fires = fired(Independent(torch.tensor(p)), len(p), n_rows, seed)
    assert torch.equal(fires.flatten().nonzero().squeeze(1), cells)
    assert fires[:, torch.tensor(p) == 1].all()


def test_points_are_a_poisson_process():
    counts = torch.zeros(20_000)
    first_half = 0
    generator = rng()
    for i in range(20_000):
        points = sorted_points(3.0, generator)
        assert len(points) < 2 or (points.diff() >= 0).all()
        counts[i], first_half = len(points), first_half + int((points < 1.5).sum())
    assert abs(counts.mean() - 3) / (3 / 20_000) ** 0.5 < Z
    assert abs(counts.var() - 3) / ((3 + 2 * 9) / 20_000) ** 0.5 < Z  # the variance of a Poisson sample's variance
    assert abs(first_half - 30_000) / 30_000**0.5 < Z


def test_the_union_has_each_cell_once():
    assert union(torch.tensor([1, 4]), torch.tensor([0, 4, 9]), torch.tensor([], dtype=torch.int64)).tolist() == [
        0, 1, 4, 9,
    ]  # fmt: skip
    assert union().tolist() == []


def bivariate(p: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs i < j, and the probability that both fire."""
    pairs = list(itertools.combinations(range(len(p)), 2))
    low = torch.special.ndtri(p.double())  # -z > t where z < -t
    both = [
        multivariate_normal.cdf(
            [float(low[i]), float(low[j])], mean=[0, 0], cov=[[1, float(matrix[i, j])], [float(matrix[i, j]), 1]]
        )
        for i, j in pairs
    ]
    return torch.tensor(pairs).T, torch.tensor(both, dtype=torch.float64)


P = torch.tensor([0.3, 0.05, 0.01, 0.6, 0.2, 0.5])


def low_rank() -> LowRankCorrelationMatrix:
    factor = torch.tensor([[0.8, 0.0], [0.7, -0.3], [0.9, 0.2], [-0.6, 0.5], [0.0, 0.9], [0.1, -0.2]])
    return LowRankCorrelationMatrix(factor, 1 - factor.square().sum(1))


def matrix_of(correlation: LowRankCorrelationMatrix) -> Tensor:
    factor, diag = correlation
    return factor @ factor.T + diag.diag()


def assert_copula(firing: Firing, p: Tensor, matrix: Tensor, n: int = 300_000) -> None:
    fires = fired(firing, len(p), n)
    assert_rates(fires.sum(0), n, p)
    pairs, both = bivariate(p, matrix)
    assert_rates(joint_counts(fires)[tuple(pairs)], n, both)
    assert ((both - p[pairs[0]] * p[pairs[1]]).abs() > 0.01).any()  # it would notice if they were independent


def test_the_full_copula_has_the_bivariate_normals_joint_probabilities():
    matrix = matrix_of(low_rank())
    assert_copula(FullCopula(P, full_factor(matrix, len(P))), P, matrix)


@pytest.mark.parametrize("p0", [None, 2.0**-9, 0.5])
def test_the_low_rank_copula_has_them_too_however_cells_are_split(p0):
    firing = LowRankCopula(P, low_rank())
    firing._p0 = firing._p0 if p0 is None else p0
    assert_copula(firing, P, matrix_of(low_rank()))


def test_copulas_with_certain_and_with_rare_features():
    p = torch.tensor([1.0, 0.9, 2e-5, 0.01, 2e-5, 1.0])
    n = 1_000_000
    matrix = matrix_of(low_rank())
    expected = 1_000_000 * p.double()
    for firing in (LowRankCopula(p, low_rank()), FullCopula(p, full_factor(matrix, 6))):
        counts = torch.bincount(firing.draw(n, rng()) % 6, minlength=6)
        assert counts[[0, 5]].tolist() == [n, n]
        # A Poisson of mean 20 exceeds 20 +- 6 standard deviations with probability below 1e-5.
        assert ((counts - expected).abs() <= 6 * (expected * (1 - p)).sqrt()).all()


def test_low_rank_rates_of_many_features():
    k, n = 2000, 20_000
    p = torch.logspace(-3, -0.1, k)
    firing = LowRankCopula(p, generate_random_low_rank_correlation_matrix(k, 8, 0.15, seed=0))
    counts = torch.bincount(firing.draw(n, rng()) % k, minlength=k)
    common = p >= 2e-3  # from 40 expected hits on, near enough to normal for 6 to be a one in 1e6 event per feature
    spread = (n * p * (1 - p)).sqrt()
    assert ((counts - n * p).abs() / spread)[common].max() < 6


def test_features_that_are_one_and_the_same():
    """Singular matrices: a perfect correlation fires both, or exactly one of the two where it is -1."""
    matrix = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    fires = fired(FullCopula(torch.full((3,), 0.5), full_factor(matrix, 3)), 3, 1000)
    assert 0 < fires[:, 0].sum() < 1000
    assert torch.equal(fires[:, 0], fires[:, 1])
    assert torch.equal(fires[:, 0], ~fires[:, 2])


def test_a_feature_without_variance_of_its_own():
    one = LowRankCorrelationMatrix(torch.ones(2, 1), torch.zeros(2))
    fires = fired(LowRankCopula(torch.tensor([0.2, 0.2]), one), 2, 20_000)
    assert_rates(fires.sum(0), 20_000, torch.tensor([0.2, 0.2]))
    assert (fires[:, 0] != fires[:, 1]).sum() <= 2  # where eps is within 1e-5 of the threshold: 0.1 rows expected


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.eye(4), r"shape \(3, 3\), got \(4, 4\)"),
        (torch.ones(3), r"shape \(3, 3\), got \(3,\)"),
        (2 * torch.eye(3), "diagonal"),
        (torch.eye(3) + torch.tensor([[0.0, 0.3, 0], [0, 0, 0], [0, 0, 0]]), "symmetric"),
        (torch.tensor([[1.0, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]]), "positive semidefinite"),
        (torch.full((3, 3), torch.nan), "finite"),
    ],
)
def test_what_is_no_correlation_matrix_is_refused(matrix, message):
    with pytest.raises(UnweaveError, match=message):
        full_factor(matrix, 3)


@pytest.mark.parametrize(
    ("factor", "diag", "message"),
    [
        (torch.zeros(2, 1), torch.ones(3), "shapes"),
        (torch.zeros(3, 1), torch.ones(2), "shapes"),
        (torch.zeros(3, 1), torch.full((3,), 0.5), "sum to 1"),
        (torch.full((3, 1), 1.1), torch.full((3,), -0.21), "at least 0"),
    ],
)
def test_what_is_no_low_rank_correlation_is_refused(factor, diag, message):
    with pytest.raises(UnweaveError, match=message):
        LowRankCopula(torch.full((3,), 0.1), LowRankCorrelationMatrix(factor, diag))
