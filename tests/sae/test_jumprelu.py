"""JumpReLU's straight-through gradients against formulas, for every kernel and in every form of codes."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import unweave.sae.sae as sae_module
from unweave._errors import UnweaveError
from unweave.sae import SAE, DenseCodes, JumpReLU, SparseCodes

KERNELS = {
    "rectangle": lambda u: float(abs(u) < 0.5),
    "triangle": lambda u: max(0.0, 1 - abs(u)),
    "epanechnikov": lambda u: 0.75 * max(0.0, 1 - u * u),
    "quartic": lambda u: 15 / 16 * max(0.0, 1 - u * u) ** 2,
    "cosine": lambda u: math.pi / 4 * math.cos(math.pi * u / 2) if abs(u) < 1 else 0.0,
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(kernel):
    """pitfall_058: of area 1 as a function of the pre-activation, and 0 where no entry is selected."""
    activation = JumpReLU(0.5, bandwidth=0.3, kernel=kernel)
    z = torch.linspace(-1, 2, 30001, dtype=torch.float64)
    window = activation.window(z, torch.tensor(0.5, dtype=torch.float64))
    assert torch.trapezoid(window, z).item() == pytest.approx(1, abs=1e-3)
    bound = activation.selection(torch.tensor(0.5, dtype=torch.float64), 1).bounds
    assert window[z <= bound - 1e-9].abs().max() < 1e-12
    for u in (-0.7, -0.3, 0.0, 0.2, 0.9, 1.4):
        at = activation.window(torch.tensor([0.5 + 0.3 * u], dtype=torch.float64), torch.tensor(0.5)).item()
        assert at == pytest.approx(KERNELS[kernel](u) / 0.3, abs=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_window_widens_until_it_holds_its_share(kernel):
    """Of the active entries, counted where the kernel is above 0; a window that holds more stays as it is."""
    activation = JumpReLU(0.5, bandwidth=0.1, kernel=kernel, in_window=0.2)
    distance = torch.cat([torch.linspace(-4, -2, 500), torch.linspace(1, 3, 100)])  # nothing is near the threshold
    theta = torch.tensor(0.5)
    assert (activation.window(theta + distance, theta) < 1e-5).all()
    widened = activation.widened(distance)
    held = int((widened.window(theta + distance, theta) > 1e-5).sum())
    assert held == pytest.approx(20, abs=1)
    assert dataclasses.replace(widened, bandwidth=0.1) == activation
    assert activation.widened(distance / 100) == activation
    assert activation.widened(-distance.abs()) == activation  # nothing is active, so there is nothing to compare with
    assert dataclasses.replace(activation, in_window=0.0).widened(distance).bandwidth == 0.1
    with pytest.raises(UnweaveError, match="share between 0 and 1"):
        JumpReLU(in_window=-0.1)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 6), m=st.integers(1, 9), kernel=st.sampled_from(list(KERNELS)), to_input=st.booleans(),
    shared=st.booleans(), dense=st.booleans(), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_gradients_of_codes_and_steps(n, m, kernel, to_input, shared, dense, seed):
    """pitfall_056, pitfall_057, pitfall_099: the formulas, entry by entry."""
    generator = torch.Generator().manual_seed(seed)
    activation = JumpReLU(0.2, 0.5, kernel=kernel, ste_to_input=to_input, shared=shared)
    values = torch.randn(n, m, generator=generator, dtype=torch.float64)
    theta = torch.rand(() if shared else (m,), generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(2, n, m, generator=generator, dtype=torch.float64)
    z = values.clone().requires_grad_()
    if dense:
        pre = DenseCodes(z)
        codes, steps = activation.apply(pre, theta), activation.step(pre, theta)
    else:
        rows, latents = torch.ones(n, m).nonzero(as_tuple=True)
        pre = SparseCodes.from_entries(rows, latents, z.flatten(), n, m)
        codes, steps = activation.apply(pre, theta), activation.step(pre, theta)
        weights = weights.flatten(1)
    ((codes.values * weights[0]).sum() + (steps * weights[1]).sum()).backward()

    v, w = theta.detach().expand(m), weights.view(2, n, m)
    window = torch.tensor([[KERNELS[kernel]((values[i, j] - v[j]).item() / 0.5) / 0.5 for j in range(m)]
                           for i in range(n)], dtype=torch.float64)  # fmt: skip
    active = (values > v).double()
    torch.testing.assert_close(codes.to_dense().detach(), values * active)
    torch.testing.assert_close(steps.detach().view(n, m), active)
    for_theta = -(w[0] * v + w[1]) * window
    for_z = w[0] * active + (-for_theta if to_input else 0)
    torch.testing.assert_close(theta.grad, for_theta.sum() if shared else for_theta.sum(0))
    torch.testing.assert_close(z.grad, for_z)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shared", [False, True])
def test_sparse_and_dense_give_the_same_gradients(kernel, shared, monkeypatch):
    """Nothing that has a gradient is left out by the selection."""
    x, grads = torch.randn(40, 5, dtype=torch.float64), []
    for most in (0.0, 1.0):
        monkeypatch.setattr(sae_module, "DENSE_ABOVE", most)
        activation = JumpReLU(0.8, 0.6, kernel=kernel, ste_to_input=True, shared=shared)
        sae = SAE(5, 32, activation, generator=torch.Generator().manual_seed(0)).double()
        pre, codes, _, _ = sae.training_codes(x)
        assert isinstance(codes, DenseCodes if most == 0 else SparseCodes)
        weight = sae.W_dec.detach().sum(1)
        ((codes.values * codes.at(weight)).sum() + activation.step(pre, sae.threshold).sum()).backward()
        grads.append({name: p.grad for name, p in sae.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() >= {"W_enc", "b_enc", "b_dec", "threshold"}
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_a_bandwidth_that_is_given_is_kept():
    distance = torch.linspace(1, 3, 100)
    assert JumpReLU().widened(distance).bandwidth > 1
    assert JumpReLU(bandwidth=0.001).widened(distance).bandwidth == 0.001
    assert JumpReLU(bandwidth=0.001, in_window=0.2).widened(distance).bandwidth > 1
