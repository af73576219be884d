"""What makes a matrix one of correlations, full or low-rank plus diagonal."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.synthetic.correlation import TOLERATED_EIGENVALUE, LowRankCorrelationMatrix


def require_correlation_matrix(matrix: Float[Tensor, "n n"], num_features: int) -> None:
    """Check that a matrix is one of correlations.

    Raises:
        UnweaveError: If its shape is not `(num_features, num_features)`, or it is not finite, symmetric, 1 on the
            diagonal and positive semidefinite.
    """
    if matrix.shape != (num_features, num_features):
        raise UnweaveError(
            f"correlation_matrix must have the shape {(num_features, num_features)}, got {tuple(matrix.shape)}."
        )
    if not matrix.isfinite().all():
        raise UnweaveError(f"correlation_matrix has {int((~matrix.isfinite()).sum())} entries that are not finite.")
    off = float((matrix.diagonal().double() - 1).abs().max())
    if off > 1e-4:
        raise UnweaveError(f"correlation_matrix must be 1 on its diagonal, and is off by up to {off:.3g}.")
    skew = float((matrix - matrix.T).abs().max())
    if skew > 1e-4:
        raise UnweaveError(f"correlation_matrix must be symmetric, and differs from its transpose by up to {skew:.3g}.")
    smallest = float(torch.linalg.eigvalsh(matrix.double())[0])
    if smallest < 10 * TOLERATED_EIGENVALUE:  # rounding of the entries to float32 moves eigenvalues by about this
        raise UnweaveError(
            f"correlation_matrix must be positive semidefinite, and has the eigenvalue {smallest:.3g}; "
            "repair_correlation_matrix finds one that is."
        )


def require_low_rank_correlation(matrix: LowRankCorrelationMatrix, num_features: int) -> None:
    """Check that factor and diagonal are those of correlations.

    Raises:
        UnweaveError: If their shapes are not `(num_features, rank)` and `(num_features,)`, or they are not finite, the
            diagonal is negative, or with the factor's squares it does not sum to 1.
    """
    factor, diag = matrix
    if factor.ndim != 2 or len(factor) != num_features or diag.shape != (num_features,):
        raise UnweaveError(
            f"a low-rank correlation_matrix of num_features={num_features} has the shapes ({num_features}, rank) and "
            f"({num_features},), got {tuple(factor.shape)} and {tuple(diag.shape)}."
        )
    if not (factor.isfinite().all() and diag.isfinite().all()):
        raise UnweaveError("correlation_factor and correlation_diag must be finite, and are not.")
    if float(diag.min()) < 0:
        raise UnweaveError(f"correlation_diag must be at least 0, got {float(diag.min()):.3g}.")
    variance = factor.float().square().sum(1) + diag.float()
    tolerance = 1e-4 if factor.dtype in (torch.float32, torch.float64) else 2e-2
    off = float((variance - 1).abs().max())
    if off > tolerance:
        raise UnweaveError(
            "correlation_diag and the squares of correlation_factor's rows must sum to 1 for each feature, and are off "
            f"by up to {off:.3g}."
        )
