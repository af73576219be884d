"""Resampling: dead latents start anew, as tokens that the SAE reconstructs badly (Bricken et al. 2023).

The rule of Towards Monosemanticity: draw tokens with a probability in proportion to the square of their loss; the
decoder row becomes the token's direction, the encoder's the same direction at a fifth of the living latents' mean norm,
the bias 0; Adam forgets those rows. Tokens come from the batch of that step (as published from 819,200 tokens), each at
most once, so that no two latents start alike; if more latents are dead than there are tokens, the others wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from unweave._errors import UnweaveError
from unweave.sae import SAE
from unweave.training.optimizer import Adam, as_rows


@dataclass(frozen=True)
class Resampling:
    """When and how dead latents are replaced.

    Attributes:
        at: Shares of the run after which it happens (25k, 50k, 75k and 100k of 200k steps as published).
        encoder_scale: Norm of a new encoder row, relative to the mean of the living ones.
        power: Tokens are drawn in proportion to this power of their squared error (2 as published).
    """

    at: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5)
    encoder_scale: float = 0.2
    power: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", tuple(self.at))
        if not self.at or not all(0 < share < 1 for share in self.at):
            raise UnweaveError(f"resampling happens after shares of the run between 0 and 1, got {self.at}.")
        if not self.encoder_scale > 0 or not self.power >= 0:
            raise UnweaveError(
                f"Resampling needs encoder_scale > 0 and power >= 0, got {self.encoder_scale} and {self.power}."
            )

    def due(self, step: int, steps: int) -> bool:
        """Whether latents are replaced after a step (from 0) of a run."""
        return step in {round(share * steps) for share in self.at}


@torch.no_grad()
def resample(
    sae: SAE,
    optimizer: Adam,
    dead: Bool[Tensor, " d_sae"],
    x: Float[Tensor, "n d_in"],
    config: Resampling,
    generator: torch.Generator,
) -> Tensor:
    """Replace dead latents, in place, and return which ones.

    Args:
        sae: The autoencoder in training.
        optimizer: Its optimiser, which forgets the moments of what is replaced.
        dead: The dead latents.
        x: Inputs at the scale of training.
        config: How.
        generator: Source of the draws, on the CPU.
    """
    latents = dead.nonzero().flatten()
    codes = sae.training_codes(x).codes
    weights = (x - sae.output(codes, x)).square().sum(1).double().pow(config.power).cpu()
    drawable = int((weights > 0).sum())
    latents = latents[: min(len(latents), drawable)]
    if len(latents) == 0:
        return latents
    chosen = torch.multinomial(weights / weights.sum(), len(latents), generator=generator).to(x.device)
    directions = normalize(x[chosen] - (sae.b_dec if sae.apply_b_dec_to_input else x.mean(0)), dim=1)
    alive = ~dead if bool((~dead).any()) else dead
    encoder_norm = sae.W_enc.T[alive].norm(dim=1).mean()
    # Rows of free norm start as long as the others are.
    decoder_norm = sae.W_dec[alive].norm(dim=1).mean()
    sae.W_dec[latents] = directions * decoder_norm
    if not sae.tied:
        sae.W_enc.T[latents] = directions * (config.encoder_scale * encoder_norm)
    sae.b_enc[latents] = 0.0
    for W, b in sae.encoders[1:]:
        W.T[latents], b[latents] = 0.0, 0.0
    if isinstance(sae.threshold, torch.nn.Parameter) and sae.threshold.ndim:
        sae.threshold[latents] = sae.activation.initial_threshold
    for name, initial in sae.activation.parameters(sae.d_sae).items():
        if initial.shape[:1] == (sae.d_sae,):
            getattr(sae, name)[latents] = initial[latents.cpu()].to(x.device, x.dtype)
    _forget(optimizer, latents, sae.d_sae)
    return latents


def _forget(optimizer: Adam, latents: Tensor, d_sae: int) -> None:
    """Set the moments of some latents to 0, by the names of their parameters."""
    for name, parameter in optimizer.parameters.items():
        if name == "b_dec":
            continue
        rows = as_rows(name, parameter)
        for moment in optimizer.moments[name]:
            if rows.shape[0] == d_sae:
                moment[latents] = 0
            elif rows.shape == (1, d_sae):
                moment[:, latents] = 0
