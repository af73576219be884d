"""How far a reconstruction is from its target, plain or relative to how large the targets are.

Whatever the error is relative to, predicting the mean of inputs that are scaled to a mean squared norm of d_in and
centred costs about d_in, so that coefficients keep their meaning.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.kernels import spread, squared_norm

Error = Literal["squared", "variance", "token"]
ERRORS = ("squared", "variance", "token")
"""What `SAEConfig.error` may be; see `error_weights`."""


def squared_error(
    x_hat: Float[Tensor, "n d"], x: Float[Tensor, "n d"], weights: Float[Tensor, "..."] | None = None
) -> Float[Tensor, ""]:
    """`mean over tokens of weight * sum over d of (x_hat - x)^2`.

    Args:
        x_hat: Reconstructions.
        x: Targets.
        weights: One for each token `(n,)`, one for all `()`, or None for 1.
    """
    if weights is None or weights.ndim == 0:
        error = squared_norm(x_hat - x) / len(x)
        return error if weights is None else error * weights
    return ((x_hat - x).square().sum(1) * weights).sum() / len(x)


@torch.no_grad()
def error_weights(error: Error, x: Float[Tensor, "n d"]) -> Float[Tensor, "..."] | None:
    """What each token's squared error is multiplied by.

    Args:
        error: "squared": None. "variance": `d / mean over tokens of |x - mean(x)|^2`, the same for all tokens of the
            batch, so that predicting its mean costs d exactly (OpenAI, sparsify: their fraction of variance unexplained
            times d). "token": `d / |x|^2` of each token, so that every token counts alike whatever its norm (OpenAI's
            normalised error times d); tokens of norm 0 have weight 0.
        x: Targets.

    Raises:
        UnweaveError: If there is no such error.
    """
    if error not in ERRORS:
        raise UnweaveError(f"the error is one of {', '.join(map(repr, ERRORS))}, got {error!r}.")
    if error == "squared":
        return None
    d = x.shape[1]
    squares = spread(x) / len(x) if error == "variance" else x.square().sum(1)
    return torch.where(squares > 0, d / squares, 0.0)
