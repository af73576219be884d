"""Reanimation: pre-activations of latents that did not fire are pushed up (overcomplete, Fel et al.)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.objectives.schedules import Schedule
from unweave.sae import SAE


@dataclass(frozen=True)
class Reanimation:
    """Pushes up the pre-activations of every latent that did not fire in the batch, whatever the residual needs.

    Attributes:
        coefficient: Multiplies the mean pre-activation, which is subtracted from the loss, for inputs scaled to a mean
            squared norm of d_in. None: `1e-3 * d_in`, overcomplete's default beside an error averaged over d.
        schedule: Multiplies the coefficient; None: it stays.
    """

    coefficient: float | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if self.coefficient is not None and not self.coefficient >= 0:
            raise UnweaveError(f"Reanimation needs a coefficient of at least 0, got {self.coefficient}.")

    def coefficient_for(self, d_in: int) -> float:
        """The coefficient at a width."""
        return 1e-3 * d_in if self.coefficient is None else self.coefficient


def reanimation_loss(sae: SAE, latents: Int64[Tensor, " c"], x: Float[Tensor, "n d_in"]) -> Float[Tensor, ""]:
    """`-(mean over tokens and latents of the pre-activation)`; 0 if there are no latents.

    The mean is linear in the inputs, so it costs two mat-vecs and no product with the batch.

    Args:
        sae: The SAE in training.
        latents: Those that did not fire.
        x: Inputs, at the scale of training; they get no gradient.
    """
    if len(latents) == 0:
        return x.new_zeros(())
    mean = x.detach().mean(0)
    if sae.apply_b_dec_to_input:
        mean = mean - sae.b_dec
    return -(sae.W_enc.T[latents] @ mean + sae.b_enc[latents]).mean()
