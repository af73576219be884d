"""Every loss term by hand, and where its gradient goes."""

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.objectives import L1, AuxK, TargetL0, auxk_loss, squared_error
from unweave.sae import SAE, DenseCodes, JumpReLU, ReLU, SparseCodes, TopK, ops


def codes(dense):
    return SparseCodes.from_dense(torch.tensor(dense, dtype=torch.float64))


def test_squared_error_sums_over_d_and_averages_over_tokens():
    """pitfall_076"""
    x_hat, x = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    assert squared_error(x_hat, x).item() == pytest.approx((1 + 4 + 9 + 1) / 2)


@pytest.mark.parametrize("form", [lambda c: c, lambda c: DenseCodes(c.to_dense())], ids=["sparse", "dense"])
def test_l1_weighs_codes_by_decoder_norms(form):
    """pitfall_097"""
    sae = SAE(1, 3, ReLU()).double()
    sae.W_dec.data = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    used = form(codes([[1.0, 0.0, 2.0], [0.0, 4.0, 0.0]]))
    penalty = L1()(used, used, sae)
    assert penalty.item() == pytest.approx((1 * 1 + 2 * 3 + 4 * 2) / 2)
    penalty.backward()
    assert sae.W_dec.grad.flatten().tolist() == [0.5, 2.0, 1.0]


def test_target_l0_by_hand():
    """pitfall_095: the target is for the batch's mean L0: tokens with L0 1 and 3 are on a target of 2."""
    activation = JumpReLU(init_threshold=0.5, bandwidth=0.2)
    pre = codes([[0.55, 0.0, 0.0], [0.9, 0.8, 0.7]])
    sae = SAE(1, 3, activation).double()
    assert TargetL0(2)(pre, pre, sae).item() == 0
    penalty = TargetL0(1)(pre, pre, sae)
    assert penalty.item() == pytest.approx(1.0)
    penalty.backward()
    # Only 0.55 lies in the window: d/dthreshold of (L0/1 - 1)^2 is 2 * (2 - 1) * (-1 / 0.2) / 2 tokens.
    assert sae.threshold.grad.tolist() == pytest.approx([-5.0, 0.0, 0.0])
    # From twice the target on the slope stays 2: at L0 2 and a target of 0.5, four times it, 1 + 2 * (3 - 1) = 5.
    sae.threshold.grad = None
    penalty = TargetL0(0.5)(pre, pre, sae)
    assert penalty.item() == pytest.approx(5.0)
    penalty.backward()
    assert sae.threshold.grad.tolist() == pytest.approx([2 / 0.5 * (-1 / 0.2) / 2, 0.0, 0.0])
    value, slope = TargetL0.of(torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 3.0]))
    assert value.tolist() == [1.0, 0.25, 0.0, 0.25, 1.0, 5.0]
    assert slope.tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0, 2.0]


def test_auxk_by_hand():
    """pitfall_090, pitfall_104, pitfall_105: relative to the residual's variance; negative ones count as 0."""
    residual = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    W_dec = torch.eye(2, dtype=torch.float64)
    aux = codes([[0.5, -3.0], [-1.0, -1.0]])
    # e_hat = [[.5, 0], [0, 0]]; sum |e_hat - e|^2 = .25 + 1; spread = 2; one of two dead latents; d = 2.
    assert auxk_loss(aux, W_dec, residual, 1, 2).item() == pytest.approx(2 * 0.5 * 1.25 / 2)
    scaled = auxk_loss(aux.with_values(aux.values * 10), W_dec, residual * 10, 1, 2)
    assert scaled.item() == pytest.approx(2 * 0.5 * 1.25 / 2)


def test_auxk_of_a_constant_residual_is_zero_and_so_is_its_gradient():
    W_dec = torch.eye(2, dtype=torch.float64, requires_grad=True)
    loss = auxk_loss(codes([[1.0, 1.0]] * 3), W_dec, torch.ones(3, 2, dtype=torch.float64), 2, 2)
    loss.backward()
    assert loss.item() == 0
    assert W_dec.grad.abs().sum() == 0


def test_default_l1_coefficient_grows_with_the_width():
    """pitfall_087: None is the documented value."""
    assert L1().coefficient_for(2500) == pytest.approx(5.0)
    assert L1(3.0).coefficient_for(2500) == 3.0


def test_auxk_gradient_reaches_dead_latents_alone():
    """pitfall_102, pitfall_103, pitfall_106: residual detached, no bias, encoder and decoder of dead latents only."""
    sae, x = SAE(6, 20, TopK(2), generator=torch.Generator().manual_seed(0)).double(), torch.randn(30, 6).double()
    dead = torch.tensor([2, 5, 11])
    _, active, aux, _ = sae.training_codes(x, dead, 2)
    residual = x - ops.decode(active, sae.W_dec) - sae.b_dec
    auxk_loss(aux, sae.W_dec, residual, 3, 2).backward()
    for grad in (sae.W_enc.grad.T, sae.W_dec.grad):
        assert (grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [2, 5, 11]


def test_auxk_default_k_is_a_power_of_two_near_half_the_width():
    assert AuxK().k_for(768) == 512 or AuxK().k_for(768) == 256
    assert AuxK().k_for(256) == 128
    assert AuxK(k=7).k_for(256) == 7


@pytest.mark.parametrize(
    "make", [lambda: L1(-1), lambda: TargetL0(0), lambda: TargetL0(5, -1), lambda: AuxK(-1), lambda: AuxK(1, 0)]
)
def test_impossible_settings(make):
    with pytest.raises(UnweaveError, match="needs"):
        make()
