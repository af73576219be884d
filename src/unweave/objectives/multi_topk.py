"""Multi-TopK: the SAE also reconstructs with a larger k, so that k may be changed later (Gao et al., arXiv 2406.04093).

A TopK SAE fits the k that it was trained with so closely that more latents make its reconstructions worse. A second
reconstruction with several times as many latents, at a small weight, cures that.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.objectives.reconstruction import squared_error
from unweave.objectives.schedules import Schedule
from unweave.sae import ops
from unweave.sae.codes import SparseCodes


@dataclass(frozen=True)
class MultiTopK:
    """A second reconstruction, with a larger k.

    Attributes:
        k: Latents of the second reconstruction (per token; for BatchTopK on average). None: four times the activation
            function's k, at most d_sae.
        coefficient: Relative to the main reconstruction, whose squared error is measured alike (1/8 as published).
        schedule: Multiplies the coefficient; None: it stays.
    """

    k: int | None = None
    coefficient: float = 1 / 8
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if self.coefficient < 0 or (self.k is not None and self.k < 1):
            raise UnweaveError(f"MultiTopK needs coefficient >= 0 and k >= 1, got {self.coefficient} and {self.k}.")

    def k_for(self, k: int, d_sae: int) -> int:
        """The larger k, beside an activation function's `k`.

        Raises:
            UnweaveError: If it is not larger than `k`, or larger than d_sae.
        """
        larger = min(4 * k, d_sae) if self.k is None else self.k
        if not k < larger <= d_sae:
            raise UnweaveError(f"Multi-TopK needs a k above the first, {k}, and up to d_sae={d_sae}, got {larger}.")
        return larger


def multi_topk_error(
    extra: SparseCodes,
    W_dec: Float[Tensor, "d_sae d"],
    x_hat: Float[Tensor, "n d"],
    x: Float[Tensor, "n d"],
    weights: Float[Tensor, "..."] | None = None,
    signed: bool = False,
) -> Float[Tensor, ""]:
    """Squared error of the reconstruction with the larger k, without its coefficient.

    Args:
        extra: Pre-activations that the larger k selects beside those in `x_hat`; the negative ones count as 0 unless
            codes are signed.
        W_dec: Decoder.
        x_hat: Reconstruction with the activation function's own k; gets a gradient too.
        x: Inputs.
        weights: Of each token's error; see `error_weights`.
        signed: Whether codes may be negative (AbsTopK).
    """
    codes = extra if signed else extra.with_values(extra.values.relu())
    return squared_error(x_hat + ops.decode(codes, W_dec), x, weights)
