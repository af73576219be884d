"""AuxK: dead latents learn to reconstruct what the living ones leave over (Gao et al., arXiv 2406.04093)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.kernels import spread, squared_norm
from unweave.objectives.schedules import Schedule
from unweave.sae import ops
from unweave.sae.codes import SparseCodes


@dataclass(frozen=True)
class AuxK:
    """The auxiliary loss on dead latents.

    Attributes:
        coefficient: Relative to a main loss that costs 1 when the mean is predicted (1/32 as published).
        k: Dead latents used on each token; by default the power of two nearest to d_in / 2.
        schedule: Multiplies the coefficient; None: it stays.
    """

    coefficient: float = 1 / 32
    k: int | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if self.coefficient < 0 or (self.k is not None and self.k < 1):
            raise UnweaveError(f"AuxK needs coefficient >= 0 and k >= 1, got {self.coefficient} and {self.k}.")

    def k_for(self, d_in: int) -> int:
        """Number of dead latents used on each token."""
        return self.k or max(1, 2 ** round(torch.log2(torch.tensor(d_in / 2)).item()))


def auxk_loss(
    aux: SparseCodes,
    W_dec: ops.Decoder,
    residual: Float[Tensor, "n d"],
    n_dead: int,
    k: int,
    signed: bool = False,
) -> Float[Tensor, ""]:
    """`d * min(1, n_dead / k) * sum|e_hat - e|^2 / sum|e - mean(e)|^2`, where `e_hat` decodes the dead latents.

    Args:
        aux: Pre-activations of the chosen dead latents; the negative ones count as 0 unless codes are signed.
        W_dec: Decoder.
        residual: What the main codes leave over, `x - x_hat`; no gradient flows into it.
        n_dead: Number of dead latents.
        k: Number of dead latents that a token could use.
        signed: Whether codes may be negative (AbsTopK).

    Returns:
        The loss without its coefficient; 0 where the residual does not vary.
    """
    e = residual.detach()
    e_hat = ops.decode(aux if signed else aux.with_values(aux.values.relu()), W_dec)
    varies = spread(e)
    weight = torch.where(varies > 0, 1 / varies, 0.0)  # a division inside the graph would make 0 * inf of it
    return e.shape[1] * squared_norm(e_hat - e) * weight * min(1.0, n_dead / k)
