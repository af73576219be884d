"""What a sparsity term is: the base class of all, the register by which names find them, and sums that they share.

A penalty looks at the pre-activations and codes of a training step and returns one number, summed over latents and
averaged over tokens. Its coefficient stays outside, because warm-ups, schedules and the L0 controller move it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.objectives.schedules import Schedule
from unweave.sae import SAE, JumpReLU
from unweave.sae.activation import Activation
from unweave.sae.codes import Codes, DenseCodes

PENALTIES: dict[str, type[Penalty]] = {}
"""Every penalty, by the name that configurations use."""


@dataclass(frozen=True, kw_only=True)
class Penalty(ABC):
    """Base of all sparsity terms, which are frozen dataclasses made known by `register_penalty`.

    A subclass needs `name`, a field `coefficient` and `__call__`.

    Attributes:
        name: Name in configurations.
        schedule: Multiplies the coefficient; None: the warm-up `SAEConfig.sparsity_warmup`.
        decides_l0: Whether more of it means fewer active latents, so that an L0 controller moves it.
    """

    schedule: Schedule | None = None
    name: ClassVar[str]
    decides_l0: ClassVar[bool] = True

    def __post_init__(self) -> None:
        coefficient = getattr(self, "coefficient", None)
        if coefficient is not None and not coefficient >= 0:
            raise UnweaveError(f"{type(self).__name__} needs a coefficient of at least 0, got {coefficient}.")

    def goes_with(self, activation: Activation) -> str | None:
        """Why it makes no sense with an activation function, as a sentence; None if it does."""
        return None

    def coefficient_for(self, d_in: int) -> float:
        """The coefficient at a width."""
        return float(self.coefficient)  # type: ignore[attr-defined]

    def at(self, step: int, steps: int) -> Penalty:
        """The penalty as it is at a step of a run; itself unless its shape changes during training.

        Where it changes, training rescales the coefficient so that the penalty of that batch stays what it was.
        """
        return self

    def __str__(self) -> str:
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in changed)})"

    @abstractmethod
    def __call__(self, pre: Codes, codes: Codes, sae: SAE) -> Float[Tensor, ""]:
        """The penalty without its coefficient.

        Args:
            pre: Pre-activations at every entry that the step looks at.
            codes: Codes at the same entries; of a Gated SAE the open gate's pre-activations.
            sae: The SAE in training.
        """


AnyPenalty = TypeVar("AnyPenalty", bound=Penalty)


def register_penalty(cls: type[AnyPenalty]) -> type[AnyPenalty]:
    """Make a penalty known by its name, as a class decorator above `@dataclass(frozen=True)`.

    Raises:
        UnweaveError: If it has no name or no coefficient, another one has its name, or it is not a dataclass.
    """
    if not (isinstance(cls, type) and issubclass(cls, Penalty) and "__dataclass_params__" in vars(cls)):
        raise UnweaveError(f"a penalty is a frozen dataclass derived from Penalty, got {cls!r}.")
    name = getattr(cls, "name", "")
    if not name or "coefficient" not in {f.name for f in dataclasses.fields(cls)}:
        raise UnweaveError(f"the penalty {cls.__name__} needs a name and a field coefficient.")
    known = PENALTIES.get(name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise UnweaveError(f"there is a penalty {name!r} already: {known.__name__}.")
    PENALTIES[name] = cls
    return cls


def strengths(codes: Codes, sae: SAE) -> Float[Tensor, "..."]:
    """What each entry contributes at most to the reconstruction: `|code| * decoder norm`, shaped as `codes.values`."""
    # Of codes that are never negative the absolute value is not taken: its gradient at 0 would be 0, and JumpReLU's
    # thresholds learn from entries whose code is 0.
    values = codes.values.abs() if sae.activation.signed else codes.values
    return values * codes.at(sae.decoder_norms())


def active_entries(pre: Codes, sae: SAE) -> Float[Tensor, "..."]:
    """1 at every entry above its JumpReLU threshold, else 0, differentiable through the window; as `pre.values`."""
    assert isinstance(sae.activation, JumpReLU)
    return sae.activation.step(pre, sae.threshold)


def sum_by_row(codes: Codes, per_entry: Float[Tensor, "..."]) -> Float[Tensor, " n"]:
    """The sum of a value per entry over each row."""
    if isinstance(codes, DenseCodes):
        return per_entry.sum(1)
    return torch.segment_reduce(per_entry, "sum", offsets=codes.offsets)


def sum_by_latent(codes: Codes, per_entry: Float[Tensor, "..."]) -> Float[Tensor, " d_sae"]:
    """The sum of a value per entry over each latent's entries."""
    return per_entry.sum(0) if isinstance(codes, DenseCodes) else codes.sum_by_latent(per_entry)
