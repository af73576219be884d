import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unweave import UnweaveError
from unweave.synthetic.correlation import (
    LowRankCorrelationMatrix,
    compute_correlation_matrix_stats,
    compute_low_rank_correlation_matrix_stats,
    create_correlation_matrix_from_correlations,
    generate_random_correlation_matrix,
    generate_random_correlations,
    generate_random_low_rank_correlation_matrix,
    repair_correlation_matrix,
)
from unweave.synthetic.correlation_checks import require_correlation_matrix, require_low_rank_correlation

CONTRADICTION = {(0, 1): 0.9, (1, 2): 0.9, (0, 2): -0.9}


def test_given_pairs():
    matrix = create_correlation_matrix_from_correlations(4, {(0, 1): 0.5, (3, 2): -0.25}, default_correlation=0.125)
    expected = torch.full((4, 4), 0.125).fill_diagonal_(1)
    expected[0, 1] = expected[1, 0] = 0.5
    expected[2, 3] = expected[3, 2] = -0.25
    assert torch.equal(matrix, expected)
    assert torch.equal(create_correlation_matrix_from_correlations(3), torch.eye(3))
    assert create_correlation_matrix_from_correlations(1).tolist() == [[1.0]]


def test_a_repair_reports_the_largest_change():
    """pitfall_351: eigenvalues are clamped, and the correlations that this changes are not those asked for."""
    with pytest.warns(UserWarning, match="changed by up to") as warned:
        matrix = create_correlation_matrix_from_correlations(3, CONTRADICTION)
    asked = torch.tensor([[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]])
    change = float((matrix - asked).abs().max())
    assert change > 0.1
    text = str(warned[0].message)
    assert float(re.search(r"up to ([\d.]+):", text)[1]) == pytest.approx(change, rel=1e-2)
    i, j = map(int, re.search(r"features (\d) and (\d)", text).groups())
    assert abs(float(matrix[i, j] - asked[i, j])) == pytest.approx(change)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    require_correlation_matrix(matrix, 3)


@given(st.integers(2, 12), st.integers(0, 10_000))
def test_a_repair_gives_a_correlation_matrix(n, seed):
    generator = torch.Generator().manual_seed(seed)
    asked = torch.empty(n, n, dtype=torch.float64).uniform_(-1, 1, generator=generator).triu(1)
    asked = (asked + asked.T).fill_diagonal_(1)
    repaired, change = repair_correlation_matrix(asked)
    assert change == float((repaired - asked).abs().max())
    assert torch.equal(repaired, repaired.T)
    assert torch.equal(repaired.diagonal(), torch.ones(n, dtype=torch.float64))
    assert float(torch.linalg.eigvalsh(repaired)[0]) > (0 if change else -1e-6)
    again, change = repair_correlation_matrix(repaired)
    assert change == 0
    assert torch.equal(again, repaired)


def test_random_pairs_in_exact_numbers():
    """45 pairs: 13 left out, 32 correlated, of which 19 positive."""
    correlations = generate_random_correlations(10, 0.6, 0.3, 0.2, 0.7, seed=0)
    assert len(correlations) == 32
    assert sum(r > 0 for r in correlations.values()) == 19
    assert all(0 <= i < j < 10 for i, j in correlations)
    assert all(0.2 <= abs(r) <= 0.7 for r in correlations.values())
    assert correlations == generate_random_correlations(10, 0.6, 0.3, 0.2, 0.7, seed=0)
    assert correlations != generate_random_correlations(10, 0.6, 0.3, 0.2, 0.7, seed=1)
    assert generate_random_correlations(1) == {}
    assert generate_random_correlations(5, uncorrelated_ratio=1.0) == {}


def test_which_pairs_are_correlated_and_positive_is_random():
    """Every pair of 4 is chosen (of 6, 3) and positive (of 3, 2) about as often: 1200 seeds, binomial with a standard
    error of at most sqrt(0.25 / 1200); 5 of them on 12 numbers: 7e-6."""
    chosen, positive = torch.zeros(4, 4), torch.zeros(4, 4)
    for seed in range(1200):
        for (i, j), r in generate_random_correlations(4, 0.67, 0.5, seed=seed).items():
            chosen[i, j] += 1
            positive[i, j] += r > 0
    pairs = torch.ones(4, 4).triu(1) > 0
    bound = 5 * (0.25 / 1200) ** 0.5
    assert float((chosen[pairs] / 1200 - 1 / 2).abs().max()) < bound
    assert float((positive[pairs] / 1200 - 1 / 3).abs().max()) < bound


def test_a_random_matrix_has_the_shares_asked_for():
    """4950 pairs so weak that nothing needs a repair; 5 standard errors of each share: 6e-7 each."""
    matrix = generate_random_correlation_matrix(100, 0.7, 0.4, 0.01, 0.02, seed=0)
    values = matrix[torch.ones(100, 100).triu(1) > 0]
    correlated = values[values != 0]
    assert abs(len(correlated) / 4950 - 0.6) < 5 * (0.24 / 4950) ** 0.5
    assert abs(float((correlated > 0).float().mean()) - 0.7) < 5 * (0.21 / len(correlated)) ** 0.5
    assert float(correlated.abs().min()) >= 0.01
    assert float(correlated.abs().max()) <= 0.02
    require_correlation_matrix(matrix, 100)
    assert torch.equal(matrix, generate_random_correlation_matrix(100, 0.7, 0.4, 0.01, 0.02, seed=0))
    assert not torch.equal(matrix, generate_random_correlation_matrix(100, 0.7, 0.4, 0.01, 0.02, seed=1))


def test_a_strong_random_matrix_is_repaired():
    with pytest.warns(UserWarning, match="contradict each other") as warned:
        matrix = generate_random_correlation_matrix(30, seed=0, dtype="float64")
    assert matrix.dtype == torch.float64
    assert warned[0].filename == __file__
    require_correlation_matrix(matrix, 30)
    assert generate_random_correlation_matrix(1).tolist() == [[1.0]]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), (torch.float64, 1e-6), ("bfloat16", 1e-2)])
def test_low_rank(dtype, tolerance):
    low_rank = generate_random_low_rank_correlation_matrix(50, 8, 0.1, seed=0, dtype=dtype)
    factor, diag = low_rank
    assert (factor.shape, diag.shape) == ((50, 8), (50,))
    torch.testing.assert_close(factor.double().square().sum(1) + diag, torch.ones(50).double(), atol=tolerance, rtol=0)
    require_low_rank_correlation(low_rank, 50)
    assert torch.equal(factor, generate_random_low_rank_correlation_matrix(50, 8, 0.1, seed=0, dtype=dtype)[0])
    assert not torch.equal(factor, generate_random_low_rank_correlation_matrix(50, 8, 0.1, seed=1, dtype=dtype)[0])


def test_low_rank_keeps_some_variance_of_its_own():
    with pytest.warns(UserWarning, match="50 of 50 features have almost no variance of their own at rank=8 and"):
        low_rank = generate_random_low_rank_correlation_matrix(50, 8, 10.0, seed=0)
    torch.testing.assert_close(low_rank.correlation_diag, torch.full((50,), 0.01), atol=1e-5, rtol=0)
    require_low_rank_correlation(low_rank, 50)


def test_no_scale_is_no_correlation():
    low_rank = generate_random_low_rank_correlation_matrix(5, 2, 0)
    assert low_rank.correlation_diag.tolist() == [1.0] * 5
    assert compute_low_rank_correlation_matrix_stats(low_rank).rms_correlation == 0


def test_statistics():
    matrix = create_correlation_matrix_from_correlations(3, {(0, 1): 0.3, (0, 2): -0.6})
    stats = compute_correlation_matrix_stats(matrix)
    assert stats.rms_correlation == pytest.approx((2 * (0.3**2 + 0.6**2) / 6) ** 0.5)
    assert stats.mean_correlation == pytest.approx(-0.1)
    assert stats.num_features == 3
    assert compute_correlation_matrix_stats(torch.eye(1)).rms_correlation == 0


def test_statistics_of_low_rank_are_those_of_the_matrix():
    low_rank = generate_random_low_rank_correlation_matrix(40, 5, 0.2, seed=0, dtype="float64")
    matrix = low_rank.correlation_factor @ low_rank.correlation_factor.T + torch.diag(low_rank.correlation_diag)
    full, ours = compute_correlation_matrix_stats(matrix), compute_low_rank_correlation_matrix_stats(low_rank)
    assert ours.rms_correlation == pytest.approx(full.rms_correlation)
    assert ours.mean_correlation == pytest.approx(full.mean_correlation)
    assert ours.num_features == 40


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_correlation_matrix_from_correlations(0), "num_features must be .* got 0"),
        (
            lambda: create_correlation_matrix_from_correlations(3, {(0, 3): 0.1}),
            r"\(0, 3\), and features go from 0 to 2",
        ),
        (lambda: create_correlation_matrix_from_correlations(3, {(-1, 2): 0.1}), r"the pair \(-1, 2\)"),
        (lambda: create_correlation_matrix_from_correlations(3, {(1, 1): 0.5}), r"\(1, 1\) of a feature with itself"),
        (
            lambda: create_correlation_matrix_from_correlations(3, {(0, 1): 1.5}),
            r"correlations\[0, 1\] must .* got 1\.5",
        ),
        (
            lambda: create_correlation_matrix_from_correlations(3, {(0, 1): 0.1, (1, 0): 0.2}),
            r"0\.2 for \(1, 0\) and 0\.1 for \(0, 1\), the same pair",
        ),
        (
            lambda: create_correlation_matrix_from_correlations(3, {(1, 0): 0.1, (0, 1): 0.2}),
            r"0\.1 for \(1, 0\) and 0\.2 for \(0, 1\), the same pair",
        ),
        (lambda: create_correlation_matrix_from_correlations(3, None, -2), "default_correlation must .* got -2"),
        (lambda: generate_random_correlations(5, positive_ratio=1.1), "positive_ratio must .* at most 1, got 1.1"),
        (lambda: generate_random_correlation_matrix(5, 0.5, -0.1), "uncorrelated_ratio must .* got -0.1"),
        (
            lambda: generate_random_correlations(5, 0.5, 0.3, 0.9, 0.8),
            r"min_correlation_strength must be at most max_correlation_strength=0\.8, got 0\.9",
        ),
        (lambda: generate_random_correlation_matrix(5, 0.5, 0.3, 0.9, 1.2), "max_correlation_strength must .* got 1.2"),
        (lambda: generate_random_correlation_matrix(5, dtype="float31"), "did you mean 'float32'"),
        (lambda: generate_random_low_rank_correlation_matrix(5, 0), "rank must be a whole number .* got 0"),
        (lambda: generate_random_low_rank_correlation_matrix(5, 1, -1.0), "correlation_scale must .* got -1"),
        (lambda: compute_correlation_matrix_stats(torch.ones(2, 3)), r"must be square, got the shape \(2, 3\)"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(UnweaveError, match=message):
        make()


def altered(**entries):
    matrix = torch.eye(3)
    for place, value in entries.items():
        i, j = map(int, place[1:])
        matrix[i, j] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.eye(2), r"must have the shape \(3, 3\), got \(2, 2\)"),
        (altered(_00=torch.nan), "has 1 entries that are not finite"),
        (altered(_22=1.5), r"must be 1 on its diagonal, and is off by up to 0\.5"),
        (altered(_01=0.5), r"must be symmetric, and differs from its transpose by up to 0\.5"),
        (altered(_01=1.5, _10=1.5), r"must be positive semidefinite, and has the eigenvalue -0\.5"),
    ],
)
def test_what_is_no_correlation_matrix(matrix, message):
    with pytest.raises(UnweaveError, match=f"correlation_matrix {message}"):
        require_correlation_matrix(matrix, 3)


def test_a_singular_matrix_is_one_of_correlations():
    require_correlation_matrix(torch.ones(3, 3), 3)


@pytest.mark.parametrize(
    ("factor", "diag", "message"),
    [
        (torch.zeros(2, 1), torch.ones(3), r"shapes \(3, rank\) and \(3,\), got \(2, 1\) and \(3,\)"),
        (torch.zeros(3), torch.ones(3), r"got \(3,\) and \(3,\)"),
        (torch.zeros(3, 1), torch.tensor([1.0, 1.0, torch.inf]), "must be finite"),
        (torch.full((3, 1), 2**0.5), -torch.ones(3), "correlation_diag must be at least 0, got -1"),
        (torch.ones(3, 1), torch.ones(3), "must sum to 1 for each feature, and are off by up to 1"),
    ],
)
def test_what_is_no_low_rank_correlation(factor, diag, message):
    with pytest.raises(UnweaveError, match=message):
        require_low_rank_correlation(LowRankCorrelationMatrix(factor, diag), 3)
