"""Archetypal dictionaries against their formula; tied ones against the same SAE with two matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.sae import (
    SAE,
    AbsTopK,
    ArchetypalDictionary,
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    TanhReLU,
    TopK,
    fold_decoder_norms,
    fold_input_scale,
)
from unweave.sae.archetypal import ArchetypalAtoms, onto_simplex
from unweave.sae.files import save_training_form

TIED = [ReLU(), TopK(3), AbsTopK(3), BatchTopK(3), JumpReLU(0.2, 0.1), Gated()]


def tied(activation):
    generator = torch.Generator().manual_seed(0)
    sae = SAE(7, 24, activation, tied=True, generator=generator).double().requires_grad_(False)
    sae.b_enc.copy_(torch.randn(24, generator=generator) * 0.2)
    sae.b_dec.copy_(torch.randn(7, generator=generator))
    if isinstance(activation, BatchTopK):
        sae.threshold.fill_(0.4)
    if isinstance(activation, Gated):
        sae.r_mag.copy_(torch.randn(24, generator=generator) * 0.3)
        sae.b_mag.copy_(torch.randn(24, generator=generator) * 0.3)
    return sae


def untied(sae):
    """The same with an encoder of its own."""
    free = SAE(7, 24, sae.activation).double()
    free.load_state_dict(sae.state_dict() | {"W_enc": sae.W_dec.T})
    return free.requires_grad_(False)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 6), extra=st.integers(0, 5), d=st.integers(1, 5), seed=st.integers(0, 99))
def test_atoms_and_gradients_are_those_of_the_formula(m, extra, d, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    made = ArchetypalAtoms(draw(m + extra, d), m, delta=0.5)
    torch.testing.assert_close(made.atoms().norm(dim=1).mean(), torch.tensor(1.0, dtype=torch.float64))
    made.weights.data, made.relaxation.data, made.log_scale.data = draw(m, m + extra), draw(m, d), draw(1)[0]
    made.project()
    atoms = (made.weights @ made.points + made.relaxation) * made.log_scale.exp()
    torch.testing.assert_close(made.atoms(), atoms.detach())
    grad = draw(m, d)
    torch.testing.assert_close(
        made.gradients(grad, made.atoms()), torch.autograd.grad((atoms * grad).sum(), tuple(made.parameters()))
    )
    assert (made.weights >= 0).all()
    torch.testing.assert_close(made.weights.sum(1), torch.ones(m, dtype=torch.float64))
    assert (made.relaxation.norm(dim=1) <= 0.5 + 1e-9).all()


def test_hand_computed():
    """Half of each point, moved by a quarter, times 2."""
    made = ArchetypalAtoms(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 1, delta=0.25)
    assert made.atoms().tolist() == [[1.0, 0.0]]
    made.weights.data = torch.tensor([[3.0, 3.0]])
    made.relaxation.data = torch.tensor([[5.0, 0.0]])
    made.log_scale.data = torch.tensor(2.0).log()
    made.project()
    torch.testing.assert_close(made.atoms(), torch.tensor([[1.5, 1.0]]))


@settings(max_examples=50, deadline=None)
@given(
    m=st.integers(1, 4), n=st.integers(1, 30), scale=st.sampled_from([1e-6, 0.01, 1.0, 100.0]), seed=st.integers(0, 99)
)
def test_the_nearest_point_of_the_simplex(m, n, scale, seed):
    """Against the amount that sorting finds, and no feasible point is nearer."""
    generator = torch.Generator().manual_seed(seed)
    rows = scale * torch.randn(m, n, dtype=torch.float64, generator=generator)
    found = rows.clone()
    onto_simplex(found)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(m, dtype=torch.float64))
    ordered = rows.sort(dim=1, descending=True).values
    amounts = (ordered.cumsum(1) - 1) / torch.arange(1, n + 1)
    amount = amounts.gather(1, ((ordered > amounts).sum(1, keepdim=True) - 1))
    torch.testing.assert_close(found, (rows - amount).clamp(min=0))
    single = rows.float()
    onto_simplex(single)
    torch.testing.assert_close(single.sum(1), torch.ones(m), rtol=1e-4, atol=1e-4)


def test_small_equal_steps_of_all_weights_leave_atoms_at_their_points():
    """As Adam's first steps are; cutting off and dividing by the sum would leave a weight of 0.01 at the own point."""
    generator = torch.Generator().manual_seed(0)
    made = ArchetypalAtoms(torch.randn(400, 8, generator=generator), 400, delta=0.0)
    for _ in range(20):
        made.weights.data += 0.01 * torch.randn(400, 400, generator=generator).sign()
        made.project()
    assert made.weights.diagonal().mean() > 0.5


def test_pitfall_117_a_row_without_positive_weights_recovers():
    made = ArchetypalAtoms(torch.eye(3), 2, delta=0.0)
    made.weights.data[0] = torch.tensor([-3.0, -1.0, -2.0])
    made.project()
    assert made.weights.tolist() == [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    assert (made.atoms().norm(dim=1) > 0).all()


def test_pitfall_117_too_few_points_are_refused():
    with pytest.raises(UnweaveError, match="n_points=10 is fewer than d_sae=11"):
        ArchetypalDictionary(n_points=10).points_for(11)
    with pytest.raises(UnweaveError, match="as many points"):
        ArchetypalAtoms(torch.eye(3), 4, delta=0.0)
    with pytest.raises(UnweaveError, match="all 0"):
        ArchetypalAtoms(torch.zeros(3, 2), 3, delta=0.0)
    for bad in ({"delta": -1.0}, {"n_points": 0}):
        with pytest.raises(UnweaveError, match="delta >= 0 and n_points >= 1"):
            ArchetypalDictionary(**bad)


@pytest.mark.parametrize("activation", TIED, ids=str)
def test_a_tied_sae_is_one_with_equal_matrices(activation):
    """The same outputs, and for the one matrix the sum of both gradients."""
    sae, x = tied(activation), torch.randn(20, 7, dtype=torch.float64)
    free = untied(sae)
    torch.testing.assert_close(sae.encode(x), free.encode(x))
    torch.testing.assert_close(sae(x), free(x))
    for each in (sae, free):
        each.requires_grad_()
        codes = each.training_codes(x).codes
        (each.output(codes, x) - x).square().sum().backward()
    torch.testing.assert_close(sae.W_dec.grad, free.W_dec.grad + free.W_enc.grad.T)
    torch.testing.assert_close(sae.b_dec.grad, free.b_dec.grad)
    assert "W_enc" not in dict(sae.named_parameters())


@pytest.mark.parametrize("activation", TIED, ids=str)
def test_pitfall_129_the_scale_folds_into_the_codes_of_a_tied_sae(activation):
    sae, x = tied(activation), torch.randn(20, 7, dtype=torch.float64)
    codes, x_hat = sae.encode(2.5 * x), sae(2.5 * x) / 2.5
    fold_input_scale(sae, 2.5)
    torch.testing.assert_close(sae.encode(x), codes / 2.5)
    torch.testing.assert_close(sae(x), x_hat)
    fold_decoder_norms(sae)
    torch.testing.assert_close(sae(x), x_hat)


def test_codes_that_saturate_have_no_fold_when_tied():
    with pytest.raises(UnweaveError, match="do not scale"):
        fold_input_scale(SAE(4, 8, TanhReLU(), tied=True).requires_grad_(False), 2.0)


@pytest.mark.parametrize("activation", TIED, ids=str)
def test_files_of_tied_saes_read_like_others(activation, tmp_path):
    """Other readers find an encoder; the training form stays tied, unless one matrix was changed since."""
    sae, x = tied(activation).float(), torch.randn(20, 7)
    loaded = SAE.load(sae.save(tmp_path / "sae"))
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))
    torch.testing.assert_close(loaded(x), sae(x))
    again = SAE.load(save_training_form(sae, tmp_path / "training", {}))
    assert again.tied
    torch.testing.assert_close(again(x), sae(x))
