"""Pursuits: encoders that choose atoms of the dictionary one by one, each where the residual needs it most.

There is no encoder matrix, so they are tied: what encodes is the decoder. Codes are nested (those of a smaller k are
the first steps of those of a larger one, of matching pursuit value by value), so evaluating with another k than
training used is meaningful.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.kernels import Spec
from unweave.sae import ops
from unweave.sae.activation import Activation, Threshold, register_activation
from unweave.sae.codes import SparseCodes
from unweave.sae.greedy import PART_ROWS, ByProducts, Steps, check_finite, codes_of, pursue, with_gradient
from unweave.sae.nnls import nonnegative_least_squares

if TYPE_CHECKING:
    from unweave.sae.sae import SAE


class Pursuit(Activation):
    """Base of the pursuits, which encode a token by themselves instead of selecting among pre-activations."""

    k: int
    residual_threshold: float
    ranked: ClassVar[bool] = True
    tied: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True
    """Whether codes have a gradient for the dictionary that they are measured with."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.k < 1 or self.k % 1:
            raise UnweaveError(f"{name} needs a whole k of at least 1, got k={self.k}.")
        if not 0 <= self.residual_threshold < float("inf"):
            raise UnweaveError(f"{name} needs a residual_threshold of at least 0, got {self.residual_threshold}.")

    def with_k(self, k: float) -> Any:
        return dataclasses.replace(cast(Any, self), k=round(k))

    def rescaled(self, factor: float) -> Any:
        """The same for inputs that are multiplied by a factor."""
        return dataclasses.replace(cast(Any, self), residual_threshold=self.residual_threshold * factor)

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        raise UnweaveError(f"{type(self).__name__} compares atoms with residuals, so it has no pre-activations.")

    @abstractmethod
    def encode(self, centred: Float[Tensor, "n d_in"], atoms: Float[Tensor, "d_sae d_in"]) -> SparseCodes:
        """The codes of inputs from which the bias is subtracted, with their gradients."""

    def training_codes(
        self, sae: SAE, x: Float[Tensor, "n d_in"], dead: Int64[Tensor, " c"] | None, k_aux: int
    ) -> tuple[SparseCodes, SparseCodes | None]:
        """The codes of a training batch; and, where latents are dead, how matching pursuit would go on with those.

        Args:
            sae: Its weights.
            x: Inputs, at the scale of training.
            dead: Latents that count as dead, ascending.
            k_aux: Most dead latents on each row, which are never more than k; 0 for none.
        """
        centred = x - sae._bias_of_input()
        codes = self.encode(centred, sae.W_dec)
        if dead is None or len(dead) == 0 or k_aux == 0:
            return codes, None
        residual = (centred - ops.decode(codes, sae.W_dec)).detach()
        atoms = sae.W_dec[dead]
        steps = with_gradient(residual, atoms, pursue(residual, atoms, min(self.k, k_aux, len(dead))))
        aux = codes_of(steps, len(dead))
        return codes, SparseCodes(dead[aux.indices], aux.values, aux.offsets, sae.d_sae)


@register_activation
@dataclass(frozen=True)
class MatchingPursuit(Pursuit):
    """The atom that correlates most with the residual, `k` times, its part of the residual removed each time.

    Costa et al., arXiv 2506.03093; Mallat and Zhang 1993. Gradients go through the values of all steps.

    Attributes:
        k: Most steps for a token.
        residual_threshold: Norm of the residual below which a token needs no more steps, in units of inputs scaled to a
            mean squared norm of d_in; 0 for none.
        stop_at_repeat: Whether a token stops after the step that chooses an atom for the second time.
    """

    k: int = 32
    residual_threshold: float = field(default=0.0, compare=False)  # in the units of the inputs, which folds change
    stop_at_repeat: bool = True
    name: ClassVar[str] = "matching_pursuit"

    def encode(self, centred: Float[Tensor, "n d_in"], atoms: Float[Tensor, "d_sae d_in"]) -> SparseCodes:
        steps = pursue(
            centred, atoms, self.k,
            residual_threshold=self.residual_threshold, stop_at_repeat=self.stop_at_repeat,
        )  # fmt: skip
        return codes_of(with_gradient(centred, atoms, steps), len(atoms))


@register_activation
@dataclass(frozen=True)
class OrthogonalMatchingPursuit(Pursuit):
    """Matching pursuit that after each step fits the codes of all chosen atoms anew, by non-negative least squares.

    Pati et al. 1993. The residual becomes orthogonal to every atom of positive code. Codes have no gradient, as they
    are the best for the chosen atoms already; the dictionary learns through the decoder alone.

    Attributes:
        k: Most steps for a token.
        residual_threshold: Norm of the residual below which a token needs no more steps, in units of inputs scaled to a
            mean squared norm of d_in; 0 for none.
    """

    k: int = 32
    residual_threshold: float = field(default=0.0, compare=False)
    name: ClassVar[str] = "orthogonal_matching_pursuit"
    differentiable: ClassVar[bool] = False

    def check(self, d_sae: int) -> None:
        if self.k > d_sae:
            raise UnweaveError(f"k={self.k} is larger than the number of latents, d_sae={d_sae}.")

    @torch.no_grad()
    def encode(self, centred: Float[Tensor, "n d_in"], atoms: Float[Tensor, "d_sae d_in"]) -> SparseCodes:
        centred, atoms = centred.detach(), atoms.detach()
        check_finite(centred, atoms)
        search = ByProducts(atoms)
        # In parts whose chosen atoms take no more memory than a dictionary does.
        parts = centred.split(max(PART_ROWS, len(atoms) // self.k))
        steps = [_orthogonal(part, atoms, self.k, self.residual_threshold, search) for part in parts]
        return codes_of(Steps(*(torch.cat(columns) for columns in zip(*steps, strict=True))), len(atoms))


def _orthogonal(x: Tensor, atoms: Tensor, k: int, residual_threshold: float, search: ByProducts) -> Steps:
    indices = torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
    values = x.new_zeros(len(x), k)
    rows, residual = torch.arange(len(x), device=x.device), x
    for step in range(k):
        chosen = search.best(residual)
        going = torch.linalg.vecdot(residual, atoms[chosen]) > 0
        going &= ~(indices[rows, :step] == chosen[:, None]).any(1)  # the refit has nothing left to do for it
        if residual_threshold > 0 and step:
            going &= residual.norm(dim=1) >= residual_threshold
        left = going.nonzero().flatten()
        if len(left) == 0:
            break
        rows = rows[left]
        indices[rows, step] = chosen[left]
        support = atoms[indices[rows, : step + 1]].double()
        target = x[rows].double()
        fitted = nonnegative_least_squares(support @ support.mT, (support @ target.unsqueeze(2)).squeeze(2))
        values[rows, : step + 1] = fitted.to(x.dtype)
        residual = (target - (fitted.unsqueeze(1) @ support).squeeze(1)).to(x.dtype)
    return Steps(indices, values)
