"""Dictionaries that are not free matrices: tied to the encoder, or made of data points.

A relaxed archetypal dictionary (Fel et al., arXiv 2502.12892) holds every atom near the convex hull of data points,

    D = (W @ C + Lambda) * exp(m)      W >= 0, rows of W sum to 1, |Lambda_i| <= delta

with fixed points C. Dictionaries of different seeds then agree more. Training moves W, Lambda and m; the SAE itself has
the product as its `W_dec`, like any other, so nothing about it is special once it is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unweave._errors import UnweaveError


@dataclass(frozen=True)
class TiedDictionary:
    """The decoder's rows encode, too: `W_enc` is `W_dec` transposed, and there is one matrix to learn."""


@dataclass(frozen=True)
class ArchetypalDictionary:
    """Atoms near the convex hull of data points, for dictionaries that agree between seeds (arXiv 2502.12892).

    Attributes:
        n_points: Data points, drawn from the first activations; at least d_sae, as every atom starts as one of them.
            None: d_sae.
        delta: Largest distance of an atom from the hull, before the common factor, in units of inputs scaled to a mean
            squared norm of d_in; 0 for a plain archetypal dictionary.
    """

    n_points: int | None = None
    delta: float = 1.0

    def __post_init__(self) -> None:
        if self.delta < 0 or (self.n_points is not None and self.n_points < 1):
            raise UnweaveError(
                "an archetypal dictionary needs delta >= 0 and n_points >= 1, got "
                f"delta={self.delta} and n_points={self.n_points}."
            )

    def points_for(self, d_sae: int) -> int:
        """The number of points for a number of latents.

        Raises:
            UnweaveError: If there are fewer points than latents.
        """
        n_points = self.n_points or d_sae
        if n_points < d_sae:
            raise UnweaveError(
                f"an archetypal dictionary starts every atom at a point of its own: n_points={n_points} is fewer than "
                f"d_sae={d_sae}."
            )
        return n_points


DICTIONARIES: dict[str, type[Any]] = {"tied": TiedDictionary, "archetypal": ArchetypalDictionary}
"""Kinds of dictionaries, by the names that configurations use."""


class ArchetypalAtoms(nn.Module):
    """The parameters of a relaxed archetypal dictionary.

    Atoms start as points, at a common factor that gives them a mean norm of 1.

    Args:
        points: `(n_points, d_in)`, of which the first `d_sae` become the initial atoms.
        d_sae: Number of atoms.
        delta: Largest norm of a row of the relaxation.

    Raises:
        UnweaveError: If there are fewer points than atoms, or they are all 0.
    """

    points: Tensor

    def __init__(self, points: Float[Tensor, "n_points d_in"], d_sae: int, delta: float) -> None:
        super().__init__()
        if len(points) < d_sae:
            raise UnweaveError(f"an archetypal dictionary of {d_sae} atoms needs as many points, got {len(points)}.")
        norm = points[:d_sae].norm(dim=1).mean()
        if norm == 0:
            raise UnweaveError("the points of an archetypal dictionary are all 0.")
        self.delta = delta
        self.register_buffer("points", points)
        self.weights = nn.Parameter(torch.eye(d_sae, len(points), device=points.device, dtype=points.dtype))
        self.relaxation = nn.Parameter(points.new_zeros(d_sae, points.shape[1]))
        self.log_scale = nn.Parameter(-norm.log())

    @torch.no_grad()
    def atoms(self) -> Float[Tensor, "d_sae d_in"]:
        """The dictionary."""
        return torch.addmm(self.relaxation, self.weights, self.points) * self.log_scale.exp()

    @torch.no_grad()
    def gradients(
        self, grad: Float[Tensor, "d_sae d_in"], atoms: Float[Tensor, "d_sae d_in"]
    ) -> tuple[Float[Tensor, "d_sae n_points"], Float[Tensor, "d_sae d_in"], Float[Tensor, ""]]:
        """The gradients of the weights, of the relaxation and of the scale, from that of the dictionary.

        Args:
            grad: The gradient of the dictionary.
            atoms: The dictionary as it is.
        """
        of_sum = grad * self.log_scale.exp()
        return of_sum @ self.points.T, of_sum, (grad * atoms).sum()

    @torch.no_grad()
    def project(self) -> None:
        """Bring the parameters back to where they are allowed, after a step."""
        onto_simplex(self.weights)
        norms = self.relaxation.norm(dim=1, keepdim=True)
        self.relaxation.mul_((self.delta / norms.clamp(min=1e-12)).clamp(max=1))


@torch.no_grad()
def onto_simplex(rows: Float[Tensor, "m n"]) -> None:
    """Move each row, in place, to the nearest one whose entries are not negative and sum to 1.

    The nearest is the row less a common amount, cut off at 0. Cutting off and dividing by the sum, as published, is not
    it: Adam moves every entry by about the learning rate, so that of a thousand zeros half would rise together, and
    after a few steps outweigh the 1 beside them, whose atom ends in the middle of all points.
    """
    top = rows.amax(1, keepdim=True)
    largest = rows == top  # which stays, whatever rounding does to the amount
    kept = (rows > top - 1).logical_or_(largest)  # the largest keeps 1 at most, so that the amount is not below this
    n_kept, before = kept.sum(1, keepdim=True), None
    while before is None or not torch.equal(n_kept, before):  # Michelot's: every round drops entries, or is the last
        amount = (torch.where(kept, rows, 0.0).sum(1, keepdim=True) - 1) / n_kept
        kept &= (rows > amount).logical_or_(largest)
        before, n_kept = n_kept, kept.sum(1, keepdim=True)
    rows.sub_(amount).clamp_(min=0)
