"""An SAE that is the answer: exactly in the decoder, with noise in the encoder alone, and nothing else touched."""

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.sae import SAE, Gated, JumpReLU, ReLU, TopK
from unweave.synthetic.dictionary import FeatureDictionary
from unweave.synthetic.initialization import init_sae_to_match_feature_dict


@pytest.fixture
def features():
    return FeatureDictionary(12, 16, bias=2.0, seed=0)


def test_the_decoder_is_exactly_the_truth(features):
    """pitfall_348: the noise is in the encoder alone."""
    sae = SAE(16, 12, TopK(3))
    init_sae_to_match_feature_dict(sae, features, noise_level=0.1, seed=0)
    assert torch.equal(sae.W_dec, features.feature_vectors)
    noise = (sae.W_enc.T - features.feature_vectors).detach()
    assert noise.std().item() == pytest.approx(0.1, rel=0.25)  # of 192 draws the error is 5% (one sigma)
    assert torch.equal(sae.b_dec, features.bias)
    again = SAE(16, 12, TopK(3))
    init_sae_to_match_feature_dict(again, features, noise_level=0.1, seed=0)
    assert torch.equal(again.W_enc, sae.W_enc)


@pytest.mark.parametrize("activation", [TopK(12), ReLU(), JumpReLU(), Gated()], ids=lambda a: a.name)
@pytest.mark.parametrize("length", [1.0, 3.0])
def test_codes_are_the_magnitudes(activation, length):
    """Of features that do not overlap, whatever their length, and with a bias."""
    features = FeatureDictionary.from_vectors(length * torch.linalg.qr(torch.randn(16, 16)).Q[:12], torch.randn(16))
    truth = torch.rand(50, 12) + 0.5
    sae = SAE(16, 12, activation)
    init_sae_to_match_feature_dict(sae, features)
    torch.testing.assert_close(sae.encode(features(truth)), truth, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(features(truth)), features(truth), atol=1e-5, rtol=1e-5)


def test_latents_beyond_the_features_stay(features):
    sae = SAE(16, 20, JumpReLU())
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    init_sae_to_match_feature_dict(sae, features, noise_level=0.1)
    assert torch.equal(sae.W_dec[12:], before["W_dec"][12:])
    assert torch.equal(sae.W_enc[:, 12:], before["W_enc"][:, 12:])
    assert not torch.equal(sae.W_dec[:12], before["W_dec"][:12])
    for name in ("b_enc", "threshold"):
        assert torch.equal(getattr(sae, name), before[name])


def test_fewer_latents_than_features_in_an_order(features):
    sae = SAE(16, 3, ReLU())
    init_sae_to_match_feature_dict(sae, features, feature_ordering=[5, 0, 11, 2], match_bias=False)
    assert torch.equal(sae.W_dec, features.feature_vectors[[5, 0, 11]])
    assert not sae.b_dec.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_level": -1.0}, "noise_level must be .*at least 0, got -1.0"),
        ({"feature_ordering": [0, 1]}, "has 2 indices, and 12"),
        ({"feature_ordering": [0, *range(11)]}, "feature 0 more than once"),
        ({"feature_ordering": range(1, 13)}, "names feature 12, and there are 12"),
    ],
)
def test_bad_input(features, arguments, message):
    sae = SAE(16, 12, ReLU())
    before = sae.W_dec.clone()
    with pytest.raises(UnweaveError, match=message):
        init_sae_to_match_feature_dict(sae, features, **arguments)
    assert torch.equal(sae.W_dec, before)


def test_widths_and_zero_vectors(features):
    with pytest.raises(UnweaveError, match="of width 8, and the dictionary's are of width 16"):
        init_sae_to_match_feature_dict(SAE(8, 12, ReLU()), features)
    vectors = torch.eye(4)
    vectors[2] = 0
    with pytest.raises(UnweaveError, match=r"feature 2 .*zero vector"):
        init_sae_to_match_feature_dict(SAE(4, 4, ReLU()), FeatureDictionary.from_vectors(vectors))
