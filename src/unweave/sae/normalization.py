"""How inputs are normalised beyond a common scale, and what of it can be folded into an SAE's weights afterwards.

    center                  scale * (x - mean)
    whiten                  scale * (x - mean) @ matrix              unit variance in every direction
    layer_norm              (x - mean of x) / (std of x + 1e-5)      each token by itself
    constant_norm_rescale   x * sqrt(d_in) / |x|                     each token by itself

The first two, in which `scale` gives E|x|^2 = d_in, are affine and fold exactly. The other two have a factor of their
own for every token, so they cannot be folded: the finished SAE applies them, and undoes them on its output, whenever it
runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError

PerToken = Literal["layer_norm", "constant_norm_rescale"]
Kind = Literal["center", "whiten", "layer_norm", "constant_norm_rescale"]
PER_TOKEN: tuple[str, ...] = get_args(PerToken)
_EPS, _RIDGE, _SINGULAR = 1e-5, 1e-3, 1e-10


class TokenStatistics(NamedTuple):
    """What a per-token normalisation takes out of each token, and gives back to its reconstruction."""

    shift: Float[Tensor, "n 1"]
    factor: Float[Tensor, "n 1"]
    """Multiplies `x - shift`."""
    spread: Float[Tensor, "n 1"]
    """Multiplies the reconstruction, before `shift` is added."""

    def apply(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The tokens, normalised."""
        return (x - self.shift) * self.factor

    def undo(self, x_hat: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Reconstructions in the units of the tokens."""
        return x_hat * self.spread + self.shift


def token_statistics(x: Float[Tensor, "n d"], kind: PerToken) -> TokenStatistics:
    """The statistics of each token; the standard deviation is the unbiased one, as in OpenAI's and SAELens' SAEs."""
    if kind == "layer_norm":
        shift = x.mean(1, keepdim=True)
        spread = (x - shift).square().sum(1, keepdim=True).div(max(x.shape[1] - 1, 1)).sqrt()
        return TokenStatistics(shift, 1 / (spread + _EPS), spread)
    norm = x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))  # a token of zeros stays one
    return TokenStatistics(torch.zeros_like(norm), 1 / norm, norm)


@dataclass(frozen=True, eq=False)
class Normalization:
    """What training does to its inputs; see `fit`.

    Attributes:
        kind: One of the names above.
        scale: Factor of the affine kinds; 1 for the per-token ones.
        mean: `(d,)`, subtracted first, for the affine kinds.
        matrix: `(d, d)`, float64, multiplied from the right at the end; None: the identity.
        inverse: Its inverse.
    """

    kind: Kind
    scale: float = 1.0
    mean: Float[Tensor, " d"] | None = None
    matrix: Float[Tensor, "d d"] | None = None
    inverse: Float[Tensor, "d d"] | None = None

    @property
    def per_token(self) -> PerToken | None:
        """The kind, if it cannot be folded and stays with the SAE."""
        return self.kind if self.kind in PER_TOKEN else None  # type: ignore[return-value]

    @classmethod
    def fit(cls, kind: Kind, sample: Float[Tensor, "n d"]) -> Normalization:
        """Measure what a kind needs on a sample of raw activations.

        Raises:
            UnweaveError: If a mean is to be subtracted and the sample is all the same, or if it is to be whitened and
                its covariance is singular.
        """
        if kind in PER_TOKEN:
            return cls(kind)
        x, (n, d) = sample.double(), sample.shape  # squares may leave float32's range
        mean = x.mean(0)
        mean_square = x.square().sum(1).mean().item()
        x = x - mean
        variance = x.square().sum(1).mean().item()
        if variance <= _SINGULAR * mean_square:
            raise UnweaveError("all activations of the first batch are the same: nothing is left without their mean.")
        scale = (d / variance) ** 0.5
        mean32 = mean.to(sample.dtype)
        if kind == "center":
            return cls(kind, scale, mean32)
        values, vectors = torch.linalg.eigh(x.T @ x * (scale**2 / n))
        if n <= d or values[0] <= _SINGULAR * values[-1]:
            raise UnweaveError(
                f"the covariance of the first {n:,} activations is singular (width {d}), so they cannot be whitened: "
                "take a larger first batch, or normalise otherwise."
            )
        spread = (values + _RIDGE).sqrt()
        return cls(kind, scale, mean32, vectors / spread, (vectors * spread).T)

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Normalised activations, a new tensor."""
        if self.per_token is not None:
            return token_statistics(x, self.per_token).apply(x)
        assert self.mean is not None
        x = (x - self.mean.to(x)) * self.scale
        return x if self.matrix is None else x @ self.matrix.to(x)

    def to(self, device: torch.device) -> Normalization:
        """The same on a device."""
        moved = {n: t.to(device) for n in ("mean", "matrix", "inverse") if (t := getattr(self, n)) is not None}
        return replace(self, **moved)

    def reversed(self) -> Normalization:
        """The affine map back to raw activations."""
        if self.mean is None:
            raise UnweaveError(f"{self.kind} has a factor of its own for every token, so no one map undoes it.")
        mean = -self.scale * self.mean.double()
        mean = mean if self.matrix is None else mean @ self.matrix
        return Normalization(self.kind, 1 / self.scale, mean, self.inverse, self.matrix)
