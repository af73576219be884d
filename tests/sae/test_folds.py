import pytest
import torch

from unweave._errors import UnweaveError
from unweave.sae import (
    SAE,
    AbsTopK,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    Normalization,
    ReLU,
    TanhReLU,
    TopK,
    Transcoder,
    fold_decoder_norms,
    fold_input_scale,
    fold_normalization,
)

SHARED = JumpReLU(0.2, 0.1, shared=True)
RANKED = [TopK(3), AbsTopK(3), GroupMax(4), BatchTopK(3)]
ACTIVATIONS = [ReLU(), *RANKED, JumpReLU(0.2, 0.1), SHARED, Gated()]


def make(activation, same_norms=False, **kwargs):
    generator = torch.Generator().manual_seed(0)
    sae = SAE(7, 24, activation, generator=generator, **kwargs).double().requires_grad_(False)
    sae.b_enc.copy_(torch.randn(24, generator=generator) * 0.2)
    sae.b_dec.copy_(torch.randn(7, generator=generator))
    sae.W_dec.mul_(3.0 if same_norms else torch.rand(24, 1, generator=generator) + 0.5)
    if isinstance(activation, BatchTopK):
        sae.threshold.fill_(0.4)
    if isinstance(activation, Gated):
        sae.r_mag.copy_(torch.randn(24, generator=generator) * 0.3)
        sae.b_mag.copy_(torch.randn(24, generator=generator) * 0.3)
    return sae


@pytest.mark.parametrize("activation", [*ACTIVATIONS, TanhReLU()], ids=str)
def test_input_scale(activation):
    """pitfall_129, pitfall_140: after the fold the SAE does to x what it did to scale * x."""
    sae, x = make(activation), torch.randn(20, 7, dtype=torch.float64)
    codes, x_hat = sae.encode(2.5 * x), sae(2.5 * x) / 2.5
    fold_input_scale(sae, 2.5)
    torch.testing.assert_close(sae.encode(x), codes)
    torch.testing.assert_close(sae(x), x_hat)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_decoder_norms(activation):
    """pitfall_064, pitfall_129: codes times their norms, thresholds too; the reconstruction stays."""
    sae = make(activation, same_norms=activation in [*RANKED, SHARED])
    x = torch.randn(20, 7, dtype=torch.float64)
    codes, x_hat, norms = sae.encode(x), sae(x), sae.W_dec.norm(dim=1)
    fold_decoder_norms(sae)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24, dtype=torch.float64))
    torch.testing.assert_close(sae.encode(x), codes * norms)
    torch.testing.assert_close(sae(x), x_hat)


@pytest.mark.parametrize("activation", [*RANKED, SHARED], ids=str)
def test_a_fold_that_changes_the_winners_is_refused(activation):
    """pitfall_066"""
    with pytest.raises(UnweaveError, match="norms"):
        fold_decoder_norms(make(activation))


def test_codes_that_saturate_take_no_norms_over():
    with pytest.raises(UnweaveError, match="do not scale"):
        fold_decoder_norms(make(TanhReLU(), same_norms=True))


def correlated(n=200):
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    return torch.randn(n, 7, generator=generator, dtype=torch.float64) @ mix * 5 + 3


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("kind", ["center", "whiten"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, TanhReLU()], ids=str)
def test_normalisation(activation, kind, apply_b_dec_to_input):
    """pitfall_065, 133: after the fold raw activations give the codes of normalised ones, and outputs in raw units."""
    x = correlated()
    normalization = Normalization.fit(kind, x)
    sae = make(activation, apply_b_dec_to_input=apply_b_dec_to_input)
    shown = normalization(x)
    codes, x_hat = sae.encode(shown), sae(shown)
    assert 0 < (codes != 0).double().mean() < 1
    if kind == "whiten":
        x_hat = x_hat @ normalization.inverse
    fold_normalization(sae, normalization)
    torch.testing.assert_close(sae.encode(x), codes)
    torch.testing.assert_close(sae(x), x_hat / normalization.scale + normalization.mean)
    back = normalization.reversed()
    torch.testing.assert_close(back(shown), x)
    fold_normalization(sae, back)  # to the SAE of normalised activations, for training it further
    torch.testing.assert_close(sae.encode(shown), codes)


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_a_factor_for_every_token_is_not_folded(kind):
    normalization = Normalization.fit(kind, correlated())
    with pytest.raises(UnweaveError, match="every token"):
        fold_normalization(make(ReLU()), normalization)
    with pytest.raises(UnweaveError, match="every token"):
        normalization.reversed()


def test_a_transcoder_has_no_one_space():
    with pytest.raises(UnweaveError, match="units of the input"):
        fold_normalization(Transcoder(7, 7, 24, ReLU()).double(), Normalization.fit("whiten", correlated()))


def test_rows_of_zeros_stay():
    sae = make(ReLU())
    sae.W_dec[3] = 0
    fold_decoder_norms(sae)
    assert sae.W_dec[3].abs().sum() == 0
    assert all(t.isfinite().all() for t in sae.state_dict().values())
