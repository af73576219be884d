"""The pre-activation loss and ghost gradients, by hand and against dense formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unweave.objectives.dead_latents as dead_latents
from unweave._errors import UnweaveError
from unweave.objectives import GhostGradients, PreActivation, dead_latents_loss, ghost_loss, pre_activation_loss
from unweave.sae import SAE, Gated, JumpReLU, ReLU, TopK

JUMP = JumpReLU(init_threshold=0.3, bandwidth=0.1)


def test_pre_activation_loss_by_hand():
    pre = torch.tensor([[-1.0, 2.0], [0.0, 0.25]], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor([0.0, 0.5], dtype=torch.float64, requires_grad=True)
    norms = torch.tensor([3.0, 2.0], dtype=torch.float64, requires_grad=True)
    loss = pre_activation_loss(pre, threshold, norms)
    assert loss.item() == pytest.approx((3 * 1 + 2 * 0.25) / 2)
    loss.backward()
    assert pre.grad.tolist() == [[-1.5, 0.0], [0.0, -1.0]]
    assert threshold.grad.tolist() == [1.5, 1.0]
    assert norms.grad is None


def test_ghost_loss_by_hand():
    pre = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    W_dec = torch.tensor([[0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    residual = torch.tensor([[0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    # g = [.6, .8] has half the residual's norm already; its squared distances [.36, 1.44] are rescaled to [0, 4].
    loss = ghost_loss(pre, W_dec, residual)
    assert loss.item() == pytest.approx(4.0, rel=1e-5)
    loss.backward()
    slope = 2 * (0.8 - 2) * 4 / 1.44
    assert pre.grad.item() == pytest.approx(slope * 0.8, rel=1e-5)
    assert W_dec.grad[0].tolist() == pytest.approx([0.0, slope], rel=1e-5)
    assert residual.grad is None  # pitfall_102


def published_ghost_loss(pre, W_dec, residual):
    """As published, but what keeps the division by the norm of `g` finite is relative to the largest exponential."""
    e = residual.detach()
    g = pre.exp() @ W_dec
    g = g * (e.norm(dim=1) / (2 * g.norm(dim=1) + 1e-6 * pre.exp().amax(1))).detach()[:, None]
    distance = (g - e).square()
    return ((e.square() / (distance + 1e-6)).detach() * distance).sum(1).mean()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([ReLU(), TopK(2), JUMP, Gated()]), st.integers(0, 1000), st.integers(1, 8), st.integers(1, 5),
    st.integers(2, 9), st.booleans(), st.sampled_from([(0.7, None), (None, 0.4), (0.7, 0.4)]), st.data(),
)  # fmt: skip
def test_loss_and_gradients_equal_dense_autograd(activation, seed, n, d_in, d_sae, subtract, coefficients, data):
    """pitfall_100, pitfall_106: of every weight, and in whatever pieces the rows are taken."""
    latents = torch.tensor(sorted(data.draw(st.sets(st.integers(0, d_sae - 1), min_size=1))))
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(d_in, d_sae, activation, apply_b_dec_to_input=subtract, generator=generator).double()
    for parameter in (sae.b_enc, sae.b_dec, sae.W_dec):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x, residual = (torch.randn(n, d_in, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = coefficients
    pre_act, ghost = PreActivation(a) if a else None, GhostGradients(b) if b else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dead_latents, "ROWS", 3)
        loss = dead_latents_loss(sae, latents, x, residual, pre_act, ghost)
    loss.backward()
    got = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()

    dead = torch.zeros(d_sae, dtype=torch.bool)
    dead[latents] = True
    pre = (x - sae.b_dec * subtract) @ sae.W_enc + sae.b_enc
    threshold = sae.threshold if activation is JUMP else torch.zeros(d_sae)
    expected = torch.zeros((), dtype=torch.float64)
    if pre_act:
        short = (threshold - pre).relu() * dead * sae.W_dec.detach().norm(dim=1)
        expected = expected + 0.7 * short.sum(1).mean()
    if ghost:
        expected = expected + 0.4 * published_ghost_loss(pre[:, dead], sae.W_dec[dead], residual)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for name, parameter in sae.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got.get(name, torch.zeros_like(wanted)), wanted, msg=name)


def test_ghost_loss_has_the_size_of_the_main_loss():
    pre, W_dec, residual = torch.randn(100, 7).double(), torch.randn(7, 5).double(), torch.randn(100, 5).double()
    assert ghost_loss(pre, W_dec, residual).item() == pytest.approx(residual.square().sum(1).mean().item(), rel=1e-2)


@pytest.mark.parametrize("shift", [-500.0, 500.0])
def test_ghost_gradients_of_extreme_pre_activations(shift):
    """exp of them would be 0 or infinite; the rescaling makes their common size irrelevant."""
    grads = []
    for s in (0.0, shift):
        pre = torch.linspace(-1, 1, 30).view(10, 3).double().add(s).requires_grad_()
        ghost_loss(pre, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double(),
                   torch.ones(10, 4).double()).backward()  # fmt: skip
        grads.append(pre.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0])


def test_a_perfect_reconstruction_leaves_nothing_for_ghosts():
    pre = torch.randn(4, 3, requires_grad=True)
    loss = ghost_loss(pre, torch.randn(3, 5), torch.zeros(4, 5))
    loss.backward()
    assert loss.item() == 0
    assert pre.grad.abs().max() == 0


def test_gradients_reach_dead_latents_alone():
    """pitfall_106: beside the bias that is subtracted from every input."""
    sae, x = SAE(5, 12, JUMP).double(), torch.randn(20, 5).double()
    sae.b_enc.data.fill_(-3.0)
    latents = torch.tensor([1, 7])
    dead_latents_loss(sae, latents, x, torch.randn(20, 5).double(), PreActivation(), GhostGradients()).backward()
    for grad in (sae.W_enc.grad.T, sae.W_dec.grad, sae.b_enc.grad[:, None], sae.threshold.grad[:, None]):
        assert (grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [1, 7]


def test_memory_does_not_grow_with_the_batch():
    """What is kept for the backward pass is smaller than the dead latents' pre-activations."""
    n, d, m = 4096, 4, 256
    sae, x = SAE(d, m, ReLU()), torch.randn(n, d)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = dead_latents_loss(sae, torch.arange(m), x, x, PreActivation(), GhostGradients())
    assert sum(kept) < n * m / 4
    loss.backward()
    assert sae.W_enc.grad.abs().max() > 0


@pytest.mark.parametrize("cls", [PreActivation, GhostGradients])
def test_impossible_settings(cls):
    with pytest.raises(UnweaveError, match="needs"):
        cls(-1.0)
