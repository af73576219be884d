"""Every penalty by hand and against dense formulas in float64, sparse and dense."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.objectives import (
    L0,
    L1,
    PENALTIES,
    Frequency,
    Lp,
    PAnneal,
    Penalty,
    QuadraticL0,
    Schedule,
    Tanh,
    TargetL0,
    register_penalty,
)
from unweave.sae import SAE, AbsTopK, DenseCodes, Gated, JumpReLU, ReLU, SparseCodes, TopK

JUMP = JumpReLU(init_threshold=0.5, bandwidth=0.4)
OF_CODES = [
    L1(), Lp(p=0.5), Lp(p=0.5, eps=0.0), Lp(p=2.0, root=True), Lp(p=0.3, root=True, eps=0.0), Lp(p=1.0), PAnneal(),
    Tanh(), Tanh(c=2.0, frequency=0.01), Frequency(limit=0.2), Frequency(limit=0.01, c=1.0),
]  # fmt: skip
OF_COUNTS = [L0(), QuadraticL0(2.0), TargetL0(2.0)]


def by_formula(penalty, dense, active, norms):
    """A penalty of dense codes and of how many are active (None where it does not count)."""
    a, n = dense * norms, len(dense)
    match penalty:
        case L1():
            return a.sum() / n
        case Lp(_, p, root, eps):
            powers = torch.zeros_like(a)
            powers[a > 0] = (a[a > 0] + eps) ** p - eps**p
            return (powers.sum(1).clamp(min=1e-300) ** (1 / p)).mean() if root else powers.sum() / n
        case PAnneal():
            return a.sum() / n
        case Tanh(_, c, frequency):
            f = (c * a).tanh().mean(0)
            return f.sum() if frequency is None else (f + f.square() / frequency).sum()
        case Frequency(_, limit, c):
            over = (c * a).tanh().mean(0) - limit
            return (over * (over > 0)).square().sum() / limit
        case L0():
            return active.sum() / n
        case QuadraticL0(l0):
            return 2 / l0 * ((active.sum(1) - l0) ** 2).mean()
        case TargetL0(l0):
            off = active.sum() / n / l0 - 1
            return off**2 if off < 1 else 2 * off - 1


@st.composite
def problems(draw):
    n, d, m = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 10))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    dense = torch.randn(n, m, generator=generator, dtype=torch.float64).abs() + 0.01
    dense = dense * (torch.rand(n, m, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0])))
    return dense, torch.randn(m, d, generator=generator, dtype=torch.float64)


def sae_of(activation, W_dec):
    sae = SAE(W_dec.shape[1], len(W_dec), activation).double()
    sae.W_dec.data.copy_(W_dec)
    return sae


@settings(deadline=None, max_examples=25)
@given(problems(), st.booleans())
@pytest.mark.parametrize("penalty", OF_CODES, ids=str)
def test_penalties_of_codes_equal_dense_formulas(penalty, problem, sparse):
    """pitfall_080: values, and gradients of active codes and of decoder norms, finite at codes of 0."""
    dense, W_dec = problem
    sae, own = sae_of(ReLU(), W_dec), dense.clone().requires_grad_()
    codes = SparseCodes.from_dense(own) if sparse else DenseCodes(own)
    value = penalty(codes, codes, sae)
    got = torch.autograd.grad(value, (own, sae.W_dec), allow_unused=True, materialize_grads=True)
    other, rows = dense.clone().requires_grad_(), W_dec.clone().requires_grad_()
    expected = by_formula(penalty, other, None, rows.norm(dim=1))
    wanted = torch.autograd.grad(expected, (other, rows), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(value, expected)
    assert got[0].isfinite().all()
    torch.testing.assert_close(got[0] * (dense > 0), wanted[0] * (dense > 0))
    torch.testing.assert_close(got[1], wanted[1])


@settings(deadline=None, max_examples=25)
@given(problems(), st.booleans())
@pytest.mark.parametrize("penalty", OF_COUNTS, ids=str)
def test_penalties_of_counts_equal_dense_formulas(penalty, problem, sparse):
    dense, W_dec = problem
    sae, pre = sae_of(JUMP, W_dec), dense
    codes = SparseCodes.from_dense(pre) if sparse else DenseCodes(pre)
    value = penalty(codes, codes, sae)
    value.backward()
    threshold = torch.full((len(W_dec),), 0.5, dtype=torch.float64, requires_grad=True)
    window = ((pre - threshold).abs() < 0.2) / 0.4
    active = (pre > threshold).double() - window.detach() * (threshold - threshold.detach())
    expected = by_formula(penalty, pre, active, 1.0)
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(sae.threshold.grad, threshold.grad)


def test_by_hand():
    """Codes (1, 0, 2) and (0, 4, 0) of decoder norms (1, 0.25, 0.5): strengths (1, 0, 1) and (0, 1, 0)."""
    codes = SparseCodes.from_dense(torch.tensor([[1.0, 0.0, 2.0], [0.0, 4.0, 0.0]], dtype=torch.float64))
    sae = sae_of(ReLU(), torch.tensor([[1.0], [0.25], [0.5]], dtype=torch.float64))
    tanh = torch.tensor(4.0, dtype=torch.float64).tanh().item()
    for penalty, expected in (
        (L1(), 1.5),
        (Lp(p=0.5, eps=0.0), 1.5),
        (Lp(p=2.0, root=True, eps=0.0), (2**0.5 + 1) / 2),  # pitfall_078
        (Tanh(), 1.5 * tanh),
        (Tanh(frequency=0.5), 3 * tanh / 2 * (1 + tanh / 2 / 0.5)),
        (Frequency(limit=0.25), 3 * (tanh / 2 - 0.25) ** 2 / 0.25),
        (Frequency(limit=0.6), 0.0),
    ):
        assert penalty(codes, codes, sae).item() == pytest.approx(expected), penalty


def test_l0_of_tokens_and_of_the_batch():
    """pitfall_095: tokens with L0 1 and 3 are on a mean target of 2, and each is off by 1."""
    pre = SparseCodes.from_dense(torch.tensor([[0.9, 0.0, 0.0], [0.9, 0.8, 0.75]], dtype=torch.float64))
    sae = sae_of(JUMP, torch.eye(3, dtype=torch.float64))
    assert TargetL0(2.0)(pre, pre, sae).item() == 0
    assert QuadraticL0(2.0)(pre, pre, sae).item() == pytest.approx(2 / 2 * 1)
    assert L0()(pre, pre, sae).item() == 2


@pytest.mark.parametrize(("p", "eps", "root"), [(0.2, 1e-3, False), (0.5, 0.0, False), (0.5, 0.0, True)])
def test_a_power_pushes_thresholds_by_its_jump(p, eps, root):
    """Not by the slope of codes of 0 just below, `threshold * p * eps^(p - 1)`, which is many times as much."""
    pre = SparseCodes.from_dense(torch.tensor([[0.4, 0.6, 0.9]], dtype=torch.float64))
    pre = pre.with_values(pre.values.requires_grad_())
    sae = sae_of(JUMP, torch.eye(3, dtype=torch.float64))  # thresholds 0.5, window from 0.3 to 0.7
    codes = JUMP.apply(pre, sae.threshold)
    value = Lp(p=p, eps=eps, root=root)(pre, codes, sae)
    powers = [(v + eps) ** p - eps**p for v in (0.4, 0.6, 0.9)]
    active = powers[1] + powers[2]
    assert value.item() == pytest.approx(active ** (1 / p) if root else active)
    value.backward()
    outer = active ** (1 / p - 1) / p if root else 1.0
    expected = [-outer * powers[0] / 0.4, -outer * powers[1] / 0.4, 0.0]
    assert sae.threshold.grad.tolist() == pytest.approx(expected)
    slopes = [0.0, outer * p * (0.6 + eps) ** (p - 1), outer * p * (0.9 + eps) ** (p - 1)]
    assert pre.values.grad.tolist() == pytest.approx(slopes)


def test_signed_codes_count_by_their_size():
    codes = SparseCodes.from_dense(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
    assert L1()(codes, codes, sae_of(AbsTopK(2), torch.eye(2, dtype=torch.float64))).item() == 3


def test_default_coefficients():
    assert (L1().coefficient_for(2500), L1(3.0).coefficient_for(2500)) == (pytest.approx(5.0), 3.0)
    assert L0().coefficient_for(2304) == pytest.approx(1.3824)
    assert (PAnneal().coefficient_for(100), PAnneal(2.0).coefficient_for(100)) == (pytest.approx(0.15), 2.0)
    assert QuadraticL0(20.0).coefficient_for(500) == pytest.approx(2.5)
    assert TargetL0(coefficient=0.5).coefficient_for(64) == 32
    assert (Tanh(7).coefficient_for(64), Tanh().coefficient_for(500)) == (7, 1.0)
    assert (Frequency(7).coefficient_for(64), Frequency().coefficient_for(500)) == (7, 5.0)
    assert (Lp(7).coefficient_for(64), Lp(p=1.0).coefficient_for(64)) == (7, pytest.approx(0.8))
    assert Lp(p=1e-9).coefficient_for(500) == pytest.approx(1.0)
    assert Lp(p=0.5, root=True).coefficient_for(64) == pytest.approx(0.8)


def test_in_words():
    assert str(L1()) == "L1()"
    assert str(Tanh(3.0, c=4.0, frequency=0.1)) == "Tanh(coefficient=3.0, frequency=0.1)"


def test_p_goes_from_1_to_its_end():
    """pitfall_079: the last p is reached, and trained with."""
    penalty = PAnneal(p_end=0.2, begin=0.2, changes=4)
    assert [penalty.p_at(s, 20) for s in (0, 3, 4, 7, 8, 12, 16, 19)] == pytest.approx(
        [1, 1, 0.8, 0.8, 0.6, 0.4, 0.2, 0.2]
    )
    assert penalty.at(19, 20) == Lp(p=penalty.p_at(19, 20), eps=1e-3)
    assert PAnneal(begin=0.99).p_at(9, 10) == pytest.approx(0.2)


@pytest.mark.parametrize("penalty", OF_COUNTS, ids=lambda p: p.name)
@pytest.mark.parametrize("activation", [ReLU(), TopK(), Gated()], ids=lambda a: a.name)
def test_counts_need_thresholds(penalty, activation):
    assert "thresholds" in penalty.goes_with(activation)
    assert penalty.goes_with(JUMP) is None


@pytest.mark.parametrize(
    "make",
    [
        *(lambda p=p: p(coefficient=-1.0) for p in PENALTIES.values()), lambda: L1(float("nan")),
        lambda: Lp(p=0.0), lambda: Lp(eps=-1.0), lambda: PAnneal(p_end=0.0), lambda: PAnneal(changes=0),
        lambda: PAnneal(begin=1.0), lambda: Tanh(c=0.0), lambda: Tanh(frequency=0.0), lambda: Frequency(limit=1.0),
        lambda: QuadraticL0(0.0), lambda: TargetL0(-1.0),
    ],
)  # fmt: skip
def test_impossible_settings(make):
    with pytest.raises(UnweaveError, match="needs"):
        make()


def test_a_penalty_of_ones_own():
    @register_penalty
    @dataclass(frozen=True)
    class Squares(Penalty):
        coefficient: float = 1.0
        name: ClassVar[str] = "squares_of_a_test"

        def __call__(self, pre, codes, sae):
            return codes.values.square().sum() / codes.n_rows

    assert PENALTIES["squares_of_a_test"] is Squares
    assert Squares(2.0, schedule=Schedule()).coefficient_for(7) == 2.0
    with pytest.raises(UnweaveError, match="already: Squares"):
        register_penalty(dataclass(frozen=True)(type("Other", (Squares,), {"__annotations__": {}})))
    del PENALTIES["squares_of_a_test"]


def test_what_cannot_be_registered():
    with pytest.raises(UnweaveError, match="frozen dataclass derived from Penalty"):
        register_penalty(int)
    with pytest.raises(UnweaveError, match="a name and a field coefficient"):
        register_penalty(dataclass(frozen=True)(type("Nameless", (Penalty,), {})))
