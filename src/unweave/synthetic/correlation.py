"""Which features fire together: correlation matrices of a Gaussian copula, full or low-rank plus diagonal.

The correlations are those of the Gaussian variables behind the firing. Two features that fire when theirs exceed a
threshold have firing correlations of the same sign, which are smaller.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.synthetic.arguments import own_generator, require_count, require_number, to_dtype

TOLERATED_EIGENVALUE = -1e-6  # below it a matrix counts as one that is not positive semidefinite
SMALLEST_EIGENVALUE = 1e-6  # what a repair leaves
SMALLEST_DIAGONAL = 0.01  # of a low-rank structure: each feature keeps some variance of its own


class LowRankCorrelationMatrix(NamedTuple):
    """The correlations `correlation_factor @ correlation_factor.T + diag(correlation_diag)`, never formed.

    Attributes:
        correlation_factor: `(num_features, rank)`.
        correlation_diag: `(num_features,)`, at least 0; with the squares of the factor's row it sums to 1.
    """

    correlation_factor: Float[Tensor, "num_features rank"]
    correlation_diag: Float[Tensor, " num_features"]


@dataclass(frozen=True)
class CorrelationMatrixStats:
    """How strong correlations are, over all pairs of different features.

    Attributes:
        rms_correlation: Root mean square.
        mean_correlation: Mean, in which signs cancel.
        num_features: Number of features.
    """

    rms_correlation: float
    mean_correlation: float
    num_features: int


def create_correlation_matrix_from_correlations(
    num_features: int,
    correlations: Mapping[tuple[int, int], float] | None = None,
    default_correlation: float = 0.0,
) -> Float[Tensor, "num_features num_features"]:
    """The correlation matrix of given pairs.

    Pairs chosen one by one may contradict each other. Then the matrix is repaired, see `repair_correlation_matrix`, and
    a warning says how far that moved a correlation at most.

    Args:
        num_features: Number of features.
        correlations: `{(i, j): r}`, for two different features in either order, with r from -1 to 1.
        default_correlation: Of all other pairs, from -1 to 1.

    Returns:
        `(num_features, num_features)`, float32.

    Raises:
        UnweaveError: If an index or a correlation is out of range, or a pair is given two correlations.
    """
    require_count("num_features", num_features)
    default = require_number("default_correlation", default_correlation, least=-1, most=1)
    matrix = torch.full((num_features, num_features), default, dtype=torch.float64).fill_diagonal_(1)
    pairs, values = [], []
    for (i, j), value in (correlations or {}).items():
        for index in (i, j):
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_features:
                raise UnweaveError(
                    f"correlations has the pair ({i!r}, {j!r}), and features go from 0 to {num_features - 1}."
                )
        if i == j:
            raise UnweaveError(f"correlations has the pair ({i}, {j}) of a feature with itself, which is always 1.")
        pairs.append((min(i, j), max(i, j)))
        values.append(require_number(f"correlations[{i}, {j}]", value, least=-1, most=1))
        if i > j and correlations and correlations.get((j, i), value) != value:
            raise UnweaveError(
                f"correlations has {value} for ({i}, {j}) and {correlations[j, i]} for ({j}, {i}), the same pair."
            )
    if pairs:
        i, j = torch.tensor(pairs).T
        matrix[i, j] = matrix[j, i] = torch.tensor(values, dtype=torch.float64)
    return _repaired(matrix).float()


def generate_random_correlations(
    num_features: int,
    positive_ratio: float = 0.5,
    uncorrelated_ratio: float = 0.3,
    min_correlation_strength: float = 0.1,
    max_correlation_strength: float = 0.8,
    seed: int | None = None,
) -> dict[tuple[int, int], float]:
    """Random correlations of random pairs, in exact numbers.

    Args:
        num_features: Number of features.
        positive_ratio: Share of the correlated pairs whose correlation is positive, rounded down to a whole number.
        uncorrelated_ratio: Share of all pairs that are left out, rounded down to a whole number.
        min_correlation_strength: Smallest absolute value, from 0 on.
        max_correlation_strength: Largest absolute value, up to 1; in between they are uniform.
        seed: Of the draws. None: from torch's global state.

    Returns:
        `{(i, j): r}` with `i < j`, in ascending order.

    Raises:
        UnweaveError: If an argument is out of range.
    """
    require_count("num_features", num_features)
    low, high = _strengths(positive_ratio, uncorrelated_ratio, min_correlation_strength, max_correlation_strength)
    generator = own_generator(seed)
    n_pairs = num_features * (num_features - 1) // 2
    n_correlated = n_pairs - int(n_pairs * uncorrelated_ratio)
    chosen = torch.randperm(n_pairs, generator=generator)[:n_correlated]
    values = low + (high - low) * torch.rand(n_correlated, generator=generator, dtype=torch.float64)
    values[int(n_correlated * positive_ratio) :] *= -1  # `chosen` is in random order, so these are random pairs
    chosen, order = chosen.sort()
    pairs = torch.triu_indices(num_features, num_features, 1)[:, chosen].T.tolist()
    return {(i, j): value for (i, j), value in zip(pairs, values[order].tolist(), strict=True)}


def generate_random_correlation_matrix(
    num_features: int,
    positive_ratio: float = 0.5,
    uncorrelated_ratio: float = 0.3,
    min_correlation_strength: float = 0.1,
    max_correlation_strength: float = 0.8,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> Float[Tensor, "num_features num_features"]:
    """A random correlation matrix: whether a pair is correlated, its sign and its strength, drawn for each by itself.

    But for very weak ones, such correlations contradict each other. Then the matrix is repaired, see
    `repair_correlation_matrix`, and a warning says how far that moved a correlation at most.

    Args:
        num_features: Number of features.
        positive_ratio: Probability that a correlation is positive.
        uncorrelated_ratio: Probability that a pair is not correlated.
        min_correlation_strength: Smallest absolute value, from 0 on.
        max_correlation_strength: Largest absolute value, up to 1; in between they are uniform.
        seed: Of the draws. None: from torch's global state.
        device: Of the result.
        dtype: Of the result.

    Returns:
        `(num_features, num_features)`.

    Raises:
        UnweaveError: If an argument is out of range.
    """
    require_count("num_features", num_features)
    low, high = _strengths(positive_ratio, uncorrelated_ratio, min_correlation_strength, max_correlation_strength)
    dtype = to_dtype(dtype)
    generator = own_generator(seed)
    n_pairs = num_features * (num_features - 1) // 2
    correlated, positive, strength = torch.rand(3, n_pairs, generator=generator, dtype=torch.float64)
    values = (low + (high - low) * strength) * torch.where(positive < positive_ratio, 1, -1)
    matrix = torch.zeros(num_features, num_features, dtype=torch.float64)
    matrix[torch.ones_like(matrix, dtype=torch.bool).triu_(1)] = values * (correlated >= uncorrelated_ratio)
    return _repaired((matrix + matrix.T).fill_diagonal_(1)).to(device, dtype)


def generate_random_low_rank_correlation_matrix(
    num_features: int,
    rank: int,
    correlation_scale: float = 0.075,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> LowRankCorrelationMatrix:
    """A random correlation structure for many features: `rank` common causes and a part of each feature's own.

    Rows of the factor whose squares leave a feature less than 0.01 of its own variance are shrunk to leave that, and a
    warning says how many.

    Args:
        num_features: Number of features, K.
        rank: Number of common causes.
        correlation_scale: Standard deviation of the factor's entries, at least 0. Correlations then have a root mean
            square of about `sqrt(rank) * correlation_scale ** 2`.
        seed: Of the draws. None: from torch's global state.
        device: Of the result. The draws are made on the CPU.
        dtype: Of the result.

    Returns:
        `correlation_factor`, `(K, rank)`, and `correlation_diag`, `(K,)`.

    Raises:
        UnweaveError: If an argument is out of range.
    """
    require_count("num_features", num_features)
    require_count("rank", rank)
    require_number("correlation_scale", correlation_scale, least=0)
    dtype = to_dtype(dtype)
    factor = torch.randn(num_features, rank, generator=own_generator(seed)) * correlation_scale
    shared = factor.square().sum(1)
    crowded = shared > 1 - SMALLEST_DIAGONAL
    if crowded.any():
        warnings.warn(
            f"{int(crowded.sum())} of {num_features} features have almost no variance of their own at rank={rank} and "
            f"correlation_scale={correlation_scale}: their factors were shrunk, by {float(shared.max()) ** 0.5:.3g} at "
            "most.",
            stacklevel=2,
        )
        factor[crowded] *= ((1 - SMALLEST_DIAGONAL) / shared[crowded]).sqrt().unsqueeze(1)
    factor = factor.to(dtype)
    diag = (1 - factor.float().square().sum(1)).to(dtype)
    return LowRankCorrelationMatrix(factor.to(device), diag.to(device))


def _strengths(
    positive_ratio: float, uncorrelated_ratio: float, min_correlation_strength: float, max_correlation_strength: float
) -> tuple[float, float]:
    require_number("positive_ratio", positive_ratio, least=0, most=1)
    require_number("uncorrelated_ratio", uncorrelated_ratio, least=0, most=1)
    low = require_number("min_correlation_strength", min_correlation_strength, least=0, most=1)
    high = require_number("max_correlation_strength", max_correlation_strength, least=0, most=1)
    if low > high:
        raise UnweaveError(f"min_correlation_strength must be at most max_correlation_strength={high}, got {low}.")
    return low, high


def repair_correlation_matrix(matrix: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n n"], float]:
    """The matrix made positive definite, and the largest change of a correlation that this took.

    Eigenvalues below 1e-6 are raised to it and the rows and columns are scaled back to a diagonal of 1, unless none is
    below -1e-6.

    Args:
        matrix: Symmetric, with a diagonal of 1.

    Returns:
        The matrix in its dtype (computed in float64), and the largest absolute change; 0 if nothing needed a repair.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    if values[0] >= TOLERATED_EIGENVALUE:
        return matrix, 0.0
    repaired = (vectors * values.clamp(min=SMALLEST_EIGENVALUE)) @ vectors.T
    scale = repaired.diagonal().rsqrt()
    repaired = (repaired + repaired.T) / 2 * (scale * scale.unsqueeze(1))  # symmetric to the last bit
    repaired.fill_diagonal_(1)
    return repaired.to(matrix.dtype), float((repaired - matrix).abs().max())


def _repaired(matrix: Tensor) -> Tensor:
    repaired, change = repair_correlation_matrix(matrix)
    if change:
        i, j = divmod(int((repaired - matrix).abs().argmax()), len(matrix))
        warnings.warn(
            "the correlations contradict each other (their matrix is not positive semidefinite) and were changed by up "
            f"to {change:.3g}: that of features {i} and {j} from {matrix[i, j]:.3g} to {repaired[i, j]:.3g}.",
            stacklevel=3,
        )
    return repaired


def compute_correlation_matrix_stats(correlation_matrix: Float[Tensor, "n n"]) -> CorrelationMatrixStats:
    """Root mean square and mean of the correlations off the diagonal; 0 for a single feature.

    Raises:
        UnweaveError: If the matrix is not square.
    """
    if correlation_matrix.ndim != 2 or len(set(correlation_matrix.shape)) != 1 or not len(correlation_matrix):
        raise UnweaveError(f"correlation_matrix must be square, got the shape {tuple(correlation_matrix.shape)}.")
    n = len(correlation_matrix)
    off = correlation_matrix.double() - torch.diag(correlation_matrix.diagonal()).double()
    return _stats(float(off.square().sum()), float(off.sum()), n)


def compute_low_rank_correlation_matrix_stats(correlation_matrix: LowRankCorrelationMatrix) -> CorrelationMatrixStats:
    """The same of a low-rank structure, from `F.T @ F` and the sums of F alone."""
    factor = correlation_matrix.correlation_factor.double()
    own = factor.square().sum(1)
    squares = (factor.T @ factor).square().sum() - own.square().sum()
    return _stats(float(squares), float(factor.sum(0).square().sum() - own.sum()), len(factor))


def _stats(sum_of_squares: float, total: float, n: int) -> CorrelationMatrixStats:
    n_pairs = max(n * (n - 1), 1)
    return CorrelationMatrixStats(math.sqrt(max(sum_of_squares, 0.0) / n_pairs), total / n_pairs, n)
