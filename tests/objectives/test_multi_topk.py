"""A second reconstruction with a larger k, out of one selection."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from unweave._errors import UnweaveError
from unweave.objectives import MultiTopK, multi_topk_error, squared_error
from unweave.sae import SAE, BatchTopK, SparseCodes, TopK, ops


def random_sae(activation, seed, d_in, d_sae):
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(d_in, d_sae, activation, generator=generator).double()
    for parameter in (sae.b_enc, sae.b_dec):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return sae


def test_by_hand():
    extra = SparseCodes.from_dense(torch.tensor([[0.0, 2.0, -1.0], [0.0, 0.0, 1.0]]))
    W_dec, x_hat, x = torch.tensor([[9.0], [1.0], [3.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0], [1.0]])
    # With the extra latents: 1 + 2 = 3 against 2, and 3 against 1; the negative one counts as 0.
    assert multi_topk_error(extra, W_dec, x_hat, x).item() == pytest.approx((1 + 4) / 2)


def dense_mask(activation, pre, k):
    if isinstance(activation, TopK):
        return torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)
    return torch.zeros_like(pre).flatten().index_fill(0, pre.flatten().topk(k * len(pre)).indices, 1.0).view_as(pre)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([TopK, BatchTopK]), st.integers(0, 1000), st.integers(1, 6), st.integers(1, 5), st.integers(2, 10),
    st.data(),
)  # fmt: skip
def test_loss_and_gradients_equal_dense_autograd(cls, seed, n, d_in, d_sae, data):
    """pitfall_100: the encoder learns from the larger reconstruction too."""
    k = data.draw(st.integers(1, d_sae - 1))
    larger = data.draw(st.integers(k + 1, d_sae))
    sae = random_sae(cls(k), seed, d_in, d_sae)
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    _, codes, _, extra = sae.training_codes(x, k_multi=larger)
    x_hat = ops.decode(codes, sae.W_dec) + sae.b_dec
    loss = squared_error(x_hat, x) + 0.3 * multi_topk_error(extra, sae.W_dec, x_hat, x)
    loss.backward()
    got = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()

    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    small, large = (dense_mask(sae.activation, pre, kk) * pre.relu() for kk in (k, larger))
    torch.testing.assert_close(codes.to_dense(), small)
    errors = [squared_error(c @ sae.W_dec + sae.b_dec, x) for c in (small, large)]
    expected = errors[0] + 0.3 * errors[1]
    torch.testing.assert_close(loss, expected)
    expected.backward()
    torch.testing.assert_close(got, {name: p.grad for name, p in sae.named_parameters()})


@pytest.mark.parametrize("activation", [TopK(3), BatchTopK(3)], ids=str)
def test_the_codes_are_those_of_the_smaller_k(activation):
    """Also with ties, which go to the lowest latent, and to the first row: every latent here has a twin."""
    sae = random_sae(activation, 0, 4, 20)
    with torch.no_grad():
        sae.W_enc[:, 10:], sae.b_enc[10:] = sae.W_enc[:, :10].clone(), sae.b_enc[:10].clone()
    x = torch.randn(30, 4, dtype=torch.float64)
    x[1:4] = x[0]
    plain, multi = sae.training_codes(x), sae.training_codes(x, k_multi=7)
    assert torch.equal(plain.codes.to_dense(), multi.codes.to_dense())
    assert torch.equal(plain.codes.offsets, multi.codes.offsets)
    assert plain.extra is None
    wide = random_sae(type(activation)(7), 0, 4, 20)
    wide.load_state_dict(sae.state_dict())
    assert torch.equal(wide.training_codes(x).pre.to_dense(), multi.pre.to_dense() + multi.extra.to_dense())
    assert not ((multi.pre.to_dense() != 0) & (multi.extra.to_dense() != 0)).any()
    assert sae.activation == activation


def test_fewer_positive_values_than_the_budget():
    """A batch in which BatchTopK finds too little for the smaller k has nothing to add."""
    sae = random_sae(BatchTopK(3), 0, 4, 20)
    sae.b_enc.data.fill_(-100.0)
    _, codes, _, extra = sae.training_codes(torch.randn(5, 4, dtype=torch.float64), k_multi=9)
    assert codes.l0().sum() == 0
    assert (extra.values > 0).sum() == 0


@pytest.mark.parametrize("cls", [TopK, BatchTopK])
def test_one_dense_product(cls):
    n, d, m = 1100, 32, 512
    sae, x = SAE(d, m, cls(8)), torch.randn(n, d)
    with FlopCounterMode(display=False) as counter:
        _, codes, _, extra = sae.training_codes(x, k_multi=32)
        x_hat = ops.decode(codes, sae.W_dec) + sae.b_dec
        (squared_error(x_hat, x) + multi_topk_error(extra, sae.W_dec, x_hat, x)).backward()
    assert counter.get_total_flops() <= 1.2 * (2 * n * d * m)  # BatchTopK looks at some rows beforehand


def test_dead_latents_come_from_the_same_pass():
    sae, x = random_sae(TopK(2), 0, 4, 20), torch.randn(30, 4, dtype=torch.float64)
    dead = torch.tensor([4, 9, 17])
    plain, multi = sae.training_codes(x, dead, 2), sae.training_codes(x, dead, 2, k_multi=5)
    assert torch.equal(plain.aux.to_dense(), multi.aux.to_dense())


def test_larger_k():
    assert MultiTopK().k_for(32, 1000) == 128
    assert MultiTopK().k_for(32, 100) == 100
    assert MultiTopK(40).k_for(32, 100) == 40
    for k, smaller, d_sae in ((None, 8, 8), (8, 8, 100), (101, 8, 100)):
        with pytest.raises(UnweaveError, match="above the first, 8"):
            MultiTopK(k).k_for(smaller, d_sae)
    for settings_ in ({"k": 0}, {"coefficient": -1.0}):
        with pytest.raises(UnweaveError, match="needs"):
            MultiTopK(**settings_)
