"""What defines a synthetic model, and which seed each of its parts is drawn with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from unweave._errors import UnweaveError, nearest
from unweave.synthetic.arguments import require_count, require_number, to_dtype
from unweave.synthetic.hierarchy import HierarchyConfig
from unweave.synthetic.magnitudes import MagnitudeConfig
from unweave.synthetic.probabilities import FiringProbabilityConfig, ZipfianFiringProbabilityConfig

# Added to the config's seed, so that no two draws are the same. The first five are SAELens'.
MAGNITUDE_SEEDS = {"std_firing_magnitudes": 1, "mean_firing_magnitudes": 2}
HIERARCHY_SEED, CORRELATION_SEED, STREAM_SEED = 3, 4, 5


@dataclass(frozen=True)
class OrthogonalizationConfig:
    """How to make the features of a synthetic model nearly orthogonal; see `orthogonalize_embeddings`."""

    num_steps: int = 200
    lr: float = 0.01
    chunk_size: int = 1024

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps, least=0)
        require_number("lr", self.lr, above=0)
        require_count("chunk_size", self.chunk_size)


@dataclass(frozen=True)
class LowRankCorrelationConfig:
    """Random low-rank correlations; see `generate_random_low_rank_correlation_matrix`.

    Attributes:
        rank: Number of common causes.
        correlation_scale: Standard deviation of the factor's entries.
        seed: Of the draws. None: the model's seed + 4.
    """

    rank: int = 32
    correlation_scale: float = 0.1
    seed: int | None = None

    def __post_init__(self) -> None:
        require_count("rank", self.rank)
        require_number("correlation_scale", self.correlation_scale, least=0)


@dataclass(frozen=True)
class SyntheticModelConfig:
    """Everything that defines synthetic data.

    Attributes:
        num_features: Number of features, K.
        hidden_dim: Width of the space they live in, d.
        firing_probability: How often each feature fires.
        hierarchy: A forest of features; None for none.
        orthogonalization: How features are made nearly orthogonal; None leaves them random.
        correlation: Which features fire together; None for independent ones.
        std_firing_magnitudes: Standard deviation of magnitudes, a number or a config.
        mean_firing_magnitudes: Mean of magnitudes, a number or a config.
        bias: Norm of the bias; False for none, True for 1.
        dtype: Of activations and features.
        seed: Of everything: features and probabilities use it as it is, magnitudes' deviations + 1, their means + 2,
            the hierarchy + 3, correlations + 4, the stream of activations + 5. None: seeds are drawn from torch's
            global state.

    Raises:
        UnweaveError: If a value is out of range.
    """

    num_features: int
    hidden_dim: int
    firing_probability: FiringProbabilityConfig = field(default_factory=ZipfianFiringProbabilityConfig)
    hierarchy: HierarchyConfig | None = None
    orthogonalization: OrthogonalizationConfig | None = None
    correlation: LowRankCorrelationConfig | None = None
    std_firing_magnitudes: float | MagnitudeConfig = 0.0
    mean_firing_magnitudes: float | MagnitudeConfig = 1.0
    bias: bool | float = 1.0
    dtype: str = "float32"
    seed: int | None = None

    def __post_init__(self) -> None:
        require_count("num_features", self.num_features)
        require_count("hidden_dim", self.hidden_dim)
        if not isinstance(self.bias, bool):
            require_number("bias", self.bias, least=0)
        for name in ("std_firing_magnitudes", "mean_firing_magnitudes"):
            if not isinstance(getattr(self, name), MagnitudeConfig):
                require_number(name, getattr(self, name), least=0)
        object.__setattr__(self, "dtype", str(to_dtype(self.dtype)).removeprefix("torch."))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as SAELens writes them."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def seed_of(self, offset: int) -> int | None:
        """The seed of a part, or None if the model has none."""
        return None if self.seed is None else self.seed + offset

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """The config that `to_dict` wrote.

        Raises:
            UnweaveError: If a field is unknown, missing or out of range.
        """
        values = dict(d)
        _check_fields(cls, values)
        parts: dict[str, type] = {
            "hierarchy": HierarchyConfig,
            "orthogonalization": OrthogonalizationConfig,
            "correlation": LowRankCorrelationConfig,
        }
        for name, part in parts.items():
            if isinstance(values.get(name), Mapping):
                _check_fields(part, values[name], f"{name}.")
                values[name] = part(**values[name])
        if isinstance(values.get("firing_probability"), Mapping):
            values["firing_probability"] = FiringProbabilityConfig.from_dict(values["firing_probability"])
        for name in ("std_firing_magnitudes", "mean_firing_magnitudes"):
            if isinstance(values.get(name), Mapping):
                values[name] = MagnitudeConfig.from_dict(values[name])
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, FiringProbabilityConfig | MagnitudeConfig):
        return value.to_dict()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _check_fields(config_class: type, values: Mapping[str, Any], prefix: str = "") -> None:
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    for name in values:
        if name not in fields:
            raise UnweaveError(f"a synthetic model's config has no {prefix + name!r}{nearest(name, fields)}.")
    for name, f in fields.items():
        if f.default is f.default_factory is dataclasses.MISSING and name not in values:
            raise UnweaveError(f"a synthetic model's config needs {prefix + name!r}, which is missing.")
