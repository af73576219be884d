"""Penalties of the codes' sizes, which go with every activation function.

Each weighs a code by its latent's decoder norm, so that a decoder which grows cannot evade it; with unit norms the
weight is 1. The penalties of the number of active latents are in `unweave.objectives.l0`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.objectives.penalty import (
    Penalty,
    active_entries,
    register_penalty,
    strengths,
    sum_by_latent,
    sum_by_row,
)
from unweave.sae import SAE, JumpReLU
from unweave.sae.codes import Codes


@register_penalty
@dataclass(frozen=True)
class L1(Penalty):
    """Sum of codes, each weighted by its latent's decoder norm (Anthropic, April 2024).

    Attributes:
        coefficient: Multiplies the penalty, for inputs scaled to a mean squared norm of d_in. None: `0.1 * sqrt(d_in)`,
            about 5 at the widths of the published recipe. At a mean squared norm of 1 the same penalty has the
            coefficient `coefficient / sqrt(d_in)`.
    """

    coefficient: float | None = None
    name: ClassVar[str] = "l1"

    def coefficient_for(self, d_in: int) -> float:
        """The coefficient at a width."""
        return 0.1 * d_in**0.5 if self.coefficient is None else self.coefficient

    def __call__(self, pre: Codes, codes: Codes, sae: SAE) -> Float[Tensor, ""]:
        return strengths(codes, sae).sum() / codes.n_rows


@register_penalty
@dataclass(frozen=True)
class Lp(Penalty):
    """`sum over latents of (code * decoder norm)^p`, or with `root=True` the p-norm, its p-th root.

    Attributes:
        coefficient: Multiplies the penalty, for inputs scaled to a mean squared norm of d_in. None: `0.1^p *
            0.002^(1 - p) * d_in^(1 - p / 2)`, between the defaults of L1 (p = 1) and Tanh (p = 0); of roots L1's.
        p: Above 0. Below 1 it prefers few strong codes to many weak ones.
        root: Whether the root `1 / p` of each token's sum is taken, as in SAELens' `lp_norm`.
        eps: Added to codes before the power and its own power taken off after it, so that the slope of a code that
            goes to 0 ends at `p * eps^(p - 1)` instead of growing without bound. 0 is the published formula.

    JumpReLU's thresholds are pushed by the jump of the power there, about `threshold^p`. The chain rule has the
    threshold times the slope in its place, the same for p = 1 alone: at p 0.2 and a threshold of 0.3 the jump is 0.54,
    and for codes of 0 just below the threshold the chain rule gives `0.3 * 0.2 * 0.001^-0.8 = 15`.
    """

    coefficient: float | None = None
    p: float = 0.5
    root: bool = False
    eps: float = 1e-3
    name: ClassVar[str] = "lp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.p > 0 or self.eps < 0:
            raise UnweaveError(f"Lp needs p > 0 and eps >= 0, got p={self.p} and eps={self.eps}.")

    def coefficient_for(self, d_in: int) -> float:
        """The coefficient at a width."""
        if self.coefficient is not None:
            return self.coefficient
        p = 1.0 if self.root else self.p
        return float(0.1**p * 0.002 ** (1 - p) * d_in ** (1 - p / 2))

    def __call__(self, pre: Codes, codes: Codes, sae: SAE) -> Float[Tensor, ""]:
        a = strengths(codes, sae)
        if self.p == 1:
            return a.sum() / codes.n_rows
        jumps = isinstance(sae.activation, JumpReLU)
        if jumps:
            a = strengths(pre.with_values(pre.values.relu()), sae)
        if self.eps:
            powers = (a + self.eps).pow(self.p) - self.eps**self.p
        else:
            active = a > 0  # elsewhere the slope is infinite, and 0 times it would be NaN
            powers = torch.where(active, torch.where(active, a, 1.0).pow(self.p), 0.0)
        if jumps:
            powers = powers * active_entries(pre, sae)
        if not self.root:
            return powers.sum() / codes.n_rows
        tiny = torch.finfo(powers.dtype).tiny
        return sum_by_row(codes, powers).clamp(min=tiny).pow(1 / self.p).mean()


@register_penalty
@dataclass(frozen=True)
class PAnneal(Penalty):
    """Lp whose p goes from 1 down to `p_end` in equal steps (p-annealing, Karvonen et al., arXiv 2408.00113).

    At every change the coefficient is rescaled so that the penalty of that batch stays what it was. (As published the
    two are averaged over ten steps before the change.) The last p is trained with for as long as the others.

    Attributes:
        coefficient: At the start, while p is 1: that of an L1 penalty, for inputs scaled to a mean squared norm of
            d_in. None: `0.015 * sqrt(d_in)`, the middle of the published 0.006 to 0.025 at a mean squared norm of 1. It
            is a seventh of L1's default, because a small p weighs small codes more: with all codes equal the slope of
            each goes from c to `p c`, but of a code of a hundredth of that size it becomes `100^(1 - p) p c`, at p 0.2
            eight times c.
        p_end: Last p; above 0, since p = 0 has no gradient.
        begin: Share of the run after which p begins to change.
        changes: Number of steps from 1 to `p_end`.
        root: See `Lp`.
        eps: See `Lp`.
    """

    coefficient: float | None = None
    p_end: float = 0.2
    begin: float = 0.05
    changes: int = 10
    root: bool = False
    eps: float = 1e-3
    name: ClassVar[str] = "p_anneal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p_end <= 1 or self.changes < 1 or not 0 <= self.begin < 1:
            raise UnweaveError(
                "PAnneal needs 0 < p_end <= 1, 0 <= begin < 1 and changes >= 1, got "
                f"p_end={self.p_end}, begin={self.begin} and changes={self.changes}."
            )

    def coefficient_for(self, d_in: int) -> float:
        """The coefficient at a width, at the start of the run."""
        return 0.015 * d_in**0.5 if self.coefficient is None else self.coefficient

    def p_at(self, step: int, steps: int) -> float:
        """The exponent at a step."""
        first = round(self.begin * steps)
        if step >= steps - 1:
            done = self.changes
        else:
            done = 0 if step < first else min(self.changes, 1 + (step - first) * self.changes // max(steps - first, 1))
        return 1 - (1 - self.p_end) * done / self.changes

    def at(self, step: int, steps: int) -> Penalty:
        return Lp(p=self.p_at(step, steps), root=self.root, eps=self.eps)

    def __call__(self, pre: Codes, codes: Codes, sae: SAE) -> Float[Tensor, ""]:
        """The penalty at the start of a run; `at` gives the others."""
        return self.at(0, 1 + self.changes)(pre, codes, sae)


@register_penalty
@dataclass(frozen=True)
class Tanh(Penalty):
    """`sum over latents of tanh(c * code * decoder norm)`: an L1 that saturates (Anthropic, January 2025).

    Attributes:
        coefficient: Multiplies the penalty, for inputs scaled to a mean squared norm of d_in (10 to 20 as published,
            for a model of unknown width). None: `2e-3 * d_in`.
        c: How fast it saturates, per unit of code (4 as published).
        frequency: With `f` the mean over tokens of each latent's tanh, the penalty becomes `sum of f * (1 + f /
            frequency)`, which weighs frequent latents more (0.01 in Llamascopium). None: the plain sum of `f`.
    """

    coefficient: float | None = None
    c: float = 4.0
    frequency: float | None = None
    name: ClassVar[str] = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.c > 0 or (self.frequency is not None and not self.frequency > 0):
            raise UnweaveError(f"Tanh needs c > 0 and frequency > 0, got {self.c} and {self.frequency}.")

    def coefficient_for(self, d_in: int) -> float:
        """The coefficient at a width."""
        return 2e-3 * d_in if self.coefficient is None else self.coefficient

    def __call__(self, pre: Codes, codes: Codes, sae: SAE) -> Float[Tensor, ""]:
        saturated = (self.c * strengths(codes, sae)).tanh()
        if self.frequency is None:
            return saturated.sum() / codes.n_rows
        f = sum_by_latent(codes, saturated) / codes.n_rows
        return (f * (1 + f / self.frequency)).sum()


@register_penalty
@dataclass(frozen=True)
class Frequency(Penalty):
    """`sum over latents of relu(f - limit)^2 / limit`, where f is how often a latent fires: against latents always on.

    Gemma Scope 2 has such a term against latents that fire on more than a tenth of the tokens, and its formula is not
    published; this one is ours. It has a gradient through `f = mean over tokens of tanh(c * code * decoder norm)`, and
    is meant beside another penalty.

    Attributes:
        coefficient: Multiplies the penalty, for inputs scaled to a mean squared norm of d_in. None: `0.01 * d_in`.
        limit: Frequency up to which a latent is left alone.
        c: How fast the tanh saturates, per unit of code.
    """

    coefficient: float | None = None
    limit: float = 0.1
    c: float = 4.0
    name: ClassVar[str] = "frequency"
    decides_l0: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.limit < 1 or not self.c > 0:
            raise UnweaveError(f"Frequency needs a limit between 0 and 1 and c > 0, got {self.limit} and {self.c}.")

    def coefficient_for(self, d_in: int) -> float:
        """The coefficient at a width."""
        return 0.01 * d_in if self.coefficient is None else self.coefficient

    def __call__(self, pre: Codes, codes: Codes, sae: SAE) -> Float[Tensor, ""]:
        f = sum_by_latent(codes, (self.c * strengths(codes, sae)).tanh()) / codes.n_rows
        return (f - self.limit).relu().square().sum() / self.limit
