"""Penalties of the number of active latents, L0, through JumpReLU's thresholds.

A count has no gradient; the thresholds get one by the straight-through window of `unweave.sae.JumpReLU`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.objectives.penalty import Penalty, active_entries, register_penalty, sum_by_row
from unweave.sae import SAE, JumpReLU
from unweave.sae.activation import Activation
from unweave.sae.codes import Codes


@dataclass(frozen=True)
class _ThroughThresholds(Penalty):
    """A penalty whose gradient reaches thresholds alone."""

    def goes_with(self, activation: Activation) -> str | None:
        if isinstance(activation, JumpReLU):
            return None
        return (
            f"{type(self).__name__} acts through JumpReLU's thresholds, and a {type(activation).__name__} SAE has none."
        )


@register_penalty
@dataclass(frozen=True)
class L0(_ThroughThresholds):
    """Mean number of active latents (JumpReLU, arXiv 2407.14435; Gemma Scope, arXiv 2408.05147).

    Attributes:
        coefficient: Multiplies the count, for inputs scaled to a mean squared norm of d_in. None: `6e-4 * d_in`; at a
            mean squared norm of 1 the same penalty has the coefficient `coefficient / d_in`.
    """

    coefficient: float | None = None
    name: ClassVar[str] = "l0"

    def coefficient_for(self, d_in: int) -> float:
        """The coefficient at a width."""
        return 6e-4 * d_in if self.coefficient is None else self.coefficient

    def __call__(self, pre: Codes, codes: Codes, sae: SAE) -> Float[Tensor, ""]:
        return active_entries(pre, sae).sum() / pre.n_rows


@register_penalty
@dataclass(frozen=True)
class QuadraticL0(_ThroughThresholds):
    """`2 / l0 * mean over tokens of (L0 of the token - l0)^2` (Gemma Scope 2).

    Unlike TargetL0, which looks at the mean L0 of a batch, it also penalises that tokens differ in their L0. A token
    with twice the target outweighs one with none, so where tokens differ in truth the mean ends below `l0`.

    Attributes:
        l0: Number of active latents that each token should have.
        coefficient: Multiplies the penalty, for inputs scaled to a mean squared norm of d_in. None: `0.1 * d_in / l0`.
            A token that is off by a share s of the target then pays `4 s * 0.1 * d_in / l0` for one latent more, and
            latents bring d_in / l0 each on average, so at s = 0.05 it drops those that bring less than 2 % of that.
    """

    l0: float = 32.0
    coefficient: float | None = None
    name: ClassVar[str] = "quadratic_l0"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.l0 > 0:
            raise UnweaveError(f"QuadraticL0 needs l0 > 0, got l0={self.l0}.")

    def coefficient_for(self, d_in: int) -> float:
        """The coefficient at a width."""
        return 0.1 * d_in / self.l0 if self.coefficient is None else self.coefficient

    def __call__(self, pre: Codes, codes: Codes, sae: SAE) -> Float[Tensor, ""]:
        of_tokens = sum_by_row(pre, active_entries(pre, sae))
        return 2 / self.l0 * (of_tokens - self.l0).square().mean()


@register_penalty
@dataclass(frozen=True)
class TargetL0(_ThroughThresholds):
    """Pulls the mean number of active latents to a target, through the thresholds: `(mean L0 / l0 - 1)^2`.

    From twice the target on it rises along its tangent. There dictionary_learning's parabola goes on; but an SAE that
    starts with 500 active latents and a target of 16 would then have slopes of 60 at first and of 0.2 at 10 % above the
    target, and Adam, which divides by what it remembers, would not move thresholds any more by then.

    Attributes:
        l0: Mean number of active latents per token to reach.
        coefficient: Relative to the cost d_in of predicting the mean: at half or one and a half times the target the
            penalty is `coefficient * d_in / 4`.
    """

    l0: float = 32.0
    coefficient: float = 1.0
    name: ClassVar[str] = "target_l0"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.l0 > 0:
            raise UnweaveError(f"TargetL0 needs l0 > 0, got l0={self.l0}.")

    def coefficient_for(self, d_in: int) -> float:
        """What multiplies the penalty at a width."""
        return self.coefficient * d_in

    def __call__(self, pre: Codes, codes: Codes, sae: SAE) -> Float[Tensor, ""]:
        return self.of(active_entries(pre, sae).sum() / pre.n_rows / self.l0 - 1)[0]

    @staticmethod
    def of(off: Tensor) -> tuple[Tensor, Tensor]:
        """The penalty at `off = mean L0 / l0 - 1`, and its slope there."""
        return torch.where(off < 1, off.square(), 2 * off - 1), 2 * off.clamp(max=1)
