"""Normalisation of inputs: statistics by hand, what is refused, and the per-token kinds at run time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.sae import SAE, Normalization, ReLU, TopK
from unweave.sae.normalization import token_statistics


def correlated(n=300, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix * 4 - 2


@settings(deadline=None, max_examples=40)
@given(d=st.integers(1, 8), seed=st.integers(0, 2**20), scale=st.floats(1e-3, 1e4))
def test_center_and_whiten(d, seed, scale):
    """Both have mean 0; the first keeps the shape, the second has unit variance in every direction."""
    x = correlated(d=d, seed=seed) * scale
    centred = Normalization.fit("center", x)(x)
    torch.testing.assert_close(centred.mean(0), torch.zeros(d, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(centred.square().sum(1).mean().item(), float(d))
    torch.testing.assert_close(centred / centred.norm(), (x - x.mean(0)) / (x - x.mean(0)).norm())
    normalization = Normalization.fit("whiten", x)
    white = normalization(x)
    covariance = white.T @ white / len(x)
    values = torch.linalg.eigvalsh(centred.T @ centred / len(x))
    torch.testing.assert_close(covariance, torch.diag(values / (values + 1e-3)), atol=1e-8, rtol=0)
    torch.testing.assert_close(normalization.matrix @ normalization.inverse, torch.eye(d, dtype=torch.float64))


def test_layer_norm_by_hand():
    """pitfall_145: the standard deviation is the unbiased one, and the 1e-5 is not given back."""
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])
    statistics = token_statistics(x, "layer_norm")
    assert statistics.shift.flatten().tolist() == [2, 4]
    assert statistics.spread.flatten().tolist() == [1, 0]
    torch.testing.assert_close(statistics.apply(x), torch.tensor([[-1.0, 0, 1], [0, 0, 0]]) / (1 + 1e-5))
    torch.testing.assert_close(statistics.undo(torch.ones(2, 3)), torch.tensor([[3.0] * 3, [4.0] * 3]))


def test_constant_norm_rescale_by_hand():
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    statistics = token_statistics(x, "constant_norm_rescale")
    torch.testing.assert_close(statistics.apply(x).norm(dim=1), torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(statistics.undo(statistics.apply(x)), x)


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_per_token_kinds_run_with_the_sae(kind):
    """pitfall_073: nothing of a batch stays on the module; any two calls in between change nothing."""
    sae, x = SAE(6, 24, TopK(3)).double().requires_grad_(False), correlated(20)
    statistics = token_statistics(x, kind)
    plain = sae(statistics.apply(x))
    sae.per_token = kind
    codes = sae.encode_sparse(x)
    sae(correlated(7, seed=5))
    expected = plain * statistics.spread + statistics.shift
    torch.testing.assert_close(sae.output(codes, x), expected)
    torch.testing.assert_close(sae(x.view(4, 5, 6)), expected.view(4, 5, 6))
    with pytest.raises(UnweaveError, match=r"output\(codes, x\)"):
        sae.decode(codes)


def test_scaling_a_token_scales_its_reconstruction():
    """What per-token normalisation is for: codes do not depend on a token's length."""
    sae, x = SAE(6, 24, ReLU()).double(), correlated(20)
    sae.per_token = "constant_norm_rescale"
    torch.testing.assert_close(sae.encode(100 * x), sae.encode(x))
    torch.testing.assert_close(sae(100 * x), 100 * sae(x))


@pytest.mark.parametrize(
    ("kind", "x", "message"),
    [
        ("whiten", correlated(6), "the first 6 activations is singular"),
        ("whiten", torch.cat([correlated(), torch.zeros(300, 1)], 1), "singular"),
        ("whiten", torch.cat([correlated(), correlated()[:, :1]], 1).float(), "singular"),
        ("center", torch.full((10, 3), 5.0), "all activations of the first batch are the same"),
    ],
)
def test_what_cannot_be_normalised(kind, x, message):
    with pytest.raises(UnweaveError, match=message):
        Normalization.fit(kind, x)
