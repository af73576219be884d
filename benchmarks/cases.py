"""What the benchmarks train: one SAE on synthetic activations, the same weights and batches for every library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

KINDS = ("topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated")
TINY_LR = 1e-9
"""Adam's update has the size of its learning rate: with this one the density stays what it was set to."""
DEAD_GAIN = 0.3
"""Encoder rows of dead latents are this much shorter: they never reach a token's largest, yet half are positive."""


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        kind: Architecture, one of `KINDS`.
        d_in: Width of the activations.
        d_sae: Number of latents.
        batch: Tokens in a step.
        k: Active latents of a token (the TopK family).
        l0: Mean number of active latents of a token that the weights are set to (ReLU, JumpReLU, Gated).
        dead: Share of the latents that count as dead, for AuxK.
    """

    kind: str
    d_in: int
    d_sae: int
    batch: int
    k: int = 32
    l0: float | None = None
    dead: float = 0.0

    @property
    def active(self) -> float:
        """Mean number of active latents of a token."""
        return float(self.k) if self.l0 is None else self.l0

    @property
    def prefixes(self) -> list[int]:
        """Five nested widths, each twice the one before (Matryoshka)."""
        return [self.d_sae >> shift for shift in (4, 3, 2, 1, 0)]

    @property
    def frozen(self) -> bool:
        """Whether training must not change which latents are active."""
        return self.l0 is not None or self.dead > 0

    @property
    def shape(self) -> str:
        return f"{self.d_in} → {self.d_sae}"

    def __str__(self) -> str:
        parts = [self.kind, f"L0 {self.l0:g}" if self.l0 is not None else f"k {self.k}"]
        return ", ".join([*parts, f"{self.dead:.0%} dead"] if self.dead else parts)


class Problem(NamedTuple):
    """The numbers of a case."""

    case: Case
    batches: list[Float[Tensor, "n d_in"]]
    """Activations with a mean squared norm of d_in; steps take them in turn."""
    W: Float[Tensor, "d_sae d_in"]
    """Decoder, of unit rows; the encoder is its transpose, rows of dead latents scaled by `DEAD_GAIN`."""
    bias: float
    """What has to be added to every pre-activation for `case.l0` of them to be positive."""
    dead: Bool[Tensor, " d_sae"]

    @property
    def encoder(self) -> Float[Tensor, "d_sae d_in"]:
        """Encoder rows."""
        return torch.where(self.dead[:, None], DEAD_GAIN * self.W, self.W)


@dataclass
class Contestant:
    """A library that trains a case.

    Attributes:
        step: Takes one training step on a batch.
        l0: Mean number of active latents of a token in this batch, as the library itself encodes it.
        n_dead: Number of latents that the library counts as dead.
    """

    step: Callable[[Tensor], Any]
    l0: Callable[[Tensor], float]
    n_dead: Callable[[], int] = lambda: 0

    def check(self, problem: Problem) -> None:
        """Raise unless the case is what the library works on: the asked density, the asked dead latents."""
        case = problem.case
        for x in problem.batches:
            if abs(self.l0(x) / case.active - 1) > 0.05:
                raise RuntimeError(f"{case}: the mean L0 is {self.l0(x):.1f} instead of {case.active:g}.")
        if self.n_dead() != int(problem.dead.sum()):
            raise RuntimeError(f"{case}: {self.n_dead()} latents are dead instead of {int(problem.dead.sum())}.")


def make_problem(case: Case, n_batches: int = 3, seed: int = 0) -> Problem:
    """Correlated Gaussian activations and a random dictionary for a case."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mixing = normal(case.d_in, case.d_in) / case.d_in**0.5
    batches = []
    for _ in range(n_batches):
        x = normal(case.batch, case.d_in) @ mixing
        batches.append(x * (case.d_in / x.square().sum(1).mean()).sqrt())
    W = torch.nn.functional.normalize(normal(case.d_sae, case.d_in), dim=1)
    dead = torch.zeros(case.d_sae, dtype=torch.bool)
    dead[torch.randperm(case.d_sae, generator=generator)[: round(case.dead * case.d_sae)]] = True
    bias = 0.0
    if case.l0 is not None:
        rows = batches[0][:512]
        pre = (rows @ W.T).flatten()
        bias = -float(pre.kthvalue(pre.numel() - round(case.l0 * len(rows))).values)
    return Problem(case, batches, W, bias, dead)
