"""Every number that a report publishes, as one pure function from sums to a number or None.

The decorator gives a metric its place in the report, its definition's id and the definition in words; no two metrics
share an id. None means "not computed" or "undefined here": never -1, 0 or NaN. Definitions follow the exact forms
(ratios of sums over all tokens, raw space); SAEBench's per-batch explained variance stays under its own name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from unweave.evaluation.behaviour import BehaviourSums
from unweave.evaluation.density import feature_density
from unweave.evaluation.sums import CodeSums, ReconstructionSums
from unweave.evaluation.weights import WeightCosines

Number = float | None
F = TypeVar("F", bound=Callable[[Any], float | None])

MIN_VARIANCE = 1e-10
"""Variance per token and dimension at or below which the data counts as constant."""
MIN_DAMAGE = 1e-6
"""Nats that the ablation must cost, or else there is nothing to recover."""


@dataclass(frozen=True)
class Metric:
    """A number of the report.

    Attributes:
        name: `group/name`.
        id: The definition's id, such as `explained_variance@exact-1`; another definition would have another id.
        definition: The definition in words; `{n}` stands for the number of tokens.
        function: From the group's sums to the number.
    """

    name: str
    id: str
    definition: str
    function: Callable[[Any], Number]

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]


METRICS: list[Metric] = []


def metric(group: str, version: str, definition: str) -> Callable[[F], F]:
    """Publish a function as the metric of its name in `group`."""

    def register(function: F) -> F:
        name = function.__name__
        METRICS.append(Metric(f"{group}/{name}", f"{name}@{version}", definition, function))
        return function

    return register


def compute(
    reconstruction: ReconstructionSums, codes: CodeSums, behaviour: BehaviourSums, weights: WeightCosines
) -> dict[str, Number]:
    """All metrics, by `group/name`."""
    sources = {
        "reconstruction": reconstruction, "shrinkage": reconstruction, "sparsity": codes, "behaviour": behaviour,
        "weights": weights,
    }  # fmt: skip
    return {m.name: m.function(sources[m.group]) for m in METRICS}


def definitions(n_tokens: int) -> dict[str, dict[str, str]]:
    """Id and definition in words of every metric, by `group/name`."""
    return {m.name: {"id": m.id, "definition": m.definition.format(n=f"{n_tokens:,}")} for m in METRICS}


def ratio(above: Tensor | float, below: Tensor | float) -> Number:
    """`above / below`, or None if that is not a finite number."""
    above, below = float(above), float(below)
    value = above / below if below else math.nan
    return value if math.isfinite(value) else None


# Reconstruction


@metric("reconstruction", "exact-1", "1 - Σ‖x - x̂‖² / Σ‖x - mean‖², one mean vector over all tokens, float64")
def explained_variance(sums: ReconstructionSums) -> Number:
    if float(sums.sse_baseline) <= MIN_VARIANCE * sums.n_tokens * sums.d_in:
        return 1.0 if sums.n_tokens and float(sums.sse_recon) == 0 else None
    unexplained = ratio(sums.sse_recon, sums.sse_baseline)
    return None if unexplained is None else 1 - unexplained


@metric("reconstruction", "exact-1", "fraction of variance unexplained: 1 - explained_variance@exact-1")
def fvu(sums: ReconstructionSums) -> Number:
    explained = explained_variance(sums)
    return None if explained is None else 1 - explained


@metric(
    "reconstruction",
    "saebench-legacy",
    "mean over tokens of 1 - ‖x - x̂‖²/‖x - mean of its forward pass‖², as SAEBench; depends on the pass's size",
)
def explained_variance_legacy(sums: ReconstructionSums) -> Number:
    return ratio(sums.sum_legacy, sums.n_legacy)


@metric("reconstruction", "sum-d-1", "‖x - x̂‖², summed over d_in, mean over tokens")
def mse(sums: ReconstructionSums) -> Number:
    return ratio(sums.sse_recon, sums.n_tokens)


@metric("reconstruction", "mean-d-1", "mse@sum-d-1 / d_in")
def mse_per_dim(sums: ReconstructionSums) -> Number:
    return ratio(sums.sse_recon, sums.n_tokens * sums.d_in)


@metric("reconstruction", "mean-1", "mean over tokens of cos(x, x̂), tokens with a zero vector left out")
def cosine(sums: ReconstructionSums) -> Number:
    return ratio(sums.sum_cosine, sums.n_cosine)


# Shrinkage


@metric("shrinkage", "mean-1", "mean over tokens of ‖x‖")
def l2_norm_in(sums: ReconstructionSums) -> Number:
    return ratio(sums.sum_norm_in, sums.n_tokens)


@metric("shrinkage", "mean-1", "mean over tokens of ‖x̂‖")
def l2_norm_out(sums: ReconstructionSums) -> Number:
    return ratio(sums.sum_norm_out, sums.n_tokens)


@metric("shrinkage", "mean-1", "mean of ‖x̂‖/‖x‖ over tokens with ‖x‖ > 1e-6")
def l2_ratio(sums: ReconstructionSums) -> Number:
    return ratio(sums.sum_ratio, sums.n_ratio)


@metric("shrinkage", "sums-1", "Σ‖x̂‖² / Σ x·x̂ over all tokens (arXiv 2404.16014, eq. 10); 1 is unbiased")
def relative_reconstruction_bias(sums: ReconstructionSums) -> Number:
    return ratio(sums.sum_sq_out, sums.sum_dot)


# Sparsity


def _share_denser_than(sums: CodeSums, density: float) -> Number:
    return ratio((feature_density(sums) > density).sum(), sums.d_sae) if sums.n_tokens else None


def _share_of_firings_denser_than(sums: CodeSums, density: float) -> Number:
    counts = sums.counts()
    return ratio(counts[feature_density(sums) > density].sum(), counts.sum())


@metric("sparsity", "nonzero-1", "latents with a value ≠ 0, mean over tokens")
def l0(sums: CodeSums) -> Number:
    return ratio(sums.counts().sum(), sums.n_tokens)


@metric("sparsity", "abs-1", "Σ|code| over latents, mean over tokens, raw space, not weighted by decoder norms")
def l1(sums: CodeSums) -> Number:
    return ratio(sums.l1, sums.n_tokens)


@metric("sparsity", "sample-1", "share of latents that fire at least once in this sample of {n} tokens")
def frac_alive(sums: CodeSums) -> Number:
    return _share_denser_than(sums, 0)


@metric("sparsity", "sample-1", "latents that never fire in this sample of {n} tokens")
def n_dead(sums: CodeSums) -> Number:
    return int((sums.counts() == 0).sum()) if sums.n_tokens else None


@metric("sparsity", "sample-1", "latents that fire on more than 10 % of this sample of {n} tokens")
def n_dense(sums: CodeSums) -> Number:
    return int((feature_density(sums) > 0.1).sum()) if sums.n_tokens else None


@metric("sparsity", "nonzero-1", "share of latents that fire on more than 1 % of tokens")
def freq_over_1_percent(sums: CodeSums) -> Number:
    return _share_denser_than(sums, 0.01)


@metric("sparsity", "nonzero-1", "share of latents that fire on more than 10 % of tokens")
def freq_over_10_percent(sums: CodeSums) -> Number:
    return _share_denser_than(sums, 0.1)


@metric("sparsity", "nonzero-1", "share of all firings that come from latents firing on more than 1 % of tokens")
def normalized_freq_over_1_percent(sums: CodeSums) -> Number:
    return _share_of_firings_denser_than(sums, 0.01)


@metric("sparsity", "nonzero-1", "share of all firings that come from latents firing on more than 10 % of tokens")
def normalized_freq_over_10_percent(sums: CodeSums) -> Number:
    return _share_of_firings_denser_than(sums, 0.1)


# Behaviour of the model


def _recovered(clean: Tensor, sae: Tensor, ablated: Tensor, n: int) -> Number:
    """Share of the damage by ablation that the SAE avoids."""
    if n == 0 or not float(ablated - clean) / n >= MIN_DAMAGE:
        return None
    return ratio(ablated - sae, ablated - clean)


@metric("behaviour", "target-1", "cross-entropy of the unchanged model in nats, mean over unmasked target tokens")
def ce_loss_without_sae(sums: BehaviourSums) -> Number:
    return ratio(sums.ce_clean, sums.n_predictions)


@metric("behaviour", "target-1", "cross-entropy in nats with x̂ in place of x where x is unmasked")
def ce_loss_with_sae(sums: BehaviourSums) -> Number:
    return ratio(sums.ce_sae, sums.n_predictions)


@metric("behaviour", "target-zero-1", "cross-entropy in nats with 0 in place of x where x is unmasked")
def ce_loss_with_ablation(sums: BehaviourSums) -> Number:
    return ratio(sums.ce_ablated, sums.n_predictions)


@metric("behaviour", "zero-1", "loss recovered: (CE ablated - CE with SAE) / (CE ablated - CE without), ratio of means")
def ce_loss_score(sums: BehaviourSums) -> Number:
    return _recovered(sums.ce_clean, sums.ce_sae, sums.ce_ablated, sums.n_predictions)


@metric("behaviour", "target-1", "CE with SAE - CE without, in nats (Gemma Scope's delta LM loss)")
def delta_lm_loss(sums: BehaviourSums) -> Number:
    return ratio(sums.ce_sae - sums.ce_clean, sums.n_predictions)


@metric("behaviour", "clean-changed-1", "Σ p (log p - log q) in nats, p clean, q with x̂ in place of x")
def kl_div_with_sae(sums: BehaviourSums) -> Number:
    return ratio(sums.kl_sae, sums.n_predictions)


@metric("behaviour", "clean-changed-zero-1", "Σ p (log p - log q) in nats, p clean, q with 0 in place of x")
def kl_div_with_ablation(sums: BehaviourSums) -> Number:
    return ratio(sums.kl_ablated, sums.n_predictions)


@metric("behaviour", "zero-1", "(KL ablated - KL with SAE) / KL ablated")
def kl_div_score(sums: BehaviourSums) -> Number:
    return _recovered(torch.zeros(()), sums.kl_sae, sums.kl_ablated, sums.n_predictions)


# Weights


@metric("weights", "mean-1", "largest cosine of a latent's encoder vector with another's, mean over latents")
def average_max_encoder_cosine(weights: WeightCosines) -> Number:
    return ratio(weights.max_encoder.nanmean(), 1)


@metric("weights", "mean-1", "largest cosine of a latent's decoder vector with another's, mean over latents")
def average_max_decoder_cosine(weights: WeightCosines) -> Number:
    return ratio(weights.max_decoder.nanmean(), 1)


@metric("weights", "mean-1", "cosine of a latent's encoder and decoder vectors, mean over latents")
def average_encoder_decoder_cosine(weights: WeightCosines) -> Number:
    return ratio(weights.encoder_decoder.nanmean(), 1)
