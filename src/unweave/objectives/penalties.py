"""Sparsity terms: what keeps codes from using every latent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae import JumpReLU
from unweave.sae.activation_fns import step
from unweave.sae.codes import Codes


@dataclass(frozen=True)
class L1:
    """Sum of codes, each weighted by its latent's decoder norm (Anthropic, April 2024).

    Attributes:
        coefficient: Multiplies the penalty, for inputs scaled to a mean squared norm of d_in. None: `0.1 * sqrt(d_in)`,
            about 5 at the widths of the published recipe. At a mean squared norm of 1 the same penalty has the
            coefficient `coefficient / sqrt(d_in)`.
    """

    coefficient: float | None = None

    def __post_init__(self) -> None:
        if self.coefficient is not None and self.coefficient < 0:
            raise UnweaveError(f"L1 needs a coefficient of at least 0, got {self.coefficient}.")

    def coefficient_for(self, d_in: int) -> float:
        """The coefficient at a width."""
        return 0.1 * d_in**0.5 if self.coefficient is None else self.coefficient


@dataclass(frozen=True)
class TargetL0:
    """Pulls the mean number of active latents to a target, through the thresholds (JumpReLU).

    Attributes:
        l0: Mean number of active latents per token to reach.
        coefficient: Relative to the cost d_in of predicting the mean: at half or one and a half times the target the
            penalty is `coefficient * d_in / 4`.
    """

    l0: float = 32.0
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        if self.l0 <= 0 or self.coefficient < 0:
            raise UnweaveError(
                f"TargetL0 needs l0 > 0 and coefficient >= 0, got l0={self.l0} and coefficient={self.coefficient}."
            )


def l1_penalty(codes: Codes, norms: Float[Tensor, " d_sae"]) -> Float[Tensor, ""]:
    """`mean over tokens of sum over latents of code * decoder norm`. Norms get a gradient too: it lets them adapt."""
    return (codes.values * codes.at(norms)).sum() / codes.n_rows


def target_l0_penalty(
    pre: Codes, threshold: Float[Tensor, " d_sae"], activation: JumpReLU, target: float
) -> Float[Tensor, ""]:
    """`(mean L0 / target - 1)^2`, differentiable in the thresholds by the straight-through window.

    Args:
        pre: Pre-activations at every entry above `threshold - bandwidth / 2` (or all of them, dense).
        threshold: Threshold of each latent.
        activation: Gives the window's bandwidth.
        target: Mean L0 to reach.
    """
    active = step(pre.values, pre.at(threshold), activation.bandwidth)
    return (active.sum() / pre.n_rows / target - 1).square()


def decoder_norms(W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, " d_sae"]:
    """Norm of each decoder row, with a finite gradient for a row of zeros."""
    return W_dec.square().sum(1).clamp(min=torch.finfo(W_dec.dtype).tiny).sqrt()
