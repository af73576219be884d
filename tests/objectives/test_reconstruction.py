"""Errors relative to the size of the targets, prefixes that are drawn, and reanimation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.objectives import RandomMatryoshka, Reanimation, error_weights, reanimation_loss, squared_error
from unweave.sae import SAE, ReLU


def test_errors_by_hand():
    x = torch.tensor([[3.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    x_hat = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    assert error_weights("squared", x) is None
    assert squared_error(x_hat, x).item() == 2.5
    # The variance of x is 1, the squared norms are 9 and 1.
    assert squared_error(x_hat, x, error_weights("variance", x)).item() == pytest.approx(2 * 2.5)
    assert squared_error(x_hat, x, error_weights("token", x)).item() == pytest.approx(2 * (1 / 9 + 4) / 2)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(2, 8), st.integers(1, 5), st.floats(1e-3, 1e3))
def test_errors_are_dimensionless(seed, n, d, scale):
    """pitfall_093: they stay what they are when everything is scaled, with gradients as from the dense formula."""
    generator = torch.Generator().manual_seed(seed)
    x, x_hat = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    for error in ("variance", "token"):
        own = (scale * x_hat).requires_grad_()
        loss = squared_error(own, scale * x, error_weights(error, scale * x))
        loss.backward()
        other = x_hat.clone().requires_grad_()
        squares = (other - x).square().sum(1)
        size = (x - x.mean(0)).square().sum(1).mean() if error == "variance" else x.square().sum(1)
        expected = d * (squares / size).mean()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(own.grad * scale, other.grad)


def test_predicting_the_mean_of_the_batch_costs_d():
    x = torch.randn(50, 7).double() * 3 + 1
    assert squared_error(x.mean(0).expand_as(x), x, error_weights("variance", x)).item() == pytest.approx(7)


def test_tokens_of_norm_0_and_constant_batches_count_nothing():
    assert error_weights("token", torch.tensor([[0.0], [2.0]])).tolist() == [0.0, 0.25]
    assert error_weights("variance", torch.ones(3, 2)).item() == 0


def test_there_is_no_other_error():
    with pytest.raises(UnweaveError, match="'variance'"):
        error_weights("relative", torch.ones(3, 2))


@pytest.mark.parametrize(
    ("law", "medians"),
    [
        ("sqrt", [100, 540, 1370, 2630, 4060, 5930, 8300, 11_100, 14_100, 16_384]),
        ("inverse_sqrt", [2, 3, 4, 6, 10, 16, 28, 71, 390, 16_384]),
    ],
)
def test_the_laws_of_random_prefixes(law, medians):
    """pitfall_085, pitfall_086: the medians of ten widths at 16,384 latents."""
    generator = torch.Generator().manual_seed(0)
    drawn = [RandomMatryoshka(10, law).draw(16_384, generator) for _ in range(2000)]
    assert all(list(w) == sorted(set(w)) and w[0] >= 1 and w[-1] == 16_384 for w in drawn)
    widths = torch.tensor([w for w in drawn if len(w) == 10])
    for got, expected in zip(widths.median(0).values.tolist(), medians, strict=True):
        assert got == pytest.approx(expected, rel=0.15), (got, expected)


def test_random_prefixes_of_a_small_dictionary():
    generator = torch.Generator().manual_seed(0)
    assert RandomMatryoshka(7, "inverse_sqrt").draw(8, generator) == (2, 3, 4, 5, 6, 7, 8)
    for make in (
        lambda: RandomMatryoshka(1),
        lambda: RandomMatryoshka(law="pareto"),
        lambda: RandomMatryoshka(9).check(8),
        lambda: RandomMatryoshka(8, "inverse_sqrt").check(8),
    ):
        with pytest.raises(UnweaveError):
            make()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 4), st.integers(1, 8), st.booleans())
def test_reanimation_equals_the_dense_formula(seed, n, d, m, subtract):
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(d, m, ReLU(), apply_b_dec_to_input=subtract, generator=generator).double()
    sae.b_dec.data.normal_(generator=generator)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    latents = torch.arange(0, m, 2)
    loss = reanimation_loss(sae, latents, x)
    got = torch.autograd.grad(loss, [sae.W_enc, sae.b_enc, sae.b_dec], allow_unused=True, materialize_grads=True)
    pre = (x - sae.b_dec * subtract) @ sae.W_enc + sae.b_enc
    expected = -pre[:, latents].mean()
    wanted = torch.autograd.grad(expected, [sae.W_enc, sae.b_enc, sae.b_dec], allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, wanted)


def test_reanimation_by_hand():
    sae = SAE(1, 2, ReLU()).double()
    sae.W_enc.data = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    assert reanimation_loss(sae, torch.tensor([1]), x).item() == 4.0
    assert reanimation_loss(sae, torch.tensor([], dtype=torch.int64), x).item() == 0
    assert Reanimation().coefficient_for(500) == pytest.approx(0.5)
    with pytest.raises(UnweaveError, match="needs"):
        Reanimation(-1.0)
