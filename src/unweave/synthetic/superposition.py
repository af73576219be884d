"""How far the features of a dictionary overlap: their cosines with each other, and the interference these cause."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.synthetic.arguments import own_generator, require_count, require_number
from unweave.synthetic.dictionary import FeatureDictionary
from unweave.synthetic.directions import blocks, directions_of
from unweave.synthetic.magnitudes import positive_gaussian_moments


@dataclass(frozen=True)
class SuperpositionStats:
    """The overlap of each of `n` features with all others, on the CPU. A feature that is alone overlaps by 0.

    Attributes:
        max_abs_cos_sims: Largest absolute cosine with another feature, `(n,)`.
        percentile_abs_cos_sims: `{percentile: (n,)}` of the absolute cosines with the others, between two of them by
            linear interpolation.
        mean_max_abs_cos_sim: Mean of the largest.
        mean_percentile_abs_cos_sim: `{percentile: mean}`.
        mean_abs_cos_sim: Mean absolute cosine of a feature with another.
        num_features: Number of features in the dictionary.
        hidden_dim: Width of its space.
        expected_interference: Mean square of what the other features add to a feature's projection, `(n,)`:
            `E[(sum_{j != i} a_j cos_ij)^2]`.
        mean_expected_interference: Its mean.
        feature_indices: Which features these are, ascending, `(n,)`, int64.
    """

    max_abs_cos_sims: Float[Tensor, " n"]
    percentile_abs_cos_sims: dict[float, Float[Tensor, " n"]]
    mean_max_abs_cos_sim: float
    mean_percentile_abs_cos_sim: dict[float, float]
    mean_abs_cos_sim: float
    num_features: int
    hidden_dim: int
    expected_interference: Float[Tensor, " n"]
    mean_expected_interference: float
    feature_indices: Int64[Tensor, " n"]


@torch.no_grad()
def compute_superposition_stats(
    feature_dictionary: FeatureDictionary,
    batch_size: int = 1024,
    device: torch.device | str | None = None,
    percentiles: Sequence[float] | None = None,
    *,
    num_sampled: int | None = None,
    seed: int | None = None,
    firing_probabilities: Float[Tensor, " num_features"] | float | None = None,
    mean_firing_magnitudes: Float[Tensor, " num_features"] | float = 1.0,
    std_firing_magnitudes: Float[Tensor, " num_features"] | float = 0.0,
) -> SuperpositionStats:
    """Exact statistics of the cosines between features, in blocks.

    A feature costs `2 K d` operations for K features in d dimensions and the selection of its largest cosines: in a
    dictionary of a million, look at a sample of them.

    Args:
        feature_dictionary: The features, none of them 0.
        batch_size: Features compared with all others at a time, fewer where their cosines would exceed 128 MiB.
        device: Where to compute. None: where the dictionary is.
        percentiles: From 0 to 100. None: 95 and 99.
        num_sampled: How many features, drawn without replacement, to compare with all others. None: every one.
        seed: Of that draw. None: from torch's global state.
        firing_probabilities: What `expected_interference` is for: features that fire independently of each other, with
            these probabilities. None: each other feature has the value 1 or -1, whichever at random, so that it is
            `sum_{j != i} cos_ij^2`.
        mean_firing_magnitudes: Mean of the Gaussian magnitudes, before they are taken given that they are positive.
        std_firing_magnitudes: Its standard deviation.

    Raises:
        UnweaveError: If an argument is out of range, or a feature is 0 or not finite.
    """
    require_count("batch_size", batch_size)
    wanted = [95, 99] if percentiles is None else list(percentiles)
    for percentile in wanted:
        require_number("percentiles", percentile, least=0, most=100)
    n, d = feature_dictionary.feature_vectors.shape
    vectors = directions_of("feature_vectors", feature_dictionary.feature_vectors, device)
    mean, variance = _moments(n, firing_probabilities, mean_firing_magnitudes, std_firing_magnitudes)
    mean, variance = mean.to(vectors), variance.to(vectors)

    chosen = torch.arange(n)
    if num_sampled is not None:
        if require_count("num_sampled", num_sampled) > n:
            raise UnweaveError(f"num_sampled must be at most num_features={n}, got {num_sampled}.")
        chosen = torch.randperm(n, generator=own_generator(seed))[:num_sampled].sort().values

    # Ranks from the largest, 0, of the n - 1 others. A feature's own entry is set to 0, which is never before another.
    ranks = [max(n - 2, 0) * (1 - percentile / 100) for percentile in wanted]
    n_largest = 1 + math.ceil(max(ranks, default=0))
    largest = torch.empty(len(chosen), 1 + len(ranks))
    interference = torch.empty(len(chosen))
    total = 0.0
    for part in blocks(len(chosen), n, batch_size):
        own = chosen[part].to(vectors.device)
        cosines = (vectors[own] @ vectors.T).clamp_(-1, 1).scatter_(1, own.unsqueeze(1), 0)
        interference[part] = (cosines.square() @ variance + (cosines @ mean).square()).cpu()
        total += float(cosines.abs_().sum(dtype=torch.float64))
        top = cosines.topk(n_largest, dim=1).values
        columns = [top[:, 0], *(_between(top, rank) for rank in ranks)]
        largest[part] = torch.stack(columns, 1).cpu()

    maximum, *middles = largest.unbind(1)
    return SuperpositionStats(
        max_abs_cos_sims=maximum,
        percentile_abs_cos_sims=dict(zip(wanted, middles, strict=True)),
        mean_max_abs_cos_sim=float(maximum.double().mean()),
        mean_percentile_abs_cos_sim={p: float(m.double().mean()) for p, m in zip(wanted, middles, strict=True)},
        mean_abs_cos_sim=total / max(len(chosen) * (n - 1), 1),
        num_features=n,
        hidden_dim=d,
        expected_interference=interference,
        mean_expected_interference=float(interference.double().mean()),
        feature_indices=chosen,
    )


def _between(descending: Float[Tensor, "n k"], rank: float) -> Float[Tensor, " n"]:
    """The entry of each row at a rank, or between its two neighbours."""
    before, share = divmod(rank, 1)
    return torch.lerp(descending[:, int(before)], descending[:, math.ceil(rank)], share)


def _moments(
    num_features: int, probabilities: Tensor | float | None, mean: Tensor | float, std: Tensor | float
) -> tuple[Float[Tensor, " num_features"], Float[Tensor, " num_features"]]:
    """Mean and variance of each feature's value, in float64."""
    if probabilities is None:
        return torch.zeros(num_features, dtype=torch.float64), torch.ones(num_features, dtype=torch.float64)
    p = _per_feature("firing_probabilities", probabilities, num_features, most=1)
    m = _per_feature("mean_firing_magnitudes", mean, num_features)
    s = _per_feature("std_firing_magnitudes", std, num_features)
    first, second = positive_gaussian_moments(m, s)
    return p * first, p * second - (p * first).square()


def _per_feature(name: str, value: Tensor | float, num_features: int, most: float = math.inf) -> Tensor:
    values = torch.as_tensor(value, dtype=torch.float64).cpu()
    if values.shape not in ((), (num_features,)):
        raise UnweaveError(f"{name} must be one number or num_features={num_features}, got {tuple(values.shape)}.")
    wrong = values[~(values.isfinite() & (values >= 0) & (values <= most))]
    if len(wrong):
        upper = f" and at most {most:g}" if most < math.inf else ""
        raise UnweaveError(f"{name} must be finite, at least 0{upper}, got {float(wrong[0]):g}.")
    return values.expand(num_features)
