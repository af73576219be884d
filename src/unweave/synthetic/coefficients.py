"""How strongly a latent fires where its feature does: shrinkage of the code, apart from whether it fires at all."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from unweave.sae import SparseCodes
from unweave.synthetic.joint import as_codes, check_same_rows, values_at
from unweave.synthetic.matching import Matching


class CoefficientCalculator:
    """Slope of the regression, through the origin, of a latent's code on the true magnitude of its matched feature.

    Only the samples on which both are active count, `Σ c·a / Σ a²` over them with `c` the code and `a` the magnitude,
    each times the norm of its vector. A slope of 1 is unbiased, below 1 the code shrinks; a latent that fires too
    rarely has a low recall, but no lower slope. Without an intercept it is also defined for constant magnitudes. A
    latent that points against its feature has a negative slope.

    Args:
        matching: Latents (`a`) and the features (`b`) that they are matched with, one to one.
        sae_decoder: Decoder `(m, d)`.
        gt_features: True features `(f, d)`.
    """

    def __init__(
        self, matching: Matching, sae_decoder: Float[Tensor, "m d"], gt_features: Float[Tensor, "f d"]
    ) -> None:
        latents, features = matching.a.to(sae_decoder.device), matching.b.to(sae_decoder.device)
        decoder = sae_decoder.detach().double()
        truth = gt_features.detach().to(decoder.device)[features].double()  # of a million, only the matched ones
        norms = decoder.norm(dim=1)
        self.n_features = len(gt_features)
        self.feature_of = latents.new_full((len(decoder),), -1).index_put((latents,), features)
        sign = torch.linalg.vecdot(decoder[latents], truth).sign()
        # What a code and a magnitude contribute, along the feature and in units of its own vector.
        self._scale = norms.index_put((latents,), norms[latents] * sign / truth.norm(dim=1))
        self.sum_products = torch.zeros_like(norms)
        self.sum_squares = torch.zeros_like(norms)

    def add_batch(self, sae_latents: Tensor | SparseCodes, gt_feature_acts: Tensor | SparseCodes) -> None:
        """Add the codes `(n, m)` and the true activations `(n, f)` of the same samples: dense, COO or `SparseCodes`."""
        latents, features = (as_codes(x).to(self.feature_of.device) for x in (sae_latents, gt_feature_acts))
        check_same_rows(latents, features, len(self.feature_of), self.n_features)
        truth = values_at(features, latents.rows, self.feature_of[latents.indices]).double()
        both = truth > 0
        truth, which = truth[both], latents.indices[both]
        n = len(self.feature_of)
        self.sum_products += torch.bincount(which, weights=latents.values[both].double() * truth, minlength=n)
        self.sum_squares += torch.bincount(which, weights=truth.square(), minlength=n)

    @property
    def defined(self) -> Bool[Tensor, " m"]:
        """Which latents were active together with their feature at least once."""
        return self.sum_squares > 0

    def per_latent(self) -> Float64[Tensor, " m"]:
        """The slope of each latent; NaN where there is none."""
        slopes = self._scale * self.sum_products / self.sum_squares
        return torch.where(self.defined, slopes, torch.nan)

    def compute(self) -> float | None:
        """Mean over the pairs that were active together; None if there is no such pair."""
        slopes = self.per_latent()[self.defined]
        return float(slopes.mean()) if len(slopes) else None
