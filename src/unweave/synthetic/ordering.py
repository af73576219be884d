"""Orders of latents in which it can be seen what they found: by the true feature that each matches best."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae import SAE
from unweave.synthetic.dictionary import cosine_similarities

if TYPE_CHECKING:
    from unweave.synthetic.dictionary import FeatureDictionary


@torch.no_grad()
def find_best_feature_ordering(
    sae_features: Float[Tensor, "latents d"], true_features: Float[Tensor, "features d"]
) -> Int64[Tensor, " latents"]:
    """Latents sorted by the index of the true feature with which each has the largest |cosine|.

    Args:
        sae_features: A direction for each latent, of any norm: rows of a decoder, or columns of an encoder transposed.
        true_features: The dictionary.

    Returns:
        Indices of latents; those that match the same feature stay in their order.

    Raises:
        UnweaveError: If the widths differ.
    """
    if sae_features.shape[-1] != true_features.shape[-1]:
        raise UnweaveError(
            f"latents of width {sae_features.shape[-1]} cannot be compared with features of width "
            f"{true_features.shape[-1]}."
        )
    return cosine_similarities(sae_features, true_features).abs().argmax(1).argsort(stable=True)


def find_best_feature_ordering_from_sae(sae: SAE, feature_dict: FeatureDictionary) -> Int64[Tensor, " latents"]:
    """`find_best_feature_ordering` of an SAE's decoder."""
    return find_best_feature_ordering(sae.W_dec, feature_dict.feature_vectors)


@torch.no_grad()
def find_best_feature_ordering_across_saes(
    saes: Iterable[SAE], feature_dict: FeatureDictionary
) -> Int64[Tensor, " latents"]:
    """The one ordering, of those that are best for each SAE, under which its SAE is closest to the dictionary.

    For SAEs whose latents correspond, such as snapshots of one training run, so that one order serves all pictures.
    Closeness is the mean cosine of the latent in place j with feature j, over the places that both have; cosines are
    rounded to two decimals, so that noise does not decide, and the first SAE wins a tie.

    Raises:
        UnweaveError: If there are no SAEs.
    """
    best, ordering = float("-inf"), None
    for sae in saes:
        own = find_best_feature_ordering_from_sae(sae, feature_dict)
        places = min(len(own), len(feature_dict.feature_vectors))
        cosines = torch.cosine_similarity(sae.W_dec[own[:places]], feature_dict.feature_vectors[:places])
        score = cosines.double().mul(100).round().mean().item()
        if score > best:
            best, ordering = score, own
    if ordering is None:
        raise UnweaveError("there are no SAEs to find an ordering of.")
    return ordering
