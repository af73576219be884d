"""Orders of latents: by the true feature that each matches best."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave import SAE, TopK, UnweaveError
from unweave.synthetic.dictionary import FeatureDictionary
from unweave.synthetic.ordering import (
    find_best_feature_ordering,
    find_best_feature_ordering_across_saes,
    find_best_feature_ordering_from_sae,
)


def sae_of(decoder):
    sae = SAE(decoder.shape[1], len(decoder), TopK(1))
    sae.W_dec.data.copy_(decoder)
    return sae


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 20))
def test_a_permuted_dictionary_is_put_back(seed, n):
    generator = torch.Generator().manual_seed(seed)
    features = torch.linalg.qr(torch.randn(20, 20, generator=generator)).Q[:n]
    permutation = torch.randperm(n, generator=generator)
    signs = torch.randint(0, 2, (n, 1), generator=generator) * 2.0 - 1  # the sign of a latent does not matter
    latents = (features * signs * 3)[permutation]
    ordering = find_best_feature_ordering(latents, features)
    assert torch.equal(permutation[ordering], torch.arange(n))


def test_latents_of_one_feature_stay_in_their_order():
    features = torch.eye(3)
    latents = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 0, 2], [3, 0, 0]])
    assert find_best_feature_ordering(latents, features).tolist() == [1, 3, 0, 2]


def test_widths_must_agree():
    with pytest.raises(UnweaveError, match=r"width 4 .* width 5"):
        find_best_feature_ordering(torch.eye(4), torch.eye(5))


@pytest.mark.parametrize("n_latents", [5, 12, 20])
def test_across_saes_the_closest_one_decides(n_latents):
    """Also with fewer or more latents than features (D-SY-7)."""
    features = FeatureDictionary(12, 24, seed=0)
    wanted = torch.randperm(max(n_latents, 12), generator=torch.Generator().manual_seed(1))
    decoder = torch.randn(max(n_latents, 12), 24, generator=torch.Generator().manual_seed(2))
    decoder[:12] = features.feature_vectors
    good = sae_of(decoder[wanted][:n_latents])
    bad = SAE(24, n_latents, TopK(1), generator=torch.Generator().manual_seed(3))
    expected = find_best_feature_ordering_from_sae(good, features)
    if n_latents == 12:
        assert torch.equal(find_best_feature_ordering_across_saes([bad, good], features), expected)
    assert len(find_best_feature_ordering_across_saes(iter([bad, good, bad]), features)) == n_latents


def test_the_first_sae_wins_a_tie_and_none_is_an_error():
    features = FeatureDictionary(4, 8, seed=0)
    first, second = sae_of(features.feature_vectors), sae_of(features.feature_vectors.flip(0))
    assert find_best_feature_ordering_across_saes([second, first], features).tolist() == [3, 2, 1, 0]
    assert find_best_feature_ordering_across_saes([first, second], features).tolist() == [0, 1, 2, 3]
    with pytest.raises(UnweaveError, match="no SAEs"):
        find_best_feature_ordering_across_saes([], features)
