"""How often each feature fires: a few shapes of firing probabilities, as functions and as configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.synthetic.arguments import own_generator, require_count, require_number
from unweave.synthetic.registry import GeneratorConfig, Registry


def zipfian_firing_probabilities(
    num_features: int, exponent: float = 1.0, max_prob: float = 0.3, min_prob: float = 0.01
) -> Float[Tensor, " num_features"]:
    """Probabilities that fall with the rank r = 1, 2, ... like `r ** -exponent`, from `max_prob` down to `min_prob`.

    The power law is mapped linearly onto that range: `min_prob + (max_prob - min_prob) * (z_r - z_K) / (z_1 - z_K)`
    with `z_r = r ** -exponent`. A single feature has `max_prob`.

    Args:
        num_features: Number of features, K.
        exponent: How steeply they fall, above 0.
        max_prob: Probability of the first feature, at most 1.
        min_prob: Probability of the last feature, above 0 and below `max_prob`.

    Returns:
        `(num_features,)`, float32, descending.

    Raises:
        UnweaveError: If an argument is out of range.
    """
    require_count("num_features", num_features)
    require_number("exponent", exponent, above=0)
    _require_range(max_prob, min_prob)
    if num_features == 1:
        return torch.tensor([max_prob], dtype=torch.float32)
    ranks = torch.arange(1, num_features + 1, dtype=torch.float64)
    # z_r - z_K over 1 - z_K. Written with expm1, small exponents lose no digits.
    excess = torch.expm1(exponent * (num_features / ranks).log())
    return _between(min_prob, max_prob, excess / excess[0])


def linear_firing_probabilities(
    num_features: int, max_prob: float = 0.3, min_prob: float = 0.01
) -> Float[Tensor, " num_features"]:
    """Probabilities evenly spaced from `max_prob` down to `min_prob`. A single feature has `max_prob`.

    Args:
        num_features: Number of features.
        max_prob: Probability of the first feature, at most 1.
        min_prob: Probability of the last feature, above 0 and at most `max_prob`.

    Returns:
        `(num_features,)`, float32, descending.

    Raises:
        UnweaveError: If an argument is out of range.
    """
    require_count("num_features", num_features)
    _require_range(max_prob, min_prob, may_be_equal=True)
    return torch.linspace(max_prob, min_prob, num_features, dtype=torch.float64).float()


def random_firing_probabilities(
    num_features: int, max_prob: float = 0.5, min_prob: float = 0.01, seed: int | None = None
) -> Float[Tensor, " num_features"]:
    """Probabilities drawn uniformly from `min_prob` to `max_prob`.

    Args:
        num_features: Number of features.
        max_prob: Largest probability, at most 1.
        min_prob: Smallest probability, above 0 and below `max_prob`.
        seed: Of the draws. None: from torch's global state.

    Returns:
        `(num_features,)`, float32.

    Raises:
        UnweaveError: If an argument is out of range.
    """
    require_count("num_features", num_features)
    _require_range(max_prob, min_prob)
    return _between(min_prob, max_prob, torch.rand(num_features, generator=own_generator(seed)))


def _between(low: float, high: float, share: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`low` where the share is 0 and `high` where it is 1; rounding leads nowhere beyond."""
    share = share.double()
    return (low * (1 - share) + high * share).clamp(low, high).float()


def _require_range(max_prob: float, min_prob: float, *, may_be_equal: bool = False) -> None:
    require_number("max_prob", max_prob, above=0, most=1)
    require_number("min_prob", min_prob, above=0, most=1)
    if min_prob > max_prob or (min_prob == max_prob and not may_be_equal):
        wanted = "at most" if may_be_equal else "below"
        raise UnweaveError(f"min_prob must be {wanted} max_prob={max_prob}, got {min_prob}.")


class FiringProbabilityConfig(GeneratorConfig):
    """How often each feature fires. Subclasses are dataclasses, made known by `register_firing_probability`."""

    registry: ClassVar[Registry[FiringProbabilityConfig]] = Registry("firing probability")


def register_firing_probability(name: str, config_class: type[FiringProbabilityConfig]) -> None:
    """Let `FiringProbabilityConfig.from_dict` find a config class, by the name that its `generator_name` returns.

    Raises:
        UnweaveError: If another class has the name, or the class another name.
    """
    FiringProbabilityConfig.registry.register(name, config_class)


def get_firing_probability_class(name: str) -> type[FiringProbabilityConfig]:
    """The config class of a name.

    Raises:
        UnweaveError: If there is none.
    """
    return FiringProbabilityConfig.registry.get(name)


@dataclass(frozen=True)
class ZipfianFiringProbabilityConfig(FiringProbabilityConfig):
    """See `zipfian_firing_probabilities`."""

    exponent: float = 1.0
    max_prob: float = 0.3
    min_prob: float = 0.01

    def __post_init__(self) -> None:
        require_number("exponent", self.exponent, above=0)
        _require_range(self.max_prob, self.min_prob)

    @classmethod
    def generator_name(cls) -> str:
        return "zipfian"

    def generate(self, num_features: int, seed: int | None = None) -> Float[Tensor, " num_features"]:
        return zipfian_firing_probabilities(num_features, self.exponent, self.max_prob, self.min_prob)


@dataclass(frozen=True)
class LinearFiringProbabilityConfig(FiringProbabilityConfig):
    """See `linear_firing_probabilities`."""

    max_prob: float = 0.3
    min_prob: float = 0.01

    def __post_init__(self) -> None:
        _require_range(self.max_prob, self.min_prob, may_be_equal=True)

    @classmethod
    def generator_name(cls) -> str:
        return "linear"

    def generate(self, num_features: int, seed: int | None = None) -> Float[Tensor, " num_features"]:
        return linear_firing_probabilities(num_features, self.max_prob, self.min_prob)


@dataclass(frozen=True)
class RandomFiringProbabilityConfig(FiringProbabilityConfig):
    """See `random_firing_probabilities`."""

    max_prob: float = 0.5
    min_prob: float = 0.01

    def __post_init__(self) -> None:
        _require_range(self.max_prob, self.min_prob)

    @classmethod
    def generator_name(cls) -> str:
        return "random"

    def generate(self, num_features: int, seed: int | None = None) -> Float[Tensor, " num_features"]:
        return random_firing_probabilities(num_features, self.max_prob, self.min_prob, seed)


@dataclass(frozen=True)
class ConstantFiringProbabilityConfig(FiringProbabilityConfig):
    """The same probability, above 0 and at most 1, for every feature."""

    probability: float = 0.1

    def __post_init__(self) -> None:
        require_number("probability", self.probability, above=0, most=1)

    @classmethod
    def generator_name(cls) -> str:
        return "constant"

    def generate(self, num_features: int, seed: int | None = None) -> Float[Tensor, " num_features"]:
        return torch.full((require_count("num_features", num_features),), self.probability, dtype=torch.float32)


register_firing_probability("zipfian", ZipfianFiringProbabilityConfig)
register_firing_probability("linear", LinearFiringProbabilityConfig)
register_firing_probability("random", RandomFiringProbabilityConfig)
register_firing_probability("constant", ConstantFiringProbabilityConfig)
