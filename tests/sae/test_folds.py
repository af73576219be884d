import pytest
import torch

from unweave._errors import UnweaveError
from unweave.sae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK, fold_decoder_norms, fold_input_scale

ACTIVATIONS = [ReLU(), TopK(3), BatchTopK(3), JumpReLU(0.2, 0.1), Gated()]


def make(activation, same_norms=False):
    generator = torch.Generator().manual_seed(0)
    sae = SAE(7, 23, activation, generator=generator).double().requires_grad_(False)
    sae.b_enc.copy_(torch.randn(23, generator=generator) * 0.2)
    sae.b_dec.copy_(torch.randn(7, generator=generator))
    sae.W_dec.mul_(3.0 if same_norms else torch.rand(23, 1, generator=generator) + 0.5)
    if isinstance(activation, BatchTopK):
        sae.threshold.fill_(0.4)
    if isinstance(activation, Gated):
        sae.r_mag.copy_(torch.randn(23, generator=generator) * 0.3)
        sae.b_mag.copy_(torch.randn(23, generator=generator) * 0.3)
    return sae


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
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
    sae = make(activation, same_norms=isinstance(activation, TopK | BatchTopK))
    x = torch.randn(20, 7, dtype=torch.float64)
    codes, x_hat, norms = sae.encode(x), sae(x), sae.W_dec.norm(dim=1)
    fold_decoder_norms(sae)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(23, dtype=torch.float64))
    torch.testing.assert_close(sae.encode(x), codes * norms)
    torch.testing.assert_close(sae(x), x_hat)


@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(3)], ids=str)
def test_a_fold_that_changes_the_winners_is_refused(activation):
    """pitfall_066"""
    with pytest.raises(UnweaveError, match="norms"):
        fold_decoder_norms(make(activation))


def test_rows_of_zeros_stay():
    sae = make(ReLU())
    sae.W_dec[3] = 0
    fold_decoder_norms(sae)
    assert sae.W_dec[3].abs().sum() == 0
    assert all(t.isfinite().all() for t in sae.state_dict().values())
