"""How well an SAE recovers a world whose features are known: every number from one streamed pass.

The data are `x = Σ_j a_j v_j + bias`, and nothing is added to them, so explained variance is that of the activations
as the SAE sees them. Rows of zero norm (nothing fires and there is no bias) count in L0, in classification and in
explained variance; only shrinkage leaves them out, because they have no ratio. Their number is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.evaluation.metrics import explained_variance, ratio
from unweave.evaluation.sums import ReconstructionSums
from unweave.sae import SAE
from unweave.synthetic.absorption import HierarchyCalculator, HierarchyScores
from unweave.synthetic.classification import ClassificationMetrics, ClassificationMetricsCalculator
from unweave.synthetic.coefficients import CoefficientCalculator
from unweave.synthetic.counters import L0Calculator
from unweave.synthetic.matching import match

if TYPE_CHECKING:
    from unweave.synthetic.dictionary import FeatureDictionary
    from unweave.synthetic.generator import ActivationGenerator
    from unweave.synthetic.hierarchy import Hierarchy
    from unweave.synthetic.node import HierarchyNode

BATCH_SIZE = 4096


class ActivationScaler(Protocol):
    """A change of units between the world and the SAE, linear and without an offset (SAELens' scaler is one)."""

    def scale(self, acts: Tensor) -> Tensor:
        """From the world's activations to the SAE's."""
        ...

    def unscale(self, acts: Tensor) -> Tensor:
        """Back."""
        ...


@dataclass(frozen=True)
class SyntheticDataEvalResult:
    """How well an SAE recovers known features. Samples are N, latents M, features F.

    Attributes:
        true_l0: Mean number of features that fire on a sample.
        sae_l0: Mean number of latents that fire (code not 0) on a sample.
        dead_latents: Latents that never fired.
        shrinkage: Mean of `‖x̂‖/‖x‖` over samples with `‖x‖ > 1e-6`; None if there are none.
        explained_variance: `1 - Σ‖x - x̂‖² / Σ‖x - mean‖²` over all samples; None for constant data.
        mcc: Mean correlation coefficient: `|cos|` of decoder rows and features, one-to-one matched so that its sum is
            largest, mean over the `min(M, F)` pairs.
        uniqueness: Distinct features that are some latent's best match, divided by M.
        classification: Precision, recall, F1 and accuracy of each latent as a classifier of its best-matching feature,
            means over all M latents.
        classification_live: The same over the latents that fired.
        mcc_over_features: The same sum divided by F: a feature that no latent is left for counts as 0.
        mcc_live: Mean over the matched pairs whose latent fired; None if none did.
        uniqueness_bound: The largest uniqueness there can be, `min(1, F / M)`.
        coefficient_slope: Slope of codes on true magnitudes, mean over the matched pairs that were active together (see
            `CoefficientCalculator`); 1 is unbiased, None if there is no such pair.
        matching: "hungarian", or "greedy" where M or F is above 20,000; `mcc` is then a lower bound.
        num_samples: N.
        zero_norm_samples: Samples with `‖x‖` of at most 1e-6.
        seed: Seed of the stream that was sampled.
        hierarchy: Absorption and splitting, if a hierarchy was given.
    """

    true_l0: float
    sae_l0: float
    dead_latents: int
    shrinkage: float | None
    explained_variance: float | None
    mcc: float
    uniqueness: float
    classification: ClassificationMetrics
    classification_live: ClassificationMetrics
    mcc_over_features: float
    mcc_live: float | None
    uniqueness_bound: float
    coefficient_slope: float | None
    matching: Literal["hungarian", "greedy"]
    num_samples: int
    zero_norm_samples: int
    seed: int
    hierarchy: HierarchyScores | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, nested as the attributes are."""
        return asdict(self)

    def to_log_dict(self, prefix: str = "") -> dict[str, float | int]:
        """Every number that is defined, flat: parts are joined with `/`, and `prefix` is put in front as it is."""
        flat: dict[str, float | int] = {}
        for name, value in self.to_dict().items():
            for part, number in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number, float | int):
                    flat[f"{prefix}{name}/{part}".rstrip("/")] = number
        return flat


@torch.no_grad()
def eval_sae_on_synthetic_data(
    sae: SAE,
    feature_dict: FeatureDictionary,
    activations_generator: ActivationGenerator,
    num_samples: int = 100_000,
    batch_size: int | None = None,
    activation_scaler: ActivationScaler | None = None,
    seed: int = 0,
    *,
    hierarchy: Hierarchy | HierarchyNode | Sequence[HierarchyNode] | None = None,
) -> SyntheticDataEvalResult:
    """Score an SAE against the features that its data are made of.

    Two evaluations with the same seed and batch size see the same samples, whatever was drawn before, and leave
    `activations_generator` where it is.

    Args:
        sae: The SAE, for raw activations of the world.
        feature_dict: The true features.
        activations_generator: What fires. A fork of it is sampled.
        num_samples: Samples to evaluate on.
        batch_size: Samples at a time; None: 4096.
        activation_scaler: Change of units between the world and the SAE.
        seed: Seed of the fork. The default is the same for everybody, so that numbers can be compared.
        hierarchy: Trees of the features, for absorption and splitting.

    Raises:
        UnweaveError: If a number is not positive, or widths do not fit.
    """
    batch_size = BATCH_SIZE if batch_size is None else batch_size
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value < 1:
            raise UnweaveError(f"{name} must be at least 1, got {value}.")
    check_world(feature_dict, activations_generator, sae.d_in)
    decoder = sae.W_dec.detach()
    if activation_scaler is not None:
        decoder = activation_scaler.unscale(decoder)
    features = feature_dict.feature_vectors.detach().to(sae.device)
    matching = match(decoder, features)
    classification = ClassificationMetricsCalculator(decoder, features)
    coefficients = CoefficientCalculator(matching, decoder, features)
    families = None if hierarchy is None else HierarchyCalculator(hierarchy, matching, sae.d_sae, len(features))
    true_l0, sae_l0, reconstruction = L0Calculator(), L0Calculator(), ReconstructionSums()

    stream = activations_generator.fork(seed)
    for start in range(0, num_samples, batch_size):
        truth = stream.sample_codes(min(batch_size, num_samples - start))
        x = feature_dict(truth).to(sae.device)
        truth = truth.firing().to(sae.device)
        scaled = x if activation_scaler is None else activation_scaler.scale(x)
        codes = sae.encode_sparse(scaled).firing()
        x_hat = sae.output(codes, scaled)
        reconstruction.update(x, x_hat if activation_scaler is None else activation_scaler.unscale(x_hat))
        true_l0.add_batch(truth)
        sae_l0.add_batch(codes)
        classification.add_batch(codes, truth)
        coefficients.add_batch(codes, truth)
        if families is not None:
            families.add_batch(codes, truth)

    similarity, live = matching.similarity.double(), classification.live.cpu()[matching.a]
    return SyntheticDataEvalResult(
        true_l0=true_l0.compute(),
        sae_l0=sae_l0.compute(),
        dead_latents=int((~classification.live).sum()),
        shrinkage=ratio(reconstruction.sum_ratio, reconstruction.n_ratio),
        explained_variance=explained_variance(reconstruction),
        mcc=float(similarity.mean()),
        uniqueness=len(classification.best.unique()) / sae.d_sae,
        classification=classification.compute(),
        classification_live=classification.compute(live_only=True),
        mcc_over_features=float(similarity.sum()) / len(features),
        mcc_live=float(similarity[live].mean()) if bool(live.any()) else None,
        uniqueness_bound=min(1.0, len(features) / sae.d_sae),
        coefficient_slope=coefficients.compute(),
        matching=matching.method,
        num_samples=num_samples,
        zero_norm_samples=num_samples - int(reconstruction.n_ratio),
        seed=seed,
        hierarchy=None if families is None else families.compute(classification),
    )


def check_world(
    feature_dict: FeatureDictionary, activations_generator: ActivationGenerator, d_in: int | None = None
) -> None:
    """Refuse a generator that is not of the dictionary, or activations that are not of an SAE's width."""
    n_features, width = feature_dict.feature_vectors.shape
    if activations_generator.num_features != n_features:
        raise UnweaveError(
            f"the generator has {activations_generator.num_features} features and the dictionary {n_features}."
        )
    if d_in is not None and width != d_in:
        raise UnweaveError(f"the SAE takes activations of width {d_in}, and the dictionary's are of width {width}.")
