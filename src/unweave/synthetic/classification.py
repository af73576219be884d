"""Each latent as a classifier of the true feature it is most similar to.

A latent says "present" where its code is not 0; the truth is that the feature is above 0. Only entries are looked at:
true positives are looked up, and everything else follows from three counts. Samples of which nothing fires, on either
side, count like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae import SparseCodes
from unweave.synthetic.joint import as_codes, check_same_rows, values_at
from unweave.synthetic.matching import best_features


@dataclass(frozen=True)
class ClassificationMetrics:
    """Means over latents; a ratio that is undefined (0/0) counts as 0.

    Attributes:
        precision: Share of a latent's firings on which its feature is present.
        recall: Share of its feature's appearances on which the latent fires.
        f1_score: Harmonic mean of the two, latent by latent.
        accuracy: Share of all samples that the latent gets right. Where features are rare, nearly all of it is true
            negatives: a dead latent has an accuracy of 1 minus its feature's rate.
    """

    precision: float
    recall: float
    f1_score: float
    accuracy: float


class LatentClassification(NamedTuple):
    """The metrics of each latent, in float64."""

    precision: Float64[Tensor, " m"]
    recall: Float64[Tensor, " m"]
    f1_score: Float64[Tensor, " m"]
    accuracy: Float64[Tensor, " m"]


class ClassificationMetricsCalculator:
    """Counts over batches, from which precision, recall, F1 and accuracy follow.

    Args:
        sae_decoder: Decoder `(m, d)`, one row for each latent.
        gt_features: True features `(f, d)`.

    Attributes:
        best: The feature with the largest `|cos|` to each latent, `(m,)`.
        n_samples: Samples added.
        true_positives: Samples on which a latent and its feature are both active, `(m,)`, int64.
        fired: Samples on which a latent is active, `(m,)`, int64.
        present: Samples on which a feature is active, `(f,)`, int64.
    """

    def __init__(self, sae_decoder: Float[Tensor, "m d"], gt_features: Float[Tensor, "f d"]) -> None:
        self.best: Int64[Tensor, " m"] = best_features(sae_decoder, gt_features)[0]
        self.n_samples = 0
        self.true_positives = torch.zeros_like(self.best)
        self.fired = torch.zeros_like(self.best)
        self.present = self.best.new_zeros(len(gt_features))

    def add_batch(self, sae_latents: Tensor | SparseCodes, gt_feature_acts: Tensor | SparseCodes) -> None:
        """Add the codes `(n, m)` and the true activations `(n, f)` of the same samples: dense, COO or `SparseCodes`.

        Raises:
            UnweaveError: If the numbers of samples differ, or a width is not the expected one.
        """
        latents, features = (as_codes(x).to(self.best.device) for x in (sae_latents, gt_feature_acts))
        check_same_rows(latents, features, len(self.best), len(self.present))
        features = features.where(features.values > 0)
        hits = values_at(features, latents.rows, self.best[latents.indices]) > 0
        self.n_samples += latents.n_rows
        self.true_positives += torch.bincount(latents.indices[hits], minlength=len(self.best))
        self.fired += latents.firing_counts()
        self.present += features.firing_counts()

    @property
    def live(self) -> Bool[Tensor, " m"]:
        """Which latents have fired."""
        return self.fired > 0

    def per_latent(self) -> LatentClassification:
        """The metrics of each latent.

        Raises:
            UnweaveError: If no sample was added.
        """
        if self.n_samples == 0:
            raise UnweaveError("there are no samples to compute classification metrics from.")
        both, fired, present = self.true_positives.double(), self.fired.double(), self.present[self.best].double()
        # Wherever a denominator is 0, so is its numerator, and the ratio counts as 0.
        return LatentClassification(
            precision=both / fired.clamp(min=1),
            recall=both / present.clamp(min=1),
            f1_score=2 * both / (fired + present).clamp(min=1),
            accuracy=1 - (fired + present - 2 * both) / self.n_samples,
        )

    def compute(self, live_only: bool = False) -> ClassificationMetrics:
        """Means over all latents, or over those that fired; without any, all are 0."""
        chosen = self.live if live_only else torch.ones_like(self.live)
        if not bool(chosen.any()):
            return ClassificationMetrics(0.0, 0.0, 0.0, 0.0)
        return ClassificationMetrics(*(float(values[chosen].mean()) for values in self.per_latent()))


def compute_classification_metrics(
    sae_latents: Tensor | SparseCodes,
    gt_feature_acts: Tensor | SparseCodes,
    sae_decoder: Float[Tensor, "m d"],
    gt_features: Float[Tensor, "f d"],
) -> ClassificationMetrics:
    """`ClassificationMetricsCalculator` on one batch: means over all latents.

    Args:
        sae_latents: Codes `(n, m)`.
        gt_feature_acts: True activations `(n, f)` of the same samples.
        sae_decoder: Decoder, one row for each latent.
        gt_features: True features.
    """
    calculator = ClassificationMetricsCalculator(sae_decoder, gt_features)
    calculator.add_batch(sae_latents, gt_feature_acts)
    return calculator.compute()
