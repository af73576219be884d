"""Pursuits against plain loops in float64: what they choose, what it is worth, its gradients, and when they stop."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from unweave._errors import UnweaveError
from unweave.sae import (
    SAE,
    MatchingPursuit,
    Normalization,
    OrthogonalMatchingPursuit,
    fold_decoder_norms,
    fold_input_scale,
    fold_normalization,
)
from unweave.sae.greedy import codes_of, gram_matrix, gram_pays, pursue, with_gradient
from unweave.sae.nnls import nonnegative_least_squares


def reference(x, atoms, k, threshold=0.0, stop_at_repeat=True, taken=None):
    """Matching pursuit, token by token, differentiable through every step; `taken` collects the steps' values."""
    rows = []
    for token in x:
        residual, codes = token, {}
        for _ in range(k):
            i = int((atoms @ residual).argmax())
            value = (residual @ atoms[i]).relu()
            if value == 0:
                break
            if taken is not None:
                taken.append(value.item())
            repeated, codes[i] = i in codes, codes.get(i, 0) + value
            residual = residual - value * atoms[i]
            if (repeated and stop_at_repeat) or (threshold > 0 and residual.norm() < threshold):
                break
        empty = torch.zeros((), dtype=x.dtype)
        rows.append(torch.stack([codes.get(i, empty) for i in range(len(atoms))]))
    return torch.stack(rows)


def problem(n, d, m, seed=0, unit=True):
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(m, d, dtype=torch.float64, generator=generator)
    norms = 1.0 if unit else 0.7 + 0.6 * torch.rand(m, 1, dtype=torch.float64, generator=generator)
    return torch.randn(n, d, dtype=torch.float64, generator=generator), normalize(atoms, dim=1) * norms


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 6), d=st.integers(1, 8), m=st.integers(1, 30), k=st.integers(1, 9), seed=st.integers(0, 99),
    unit=st.booleans(), stop=st.booleans(), threshold=st.sampled_from([0.0, 0.5, 1.5]), gram=st.booleans(),
)  # fmt: skip
def test_matching_pursuit_and_its_gradients_are_those_of_the_loop(n, d, m, k, seed, unit, stop, threshold, gram):
    x, atoms = (t.requires_grad_() for t in problem(n, d, m, seed, unit))
    settings_ = {"residual_threshold": threshold, "stop_at_repeat": stop}
    steps, taken = pursue(x, atoms, k, gram=gram, **settings_), []
    codes = codes_of(with_gradient(x, atoms, steps), m).to_dense()
    expected = reference(x, atoms, k, threshold, stop, taken) if n else x.new_zeros(0, m)
    # Once nothing is left but rounding, which atom it is best approximated by is arbitrary: its values are rounding.
    torch.testing.assert_close(codes, expected, atol=1e-10, rtol=1e-7)
    if taken and min(taken) > 1e-6 and (steps.values > 0).sum() == len(taken):
        weights = torch.randn(codes.shape, dtype=codes.dtype)
        ours = torch.autograd.grad((codes * weights).sum(), (x, atoms), retain_graph=True)
        theirs = torch.autograd.grad((expected * weights).sum(), (x, atoms))
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-6)


def test_hand_computed():
    """The second atom is best for what the first leaves: (3, 1) = 3 * (1, 0) + 1 * (0, 1); the bias is subtracted."""
    sae = SAE(2, 3, MatchingPursuit(k=2)).double()
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]], dtype=torch.float64)
    sae.b_dec.data = torch.tensor([1.0, 1.0], dtype=torch.float64)
    x = torch.tensor([[4.0, 2.0], [1.0, 1.0], [-2.0, -3.0]], dtype=torch.float64)
    expected = torch.tensor([[3.0, 1, 0], [0, 0, 0], [0, 0.0, 5]], dtype=torch.float64)
    torch.testing.assert_close(sae.encode(x), expected)
    torch.testing.assert_close(sae(x), x)


@pytest.mark.parametrize("kind", [MatchingPursuit, OrthogonalMatchingPursuit])
def test_pitfall_071_when_a_token_stops(kind):
    """Inputs of 0 take no step, equal atoms only one of them, and no token more than k."""
    x, atoms = problem(40, 6, 25)
    x[0], atoms[7] = 0, atoms[3]
    sae = SAE(6, 25, kind(k=4)).double().requires_grad_(False)
    sae.W_dec.copy_(atoms)
    codes = sae.encode(x)
    assert (codes[0] == 0).all()
    assert (codes[:, 7] == 0).all()
    assert (codes[:, 3] > 0).any()
    assert int((codes > 0).sum(1).max()) == 4
    sae.activation = dataclasses.replace(sae.activation, residual_threshold=0.5)
    stopped = sae.encode(x)
    assert (stopped > 0).sum() < (codes > 0).sum()
    earlier = (stopped != codes).any(1)
    assert ((x - sae.decode(stopped))[earlier].norm(dim=1) < 0.5).all()


def test_codes_of_a_smaller_k_are_the_first_steps():
    x, atoms = problem(30, 8, 40)
    short, long = (pursue(x, atoms, k) for k in (3, 7))
    torch.testing.assert_close(long.values[:, :3], short.values)
    assert (long.indices[:, :3] == short.indices).all()


@pytest.mark.parametrize("d", [600, 40])
def test_both_searches_find_the_same_in_fp32(d):
    x, atoms = (t.float() for t in problem(700, d, 1500))
    products, gram = pursue(x, atoms, 6, gram=False), pursue(x, atoms, 6, gram=True)
    same = (products.indices == gram.indices).all(1)
    assert same.float().mean() > 0.995  # near ties may fall either way
    torch.testing.assert_close(products.values[same], gram.values[same], atol=1e-4, rtol=1e-4)


def test_gram_matrix():
    atoms = torch.randn(5000, 3)
    torch.testing.assert_close(gram_matrix(atoms), atoms @ atoms.T)


def test_gram_is_used_where_it_pays():
    """For many rows and steps, and never where it would be larger than its limit."""
    atoms = torch.empty(4096, 768)
    assert gram_pays(100_000, 64, atoms)
    assert not gram_pays(64, 64, atoms)
    assert not gram_pays(100_000, 1, atoms)
    assert not gram_pays(10_000_000, 64, torch.empty(65_536, 768, device="meta"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("gram", [True, False])
def test_not_finite(bad, gram):
    x, atoms = problem(5, 4, 9)
    x[2, 1] = bad
    with pytest.raises(UnweaveError, match="NaN or infinite"):
        pursue(x, atoms, 2, gram=gram)
    with pytest.raises(UnweaveError, match="NaN or infinite"):
        OrthogonalMatchingPursuit(k=2).encode(x, atoms)


@settings(max_examples=30, deadline=None)
@given(s=st.integers(1, 12), d=st.integers(1, 12), seed=st.integers(0, 99))
def test_non_negative_least_squares(s, d, seed):
    """The conditions of Karush, Kuhn and Tucker, which only the solution meets."""
    x, _ = problem(8, d, 1, seed)
    atoms = normalize(torch.randn(8, s, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=2)
    products, targets = atoms @ atoms.mT, (atoms @ x[:, :, None])[:, :, 0]
    a = nonnegative_least_squares(products, targets)
    gradient = targets - (products @ a[:, :, None])[:, :, 0]
    assert (a >= 0).all()
    assert (gradient < 1e-7).all()
    assert (gradient[a > 0].abs() < 1e-7).all()


def test_orthogonal_residual_and_best_codes():
    """The residual is orthogonal to every atom of positive code, and smaller than what matching pursuit leaves."""
    x, atoms = problem(60, 12, 80)
    ours = OrthogonalMatchingPursuit(k=6).encode(x, atoms).to_dense()
    residual = x - ours @ atoms
    assert ((residual @ atoms.T)[ours > 0].abs() < 1e-8).all()
    greedy = MatchingPursuit(k=6).encode(x, atoms).to_dense()
    assert residual.norm() < 0.9 * (x - greedy @ atoms).norm()
    assert not OrthogonalMatchingPursuit(k=6).encode(x, atoms.requires_grad_()).values.requires_grad


@pytest.mark.parametrize("kind", [MatchingPursuit, OrthogonalMatchingPursuit])
def test_pitfall_129_scale_and_mean_fold_exactly(kind):
    """A tied SAE keeps its weights, so its codes and its residual threshold take the scale over."""
    x, atoms = problem(40, 6, 25)
    sae = SAE(6, 25, kind(k=4, residual_threshold=0.6)).double().requires_grad_(False)
    sae.W_dec.copy_(atoms)
    sae.b_dec.copy_(torch.randn(6))
    codes, x_hat = sae.encode(2.5 * x), sae(2.5 * x)
    fold_input_scale(sae, 2.5)
    assert sae.activation.residual_threshold == pytest.approx(0.24)
    torch.testing.assert_close(sae.encode(x), codes / 2.5)
    torch.testing.assert_close(sae(x), x_hat / 2.5)
    center = Normalization.fit("center", x + 3)
    before = sae(center(x))
    fold_normalization(sae, center)
    torch.testing.assert_close(sae(x), before / center.scale + center.mean)


def test_folds_that_are_not_exact_are_refused():
    x, atoms = problem(40, 6, 25, unit=False)
    sae = SAE(6, 25, MatchingPursuit(k=4)).double().requires_grad_(False)
    fold_decoder_norms(sae)  # unit rows: nothing to fold
    sae.W_dec.copy_(atoms)
    with pytest.raises(UnweaveError, match="nowhere to be folded into"):
        fold_decoder_norms(sae)
    with pytest.raises(UnweaveError, match="no whitening"):
        fold_normalization(sae, Normalization.fit("whiten", x))


@pytest.mark.parametrize("kind", [MatchingPursuit, OrthogonalMatchingPursuit])
def test_dead_latents_continue_the_pursuit(kind):
    """AuxK's codes are the pursuit that dead atoms alone make of the residual, with gradients for those atoms."""
    x, atoms = problem(20, 6, 25)
    sae = SAE(6, 25, kind(k=3)).double()
    sae.W_dec.data = atoms
    dead = torch.arange(25) % 5 == 0
    found = sae.training_codes(x, dead.nonzero().flatten(), k_aux=2)
    residual = x - sae.decode(found.codes)
    expected = torch.zeros(20, 25, dtype=torch.float64)
    expected[:, dead] = reference(residual, sae.W_dec[dead], 2).detach()
    torch.testing.assert_close(found.aux.to_dense(), expected)
    found.aux.values.sum().backward()
    assert (sae.W_dec.grad[~dead] == 0).all()
    assert (sae.W_dec.grad[dead] != 0).any()
    assert sae.training_codes(x, torch.tensor([], dtype=torch.int64), k_aux=2).aux is None


def test_other_settings_and_files(tmp_path):
    sae = SAE(6, 25, MatchingPursuit(k=3, residual_threshold=0.3, stop_at_repeat=False)).requires_grad_(False)
    sae.b_dec.copy_(torch.randn(6))
    x = torch.randn(30, 6)
    assert {n for n, _ in sae.named_parameters()} == {"W_dec", "b_dec"}
    assert sae.W_enc.shape == (6, 25)
    for loaded in (SAE.load(sae.save(tmp_path / "mp")), SAE.load(SAE.load(tmp_path / "mp").save(tmp_path / "again"))):
        assert dataclasses.asdict(loaded.activation) == dataclasses.asdict(sae.activation)
        torch.testing.assert_close(loaded.encode(x), sae.encode(x))
    sae.activation = OrthogonalMatchingPursuit(k=3, residual_threshold=0.3)
    loaded = SAE.load(sae.save(tmp_path / "omp"))
    assert dataclasses.asdict(loaded.activation) == dataclasses.asdict(sae.activation)
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))
    sae.apply_b_dec_to_input = False
    with pytest.raises(UnweaveError, match="added but not subtracted"):
        sae.save(tmp_path / "no")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MatchingPursuit(k=0), "whole k of at least 1"),
        (lambda: OrthogonalMatchingPursuit(k=2.5), "whole k"),
        (lambda: MatchingPursuit(residual_threshold=-1.0), "residual_threshold of at least 0"),
        (lambda: MatchingPursuit(residual_threshold=float("nan")), "residual_threshold of at least 0"),
        (lambda: SAE(4, 8, OrthogonalMatchingPursuit(k=9)), "larger than the number of latents"),
        (lambda: MatchingPursuit().selection(None, 1), "no pre-activations"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(UnweaveError, match=message):
        make()
