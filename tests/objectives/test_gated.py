"""The gate's two losses, and the codes that a gate lets through."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from unweave.objectives import L1, gate_error, open_gate
from unweave.sae import SAE, DenseCodes, Gated, SparseCodes, ops


def random_sae(seed, d_in, d_sae):
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(d_in, d_sae, Gated(), generator=generator).double()
    for parameter in sae.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)
    return sae


def step_loss(sae, pre, codes, x, coefficient):
    gate = open_gate(pre)
    main = (ops.decode(codes, sae.W_dec) + sae.b_dec - x).square().sum() / len(x)
    return main + coefficient * L1()(pre, gate, sae) + gate_error(gate, sae.W_dec, sae.b_dec, x)


def gradients(sae):
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in sae.named_parameters()}
    sae.zero_grad()
    return grads


def test_codes_by_hand():
    """gate = u + b_gate decides, exp(r_mag) * u + b_mag is the code; both negative parts count as 0."""
    sae = SAE(1, 4, Gated()).double()
    sae.W_enc.data[:] = 1.0  # u is x for every latent
    sae.b_enc.data = torch.tensor([0.0, -3.0, 1.0, 1.0], dtype=torch.float64)
    sae.r_mag.data[:] = math.log(2.0)
    sae.b_mag.data = torch.tensor([0.5, 0.0, -4.0, -3.0], dtype=torch.float64)
    x = torch.tensor([[2.0]], dtype=torch.float64)
    for codes in (sae.encode(x), sae.training_codes(x).codes.to_dense()):
        assert codes[0].tolist() == pytest.approx([4.5, 0.0, 0.0, 1.0])  # the second gate is closed; 2 * 2 - 4 is 0


@pytest.mark.parametrize("form", [lambda c: c, lambda c: DenseCodes(c.to_dense())], ids=["sparse", "dense"])
def test_gate_error_by_hand(form):
    """pitfall_077: the decoder and its bias are frozen."""
    pre = SparseCodes.from_dense(torch.tensor([[2.0, -1.0], [0.5, 1.0]], dtype=torch.float64))
    pre = pre.with_values(pre.values.requires_grad_())
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    b_dec = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    # x_hat = [[2, 1], [.5, 3]]
    loss = gate_error(open_gate(form(pre)), W_dec, b_dec, x)
    assert loss.item() == pytest.approx((1 + 0 + 0.25 + 9) / 2)
    loss.backward()
    assert W_dec.grad is None
    assert b_dec.grad is None
    assert pre.values.grad.tolist() == pytest.approx([1.0, 0.0, 0.5, 6.0])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_gradients_equal_dense_autograd(seed, n, d_in, d_sae, dense):
    sae = random_sae(seed, d_in, d_sae)
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    pre, codes, _, _ = sae.training_codes(x)
    if dense:
        pre = DenseCodes((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        codes = sae.activation.magnitudes(pre, sae.b_enc, sae.r_mag, sae.b_mag)
    ours = step_loss(sae, pre, codes, x, 0.3)
    ours.backward()
    got = gradients(sae)

    u = (x - sae.b_dec) @ sae.W_enc
    pi = u + sae.b_enc
    active = (pi > 0) * (u * sae.r_mag.exp() + sae.b_mag).relu()
    expected = (
        (x - active @ sae.W_dec - sae.b_dec).square().sum(1).mean()
        + 0.3 * (pi.relu() * sae.W_dec.norm(dim=1)).sum(1).mean()
        + (x - pi.relu() @ sae.W_dec.detach() - sae.b_dec.detach()).square().sum(1).mean()
    )
    torch.testing.assert_close(ours, expected)
    expected.backward()
    torch.testing.assert_close(got, gradients(sae))


def test_codes_give_the_gate_no_gradient():
    sae = random_sae(0, 5, 20)
    codes = sae.training_codes(torch.randn(30, 5, dtype=torch.float64)).codes
    codes.values.square().sum().backward()
    assert sae.b_mag.grad.abs().max() > 1
    assert sae.b_enc.grad.abs().max() < 1e-12


def test_a_gated_sae_is_a_jumprelu_of_its_own():
    """`gate > 0` is `magnitude > b_mag - b_gate * exp(r_mag)`, so a threshold for each latent gives the same codes."""
    sae, x = random_sae(1, 6, 40), torch.randn(50, 6, dtype=torch.float64)
    gain = sae.r_mag.exp()
    pre = (x - sae.b_dec) @ (sae.W_enc * gain) + sae.b_mag
    threshold = (sae.b_mag - sae.b_enc * gain).clamp(min=0)
    torch.testing.assert_close(sae.encode(x), pre * (pre > threshold))


def test_one_product_serves_both_paths():
    """pitfall_098"""
    n, d, m = 600, 32, 512
    sae, x = SAE(d, m, Gated()), torch.randn(n, d)
    sae.b_enc.data.fill_(-2.0)
    with FlopCounterMode(display=False) as counter:
        pre, codes, _, _ = sae.training_codes(x)
    assert isinstance(codes, SparseCodes)
    assert counter.get_total_flops() <= 1.9 * (2 * n * d * m)
    with FlopCounterMode(display=False) as counter:
        step_loss(sae, pre, codes, x, 0.1).backward()
    assert counter.get_total_flops() <= 4 * d * m
