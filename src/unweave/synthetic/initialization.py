"""Weights that are the answer: an SAE whose latents are the true features, exactly or with noise in the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae import SAE
from unweave.synthetic.arguments import own_generator, require_number

if TYPE_CHECKING:
    from unweave.synthetic.dictionary import FeatureDictionary


@torch.no_grad()
def init_sae_to_match_feature_dict(
    sae: SAE,
    feature_dict: FeatureDictionary,
    noise_level: float = 0.0,
    feature_ordering: Sequence[int] | Int64[Tensor, " n"] | None = None,
    *,
    match_bias: bool = True,
    seed: int | None = None,
) -> None:
    """Set the first `m = min(d_sae, num_features)` latents to true features, in place.

        W_dec[i] = v_i        W_enc[:, i] = v_i / ‖v_i‖² + noise_level * N(0, 1)

    The decoder is exactly the truth; noise goes into the encoder alone. The encoder is tied to the decoder such that
    where features do not overlap, a code is the feature's magnitude, whatever the activation function. Latents from m
    on, `b_enc`, thresholds and gains stay as they are. `b_dec` becomes the dictionary's bias, which the SAE subtracts
    from its input: without it, every code would be off by `bias · v_i`. (SAELens leaves it as it is.) A BatchTopK SAE
    that has no threshold yet still needs `calibrate_threshold` before it can encode.

    Args:
        sae: The SAE, for raw activations of the world.
        feature_dict: The true features.
        noise_level: Standard deviation of the encoder's noise, per element.
        feature_ordering: Latent `i` becomes feature `feature_ordering[i]`; at least m distinct indices. None: their own
            order.
        match_bias: Whether `b_dec` is set to the dictionary's bias.
        seed: Of the noise; None: drawn from torch's global state.

    Raises:
        UnweaveError: If the widths differ, the noise level is negative, a feature to be matched has norm 0, or the
            ordering is too short, repeats a feature or names one that does not exist.
    """
    require_number("noise_level", noise_level, least=0)
    features = feature_dict.feature_vectors.detach().to(sae.device, sae.dtype)
    n_features, width = features.shape
    if width != sae.d_in:
        raise UnweaveError(f"the SAE takes activations of width {sae.d_in}, and the dictionary's are of width {width}.")
    m = min(sae.d_sae, n_features)
    if feature_ordering is not None:
        features = features[_checked(feature_ordering, m, n_features).to(sae.device)]
    features = features[:m]
    squares = features.square().sum(1, keepdim=True)
    if bool((squares == 0).any()):
        raise UnweaveError(f"feature {int((squares == 0).nonzero()[0, 0])} in this order is a zero vector.")
    encoder = features / squares
    if noise_level:
        noise = torch.randn(m, width, generator=own_generator(seed))  # on the CPU: the same on every device
        encoder = encoder + noise_level * noise.to(sae.device, sae.dtype)
    sae.W_dec[:m] = features
    sae.W_enc[:, :m] = encoder.T
    if match_bias:
        sae.b_dec.copy_(feature_dict.bias.detach())


def _checked(ordering: Sequence[int] | Tensor, m: int, n_features: int) -> Int64[Tensor, " m"]:
    """The first m indices of an ordering."""
    order = torch.as_tensor(ordering, dtype=torch.int64).cpu().flatten()
    if len(order) < m:
        raise UnweaveError(f"feature_ordering has {len(order)} indices, and {m} latents are to be set.")
    order = order[:m]
    outside = order[(order < 0) | (order >= n_features)]
    if len(outside):
        raise UnweaveError(f"feature_ordering names feature {int(outside[0])}, and there are {n_features} features.")
    values, counts = order.unique(return_counts=True)
    if len(values) < m:
        raise UnweaveError(f"feature_ordering names feature {int(values[counts > 1][0])} more than once.")
    return order
