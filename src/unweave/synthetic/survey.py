"""What a sample of a world shows, beside what was asked for: firing rates, L0, magnitudes, correlations, hierarchy.

Everything is counted while the samples stream by, on sparse codes; no sample is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae import SparseCodes
from unweave.synthetic.expected import Expected, expected_correlations, expected_firing
from unweave.synthetic.joint import values_at
from unweave.synthetic.node import walk
from unweave.synthetic.tables import Tables, tabulate

if TYPE_CHECKING:
    from unweave.synthetic.model import SyntheticModel

PAIRS = 256
"""Features whose pairs are counted: those that are asked to fire most often."""
BATCH = 8192


@dataclass(frozen=True, eq=False)
class Survey:
    """Counts over the samples of a world, and what they should have been.

    Attributes:
        samples: Samples looked at.
        requested_rates: How often each feature should fire: its probability, and what a hierarchy leaves of it. With
            both a hierarchy and correlations that is not known, and here is what would hold without the correlations.
        counts: On how many samples each feature fired (was above 0).
        l0_mean: Mean number of features that fire on a sample.
        l0_std: Its standard deviation over samples.
        requested_magnitude: Mean magnitude of a firing, over all firings at the requested rates.
        magnitude: The measured one.
        pair_features: The features whose pairs were counted.
        together: On how many samples each pair of them fired.
        requested_correlations: Correlations of their firing that a Gaussian copula gives; None where a hierarchy or
            another modifier changes what fires.
        orphans: Firings of a child without its parent, which a hierarchy forbids; None without a hierarchy.
        rivals: Firings beside another member of the same exclusive group, likewise.
        exact: Whether `requested_rates` are exact, see there.
    """

    samples: int
    requested_rates: Float64[Tensor, " features"]
    counts: Int64[Tensor, " features"]
    l0_mean: float
    l0_std: float
    requested_magnitude: float
    magnitude: float | None
    pair_features: Int64[Tensor, " pairs"]
    together: Int64[Tensor, "pairs pairs"]
    requested_correlations: Float64[Tensor, "pairs pairs"] | None
    orphans: int | None
    rivals: int | None
    exact: bool

    @property
    def rates(self) -> Float64[Tensor, " features"]:
        """Measured firing rates."""
        return self.counts.double() / self.samples

    @cached_property
    def correlations(self) -> Float64[Tensor, "pairs pairs"]:
        """Measured Pearson correlations of the firing of pairs; NaN for features that never or always fired."""
        rate = self.rates[self.pair_features]
        covariance = self.together.double() / self.samples - rate[:, None] * rate
        deviation = (rate * (1 - rate)).sqrt()
        return covariance / (deviation[:, None] * deviation)

    @property
    def rate_deviations(self) -> Float64[Tensor, " features"]:
        """Measured minus requested rate in standard errors; NaN where the request is certain (0 or 1)."""
        p = self.requested_rates
        return (self.rates - p) / (p * (1 - p) / self.samples).sqrt()

    def summary(self) -> dict[str, Any]:
        """The numbers as plain JSON values; None where one is undefined."""
        expected = self.requested_rates * self.samples
        testable = (expected >= 10) & (self.samples - expected >= 10)
        deviations = self.rate_deviations[testable]
        p = self.requested_rates
        result: dict[str, Any] = {
            "samples": self.samples, "requested_rates_are_exact": self.exact,
            "l0": {"requested": float(p.sum()), "measured": self.l0_mean, "std": self.l0_std},
            "firing_rate": {
                "requested_min": float(p.min()), "requested_median": float(p.median()), "requested_max": float(p.max()),
                "deviation_rms": _or_none(deviations.square().mean().sqrt()),
                "deviation_max": float(deviations.abs().max()) if len(deviations) else None,
                "features_tested": int(testable.sum()),
                "never_fired": int((self.counts == 0).sum()),
            },
            "magnitude": {"requested": self.requested_magnitude, "measured": self.magnitude},
            "correlation": {"features": len(self.pair_features)} | _off_diagonal("measured", self.correlations),
        }  # fmt: skip
        if self.requested_correlations is not None:
            result["correlation"] |= _off_diagonal("requested", self.requested_correlations)
        if self.orphans is not None:
            result["hierarchy"] = {
                "children_without_parent": self.orphans,
                "exclusive_together": self.rivals,
            }
        return result


def _off_diagonal(name: str, correlations: Tensor) -> dict[str, float | None]:
    off = correlations[~torch.eye(len(correlations), dtype=torch.bool)]
    off = off[~off.isnan()]
    if not len(off):
        return {f"{name}_rms": None, f"{name}_min": None, f"{name}_max": None}
    return {f"{name}_rms": float(off.square().mean().sqrt()), f"{name}_min": float(off.min()),
            f"{name}_max": float(off.max())}  # fmt: skip


def _or_none(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


@torch.no_grad()
def survey(
    model: SyntheticModel,
    samples: int = 100_000,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
    """Sample a world and count.

    Args:
        model: The world. A fork of its generator is sampled, so its own stream does not move.
        samples: How many samples.
        seed: Of the fork.
        progress: Called with the samples done and their total.

    Raises:
        UnweaveError: If `samples` is below 1.
    """
    if samples < 1:
        raise UnweaveError(f"samples must be at least 1, got {samples}.")
    generator = model.activation_generator.fork(seed)
    tables = _tables(model)
    requested, magnitudes = expected_firing(generator, tables)
    n_features = len(requested)
    chosen = requested.argsort(descending=True, stable=True)[:PAIRS].sort().values
    place = torch.full((n_features,), -1)
    place[chosen] = torch.arange(len(chosen))

    counts = torch.zeros(n_features, dtype=torch.int64)
    together = torch.zeros(len(chosen), len(chosen), dtype=torch.int64)
    l0_sum, l0_squares, magnitude, orphans, rivals = 0, 0, 0.0, 0, 0
    # At a million features an entry costs tens of bytes of bookkeeping: fewer rows at a time when many fire.
    batch = max(64, min(BATCH, int(2_000_000 / max(float(requested.sum()), 1.0))))
    for start in range(0, samples, batch):
        codes = generator.sample_codes(min(batch, samples - start)).to("cpu").firing()
        counts += codes.firing_counts()
        l0 = codes.offsets.diff()
        l0_sum, l0_squares = l0_sum + int(l0.sum()), l0_squares + int(l0.square().sum())
        magnitude += float(codes.values.double().sum())
        fires = torch.zeros(codes.n_rows, len(chosen))
        column = place[codes.indices]
        fires[codes.rows[column >= 0], column[column >= 0]] = 1
        together += (fires.T @ fires).long()  # exact: whole numbers below 2**24
        if tables is not None:
            broken = _broken_rules(codes, tables)
            orphans, rivals = orphans + broken[0], rivals + broken[1]
        progress(min(start + batch, samples), samples)

    mean = l0_sum / samples
    return Survey(
        samples=samples,
        requested_rates=requested,
        counts=counts,
        l0_mean=mean,
        l0_std=math.sqrt(max(l0_squares / samples - mean**2, 0.0)),
        requested_magnitude=float((magnitudes * requested).sum() / requested.sum()),
        magnitude=magnitude / l0_sum if l0_sum else None,
        pair_features=chosen,
        together=together,
        requested_correlations=expected_correlations(generator, chosen),
        orphans=orphans if tables is not None else None,
        rivals=rivals if tables is not None else None,
        exact=tables is None or model.correlation_matrix is None,
    )


def expected_of(model: SyntheticModel) -> Expected:
    """How often a world's features should fire, and how strongly; see `Survey.requested_rates`."""
    return expected_firing(model.activation_generator, _tables(model))


def _tables(model: SyntheticModel) -> Tables | None:
    return None if model.hierarchy is None else tabulate(walk(model.hierarchy.roots))


def _broken_rules(codes: SparseCodes, tables: Tables) -> tuple[int, int]:
    """Firings of children without their parents, and firings too many in exclusive groups."""
    known = codes.indices < len(tables.parent)
    rows, indices = codes.rows[known], codes.indices[known]
    parents = tables.parent[indices]
    orphans = int(((parents >= 0) & (values_at(codes, rows, parents) == 0)).sum())
    groups = tables.group[indices]
    member = groups >= 0
    keys = rows[member] * (int(tables.group.max()) + 1) + groups[member]
    return orphans, len(keys) - len(keys.unique())
