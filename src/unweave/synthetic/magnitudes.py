"""How strongly each feature fires: shapes of the mean (or the spread) of magnitudes over the features, as configs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.synthetic.arguments import own_generator, require_count, require_number
from unweave.synthetic.registry import GeneratorConfig, Registry


class MagnitudeConfig(GeneratorConfig):
    """One magnitude per feature. Subclasses are dataclasses, made known by `register_magnitude`."""

    registry: ClassVar[Registry[MagnitudeConfig]] = Registry("magnitude")


def register_magnitude(name: str, config_class: type[MagnitudeConfig]) -> None:
    """Let `MagnitudeConfig.from_dict` find a config class, by the name that its `generator_name` returns.

    Raises:
        UnweaveError: If another class has the name, or the class another name.
    """
    MagnitudeConfig.registry.register(name, config_class)


def get_magnitude_class(name: str) -> type[MagnitudeConfig]:
    """The config class of a name.

    Raises:
        UnweaveError: If there is none.
    """
    return MagnitudeConfig.registry.get(name)


def generate_magnitudes(
    num_features: int, config: float | MagnitudeConfig, seed: int | None = None
) -> Float[Tensor, " num_features"]:
    """One magnitude per feature.

    Args:
        num_features: Number of features.
        config: The magnitude of all of them, at least 0, or a config that generates one for each.
        seed: Of configs that draw. None: from torch's global state.

    Returns:
        `(num_features,)`, float32, on the CPU.

    Raises:
        UnweaveError: If an argument is out of range, or a config generates something else than finite magnitudes of at
            least 0, one for each feature.
    """
    require_count("num_features", num_features)
    if not isinstance(config, MagnitudeConfig):
        return torch.full((num_features,), require_number("magnitude", config, least=0), dtype=torch.float32)
    magnitudes = config.generate(num_features, seed)
    if magnitudes.shape != (num_features,):
        raise UnweaveError(
            f"{config!r} generated magnitudes of shape {tuple(magnitudes.shape)} for num_features={num_features}."
        )
    wrong = magnitudes[~(magnitudes.isfinite() & (magnitudes >= 0))]
    if len(wrong):
        raise UnweaveError(f"{config!r} generated the magnitude {float(wrong[0]):g}, which is not finite and >= 0.")
    return magnitudes


def positive_gaussian_moments(
    mean: Float[Tensor, "*shape"], std: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Mean and mean square of a Gaussian given that it is positive, which is how strongly a feature fires.

    Args:
        mean: Mean of the whole Gaussian; above 0 where `std` is 0.
        std: Its standard deviation, at least 0.

    Returns:
        Both in float64: `m + s h` and `m^2 + s^2 + m s h`, where `h` is the inverse Mills ratio at `-m / s`.
    """
    mean, std = torch.broadcast_tensors(mean.double(), std.double())
    ratio = mean / std.clamp(min=torch.finfo(torch.float64).tiny)
    # phi(r) / Phi(r), in logarithms: both vanish far below 0.
    hazard = torch.exp(-ratio.square() / 2 - math.log(math.tau) / 2 - torch.special.log_ndtr(ratio))
    shift = std * hazard
    return mean + shift, mean.square() + std.square() + mean * shift


@dataclass(frozen=True)
class ConstantMagnitudeConfig(MagnitudeConfig):
    """The same magnitude for every feature, at least 0."""

    value: float = 1.0

    def __post_init__(self) -> None:
        require_number("value", self.value, least=0)

    @classmethod
    def generator_name(cls) -> str:
        return "constant"

    def generate(self, num_features: int, seed: int | None = None) -> Float[Tensor, " num_features"]:
        return torch.full((require_count("num_features", num_features),), self.value, dtype=torch.float32)


@dataclass(frozen=True)
class LinearMagnitudeConfig(MagnitudeConfig):
    """Evenly spaced from `start` at the first feature to `end` at the last, both at least 0."""

    start: float
    end: float

    def __post_init__(self) -> None:
        require_number("start", self.start, least=0)
        require_number("end", self.end, least=0)

    @classmethod
    def generator_name(cls) -> str:
        return "linear"

    def generate(self, num_features: int, seed: int | None = None) -> Float[Tensor, " num_features"]:
        require_count("num_features", num_features)
        return torch.linspace(self.start, self.end, num_features, dtype=torch.float64).float()


@dataclass(frozen=True)
class ExponentialMagnitudeConfig(MagnitudeConfig):
    """In even ratios from `start` at the first feature to `end` at the last, both above 0.

    Feature i of K has `start * (end / start) ** (i / (K - 1))`.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        require_number("start", self.start, above=0)
        require_number("end", self.end, above=0)

    @classmethod
    def generator_name(cls) -> str:
        return "exponential"

    def generate(self, num_features: int, seed: int | None = None) -> Float[Tensor, " num_features"]:
        require_count("num_features", num_features)
        logs = torch.linspace(math.log(self.start), math.log(self.end), num_features, dtype=torch.float64)
        return logs.exp().float()


@dataclass(frozen=True)
class FoldedNormalMagnitudeConfig(MagnitudeConfig):
    """`|mean + std * N(0, 1)|` for each feature, then held between the bounds where they are given.

    Attributes:
        mean: Mean of the Gaussian before it is folded.
        std: Its standard deviation, at least 0.
        min_value: Smallest magnitude, at least 0. None: no bound.
        max_value: Largest magnitude, at least `min_value`. None: no bound.
    """

    mean: float = 0.0
    std: float = 0.1
    min_value: float | None = None
    max_value: float | None = None

    def __post_init__(self) -> None:
        require_number("mean", self.mean)
        require_number("std", self.std, least=0)
        least = 0.0 if self.min_value is None else require_number("min_value", self.min_value, least=0)
        if self.max_value is not None and require_number("max_value", self.max_value, least=0) < least:
            raise UnweaveError(f"max_value must be at least min_value={self.min_value}, got {self.max_value}.")

    @classmethod
    def generator_name(cls) -> str:
        return "folded_normal"

    def generate(self, num_features: int, seed: int | None = None) -> Float[Tensor, " num_features"]:
        noise = torch.randn(require_count("num_features", num_features), generator=own_generator(seed))
        return (self.mean + self.std * noise).abs().clamp(self.min_value or 0.0, self.max_value)


register_magnitude("constant", ConstantMagnitudeConfig)
register_magnitude("linear", LinearMagnitudeConfig)
register_magnitude("exponential", ExponentialMagnitudeConfig)
register_magnitude("folded_normal", FoldedNormalMagnitudeConfig)
