"""Features that fire together: a Gaussian copula, whose marginals are the requested probabilities.

Every row draws `z ~ N(0, C)`, and feature i fires where `z_i > t_i` with `P(N(0, 1) > t_i) = p_i`. C is given whole, or
as a factor and a diagonal, `C = F F^T + diag(delta)`. In the second form features are independent given the row's
`eps ~ N(0, I)`, and feature i then fires with `Phi(a)`, `a = (F_i eps - t_i) / sqrt(delta_i)`. Few of these are large.
They are picked out of the product, and all other cells are thinned out of a process at the common rate p0: as with
independent features, only what may fire is drawn.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from unweave import kernels
from unweave.synthetic.correlation import LowRankCorrelationMatrix
from unweave.synthetic.correlation_checks import require_correlation_matrix, require_low_rank_correlation
from unweave.synthetic.firing import OFTEN, Cells, sorted_points, union

_ROWS_AT_ONCE = 1024
_RARE = 1e-4  # float32 normals end near 5.8 standard deviations, and thin out before
_SHARES = [2.0**-i for i in range(1, 16)]
_LOOKED_AT = 1 << 16


def full_factor(matrix: Float[Tensor, "n n"], num_features: int) -> Float[Tensor, "n n"]:
    """A square root of a correlation matrix: `factor @ factor.T` is the matrix. float64, on the CPU.

    Raises:
        UnweaveError: If it is no correlation matrix of so many features.
    """
    require_correlation_matrix(matrix, num_features)
    matrix = matrix.detach().cpu().double()
    matrix = (matrix + matrix.T) / 2
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:  # singular, or a little less by rounding
        values, vectors = torch.linalg.eigh(matrix)
        factor = vectors * values.clamp(min=0).sqrt()
    return factor / factor.norm(dim=1, keepdim=True)  # variances of exactly 1, so that the marginals are exact


def thresholds(probabilities: Float[Tensor, " n_features"]) -> Float[Tensor, " n_features"]:
    """What a standard normal exceeds with these probabilities, float64; minus infinity where that is always."""
    return -torch.special.ndtri(probabilities.detach().cpu().double())


class FullCopula:
    """Firing with a full correlation matrix, at the cost of a dense (n_rows, n_features) product.

    Args:
        probabilities: Of each feature, in (0, 1].
        factor: A square root of the correlations of the normals, with rows of norm 1; see `full_factor`.
    """

    def __init__(
        self, probabilities: Float[Tensor, " n_features"], factor: Float[Tensor, "n_features n_features"]
    ) -> None:
        self.n_features = len(probabilities)
        dtype = torch.float64 if probabilities.min() < _RARE else torch.float32
        self._factor = factor.to(dtype)
        self._thresholds = thresholds(probabilities).to(dtype)

    def draw(self, n_rows: int, rng: torch.Generator) -> Cells:
        """The cells that fire on the next `n_rows` rows."""
        parts = []
        for start in range(0, n_rows, _ROWS_AT_ONCE):
            n = min(_ROWS_AT_ONCE, n_rows - start)
            normals = torch.randn(n, self.n_features, dtype=self._factor.dtype, generator=rng)
            fires = normals @ self._factor.T > self._thresholds
            parts.append(fires.flatten().nonzero().squeeze(1) + start * self.n_features)
        return union(*parts)


class LowRankCopula:
    """Firing with correlations `F F^T + diag(delta)`, without a dense (n_rows, n_features) tensor.

    Args:
        probabilities: Of each feature, in (0, 1].
        correlation: F, `(n_features, rank)`, and delta.

    Raises:
        UnweaveError: If they do not describe correlations.
    """

    def __init__(self, probabilities: Float[Tensor, " n_features"], correlation: LowRankCorrelationMatrix) -> None:
        self.n_features = len(probabilities)
        require_low_rank_correlation(correlation, self.n_features)
        p, factor, diag = (t.detach().cpu() for t in (probabilities, *correlation))
        factor, diag = factor.double(), diag.double()
        # Rounding of the entries shall not change the rates: variances are exactly 1. Without any variance of its own
        # a feature's chance would be a step, which a narrow slope stands in for.
        variance = factor.square().sum(1) + diag
        factor, diag = factor / variance.sqrt()[:, None], (diag / variance).clamp(min=1e-12)
        often, rare = p > OFTEN, p <= OFTEN
        weight, bias = (factor / diag.sqrt()[:, None]).float(), (-thresholds(p) / diag.sqrt()).float()
        self._often, self._rare = often.nonzero().squeeze(1), rare.nonzero().squeeze(1)
        self._weight_often, self._bias_often = weight[often], bias[often]
        self._weight, self._bias = weight[rare], bias[rare]
        self._p0 = _best_share(self._weight, self._bias) if len(self._rare) else 0.5

    def draw(self, n_rows: int, rng: torch.Generator) -> Cells:
        """The cells that fire on the next `n_rows` rows."""
        parts = []
        for start in range(0, n_rows, _ROWS_AT_ONCE):
            # The tails of float32 normals are too short.
            shape = min(_ROWS_AT_ONCE, n_rows - start), self._weight.shape[1]
            eps = torch.randn(shape, dtype=torch.float64, generator=rng).float()
            for rows, features in (self._frequent(eps, rng), *self._infrequent(eps, rng)):
                parts.append((rows + start) * self.n_features + features)
        return union(*parts)

    def _frequent(self, eps: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        p = torch.special.ndtr(torch.addmm(self._bias_often, eps, self._weight_often.T))
        rows, which = (torch.rand(p.shape, generator=rng) < p).nonzero().unbind(1)
        return rows, self._often[which]

    def _infrequent(self, eps: Tensor, rng: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        if not len(self._rare):
            return []
        bound = float(torch.special.ndtri(torch.tensor(self._p0, dtype=torch.float64)))
        # Above the bound, each cell by itself.
        large = kernels.encode_select(eps, self._weight.T, self._bias, kernels.Above(bound))
        keep = torch.rand(len(large.values), generator=rng) < torch.special.ndtr(large.values.double())
        rows = torch.repeat_interleave(torch.arange(len(eps)), large.counts)
        fired = [(rows[keep], self._rare[large.indices[keep]])]
        # Below it, the points of a process that reaches every cell with probability p0, kept with p / p0.
        m, rate = len(self._rare), -torch.log1p(torch.tensor(-self._p0, dtype=torch.float64))
        cells = torch.unique_consecutive((sorted_points(float(len(eps) * m * rate), rng) / rate).long())
        cells = cells[cells < len(eps) * m]
        rows, features = cells // m, cells % m
        offsets = torch.searchsorted(rows, torch.arange(len(eps) + 1))
        a = kernels.sddmm(features, offsets, eps, self._weight) + self._bias[features]
        uniform = torch.rand(len(a), dtype=torch.float64, generator=rng)
        keep = (a <= bound) & (uniform * self._p0 < torch.special.ndtr(a.double()))
        # A cell that rounding put on both sides of the bound is united with itself.
        fired.append((rows[keep], self._rare[features[keep]]))
        return fired


def _best_share(weight: Float[Tensor, "m rank"], bias: Float[Tensor, " m"]) -> float:
    """The p0 that leaves the fewest cells to look at: those with a probability above it, and p0 of all the others."""
    some = slice(None, None, max(1, len(bias) // _LOOKED_AT))
    spread = weight[some].double().norm(dim=1).clamp(min=1e-12)
    p0 = torch.tensor(_SHARES, dtype=torch.float64)
    above = torch.stack([torch.special.ndtr((bias[some] - b) / spread).mean() for b in torch.special.ndtri(p0)])
    return _SHARES[int((above + p0).argmin())]
