"""Two more losses for dead latents, beside AuxK: the pre-activation loss and ghost gradients.

Both need every dead latent's pre-activation on every token. Only the dead columns are computed, some rows at a time,
and again in the backward pass, so what stays in memory does not grow with the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unweave._errors import UnweaveError
from unweave.objectives.schedules import Schedule
from unweave.sae import SAE, ops

ROWS = 512
"""Rows whose dead pre-activations exist at the same time."""
_EPS = 1e-6


@dataclass(frozen=True)
class PreActivation:
    """Pulls dead latents' pre-activations up to their thresholds (Anthropic, January 2025).

    It acts on dead latents alone, as in SAELens, which keeps the encoder's gradient sparse; Anthropic's acts on every
    latent that is not active. Goes with activation functions that compare each latent with a bound of its own:
    JumpReLU, and ReLU and Gated, whose bound is 0.

    Attributes:
        coefficient: Multiplies the loss, for inputs scaled to a mean squared norm of d_in (3e-6 as published).
        schedule: Multiplies the coefficient; None: it stays.
    """

    coefficient: float = 3e-6
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise UnweaveError(f"PreActivation needs a coefficient of at least 0, got {self.coefficient}.")


@dataclass(frozen=True)
class GhostGradients:
    """Dead latents reconstruct the residual by the exponentials of their pre-activations (Anthropic, January 2024).

    Superseded by AuxK, and here for comparison.

    Attributes:
        coefficient: Relative to the main loss, to whose size the ghosts' error is rescaled on every token, however few
            latents are dead: at 1, as published, ghosts pull as hard as all that is learnt so far. That is for runs of
            100k steps, in which few latents die, and late. In a run of hundreds of steps, in which latents are dead
            after dozens, it takes a ReLU or TanhReLU SAE a sixth of its explained variance and more.
        schedule: Multiplies the coefficient; None: it stays.
    """

    coefficient: float = 0.1
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise UnweaveError(f"GhostGradients needs a coefficient of at least 0, got {self.coefficient}.")


def pre_activation_loss(
    pre: Float[Tensor, "n c"], threshold: Float[Tensor, " c"], norms: Float[Tensor, " c"]
) -> Float[Tensor, ""]:
    """`mean over tokens of sum over dead latents of relu(threshold - pre) * decoder norm`.

    Thresholds get a gradient too. Norms get none: where they are free, it would shrink dead decoder rows to nothing.

    Args:
        pre: Pre-activations of the dead latents.
        threshold: What each is compared with.
        norms: Their decoder norms.
    """
    return ((threshold - pre).relu() * norms.detach()).sum() / len(pre)


def ghost_loss(
    pre: Float[Tensor, "n c"], W_dec: Float[Tensor, "c d"], residual: Float[Tensor, "n d"]
) -> Float[Tensor, ""]:
    """The error of `g = exp(pre) @ W_dec` against the residual, summed over d and averaged over tokens.

    On each token `g` is rescaled to half the residual's norm, and each squared difference to the residual's square, so
    that the loss has the size of the main one. Neither factor has a gradient, nor has the residual.

    Args:
        pre: Pre-activations of the dead latents.
        W_dec: Their decoder rows.
        residual: What the main codes leave over, `x - x_hat`.
    """
    e = residual.detach()
    # What is taken out of the exponent here the rescaling puts back; without it, exp overflows or is 0 in every latent.
    g = (pre - pre.detach().amax(1, keepdim=True)).exp() @ W_dec
    g = g * (e.norm(dim=1) / (2 * g.detach().norm(dim=1) + _EPS))[:, None]
    distance = (g - e).square()
    return (distance * (e.square() / (distance.detach() + _EPS))).sum() / len(e)


def dead_latents_loss(
    sae: SAE,
    latents: Int64[Tensor, " c"],
    x: Float[Tensor, "n d_in"],
    residual: Float[Tensor, "n d_in"],
    pre_act: PreActivation | None,
    ghost: GhostGradients | None,
) -> Float[Tensor, ""]:
    """The sum of the two losses, each times its coefficient; None leaves one out.

    Args:
        sae: The SAE in training.
        latents: The dead latents, at least one.
        x: Inputs, at the scale of training.
        residual: `x - x_hat`; no gradient flows into it.
        pre_act: The pre-activation loss.
        ghost: Ghost gradients.
    """
    W_enc, W_dec, b_enc = sae.W_enc.T[latents], sae.decoder_rows(latents), sae.b_enc[latents]
    if sae.apply_b_dec_to_input:
        b_enc = b_enc - W_enc @ sae.b_dec  # a mat-vec; centring x would add a product to the backward pass
    threshold, norms = torch.zeros_like(b_enc), ops.row_norms(W_dec)
    if sae.threshold is not None:  # a scalar where latents share it
        threshold = sae.threshold.expand(sae.d_sae)[latents]

    def summed(x: Tensor, e: Tensor) -> Tensor:
        pre, loss = torch.addmm(b_enc, x, W_enc.T), x.new_zeros(())
        if pre_act is not None:
            loss = loss + pre_act.coefficient * pre_activation_loss(pre, threshold, norms)
        if ghost is not None:
            loss = loss + ghost.coefficient * ghost_loss(pre, W_dec, e)
        return loss * len(x)

    total, residual = x.new_zeros(()), residual.detach()
    for rows, e in zip(x.split(ROWS), residual.split(ROWS), strict=True):
        total = total + checkpoint(summed, rows, e, use_reentrant=False, preserve_rng_state=False)
    return total / len(x)
