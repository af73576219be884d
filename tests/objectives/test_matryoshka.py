"""Prefixes that reconstruct by themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import unweave.objectives.matryoshka as matryoshka
from unweave._errors import UnweaveError
from unweave.objectives import Matryoshka, matryoshka_error, squared_error
from unweave.sae import DenseCodes, SparseCodes, ops

FORMS = [SparseCodes.from_dense, DenseCodes]


@pytest.mark.parametrize("form", FORMS, ids=["sparse", "dense"])
def test_by_hand(form):
    """pitfall_082, pitfall_083, pitfall_085: the mean over prefixes, each with the bias once."""
    codes = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    W_dec = torch.tensor([[1.0], [5.0], [2.0]], dtype=torch.float64, requires_grad=True)
    b_dec = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    loss, x_hat = matryoshka_error(form(codes), W_dec, b_dec, torch.tensor([[3.0]], dtype=torch.float64), (1, 3))
    assert x_hat.item() == 5.5
    assert loss.item() == pytest.approx(((1.5 - 3) ** 2 + (5.5 - 3) ** 2) / 2)
    loss.backward()
    # The first latent answers to both prefixes, the third to the last alone.
    assert W_dec.grad.flatten().tolist() == pytest.approx([-1.5 + 2.5, 0.0, 2 * 2.5])
    assert b_dec.grad.tolist() == pytest.approx([-1.5 + 2.5])
    assert codes.grad[0, [0, 2]].tolist() == pytest.approx([-1.5 + 2.5, 2 * 2.5])


@st.composite
def problems(draw):
    n, d, m = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 12))
    widths = sorted({*draw(st.lists(st.integers(1, m), max_size=4)), m})
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    codes = torch.randn(n, m, generator=generator, dtype=torch.float64)
    codes = codes * (torch.rand(n, m, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0])))
    others = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((m, d), (d,), (n, d)))
    return codes, *others, widths


@settings(deadline=None, max_examples=60)
@given(problems(), st.sampled_from(FORMS))
def test_loss_and_gradients_equal_dense_autograd(problem, form):
    *tensors, x, widths = problem
    codes, W_dec, b_dec = (t.requires_grad_() for t in tensors)
    loss, x_hat = matryoshka_error(form(codes), W_dec, b_dec, x, widths)
    got = torch.autograd.grad(loss, (codes, W_dec, b_dec), allow_unused=True, materialize_grads=True)
    prefixes = [codes[:, :w] @ W_dec[:w] + b_dec for w in widths]
    expected = torch.stack([(p - x).square().sum(1).mean() for p in prefixes]).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x_hat, prefixes[-1])
    wanted = list(torch.autograd.grad(expected, (codes, W_dec, b_dec)))
    if form is not DenseCodes:
        wanted[0] = wanted[0] * (codes != 0)  # codes that are not there get no gradient
    torch.testing.assert_close(list(got), wanted)


def test_one_prefix_is_the_plain_loss():
    """pitfall_082"""
    codes, W_dec = SparseCodes.from_dense(torch.randn(5, 8).relu()), torch.randn(8, 3)
    b_dec, x = torch.randn(3), torch.randn(5, 3)
    loss, x_hat = matryoshka_error(codes, W_dec, b_dec, x, Matryoshka(()).widths_for(8))
    torch.testing.assert_close(x_hat, ops.decode(codes, W_dec) + b_dec)
    torch.testing.assert_close(loss, squared_error(x_hat, x))


def test_the_loss_does_not_grow_with_the_number_of_prefixes():
    """pitfall_083"""
    codes, x = SparseCodes.from_dense(torch.zeros(5, 8)), torch.randn(5, 3)
    one, four = (matryoshka_error(codes, torch.randn(8, 3), torch.zeros(3), x, w)[0] for w in ((8,), (1, 2, 4, 8)))
    torch.testing.assert_close(one, four)


def test_latents_are_decoded_once(monkeypatch):
    """pitfall_084: five prefixes cost what one reconstruction does, and a running sum."""
    n, d, m, widths = 20, 16, 64, (2, 6, 14, 30, 64)
    dense, W_dec = torch.randn(n, m).relu().requires_grad_(), torch.randn(m, d, requires_grad=True)
    x = torch.randn(n, d)
    with FlopCounterMode(display=False) as counter:
        matryoshka_error(DenseCodes(dense), W_dec, torch.zeros(d), x, widths)[0].backward()
    assert counter.get_total_flops() == 3 * 2 * n * d * m
    decoded = []
    monkeypatch.setattr(matryoshka.ops, "decode", lambda c, W: decoded.append(len(c.indices)) or c.to_dense() @ W)
    codes = SparseCodes.from_dense(dense)
    matryoshka_error(codes, W_dec, torch.zeros(d), x, widths)
    assert decoded == [len(codes.indices)]


def test_widths():
    assert Matryoshka().widths_for(32_768) == (1024, 3072, 7168, 15_360, 32_768)
    assert Matryoshka((128, 512.0)).widths_for(2048) == (128, 512, 2048)
    assert Matryoshka((0.25, 1.0)).widths_for(64) == (16, 64)
    assert Matryoshka().widths_for(4) == (1, 2, 4)
    assert Matryoshka([0.5]).prefixes == (0.5,)


@pytest.mark.parametrize("prefixes", [(0,), (-5,), (2.5,), (float("nan"),), (float("inf"),)])
def test_impossible_prefixes(prefixes):
    with pytest.raises(UnweaveError, match="share of d_sae"):
        Matryoshka(prefixes)


@pytest.mark.parametrize(("prefixes", "message"), [((65,), "wider"), ((0.5, 0.25), "ascend"), ((40, 0.5), "ascend")])
def test_prefixes_that_do_not_fit(prefixes, message):
    with pytest.raises(UnweaveError, match=message):
        Matryoshka(prefixes).widths_for(64)
