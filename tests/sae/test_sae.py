"""The SAE's passes, training and inference, against dense autograd."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import unweave.sae.sae as sae_module
from unweave._errors import UnweaveError
from unweave.sae import (
    SAE,
    AbsTopK,
    BatchTopK,
    DenseCodes,
    Gated,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    ReLU,
    SparseCodes,
    TanhReLU,
    TopK,
    ops,
)

JUMP = JumpReLU(init_threshold=0.2, bandwidth=0.3)
ACTIVATIONS = [
    ReLU(), TanhReLU(), TopK(3), AbsTopK(3), GroupMax(4), BatchTopK(3), BatchTopK(2.5), JUMP,
    JumpReLU(0.2, 0.3, kernel="triangle"), JumpReLU(0.2, 0.3, shared=True), Gated(),
]  # fmt: skip


def make(activation, d_in=7, d_sae=24, dtype=torch.float64, **kwargs):
    sae = SAE(d_in, d_sae, activation, generator=torch.Generator().manual_seed(0), **kwargs).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for p in (sae.b_enc, sae.b_dec):
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    if isinstance(activation, Gated):
        for p in (sae.r_mag, sae.b_mag):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    if isinstance(activation, BatchTopK):
        sae.threshold.fill_(0.4)
    return sae


def inputs(n=11, d=7):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def dense_codes(sae, x, training):
    """The same codes by dense autograd; JumpReLU's threshold gradient by its formula."""
    bias = sae.b_dec if sae.apply_b_dec_to_input else 0
    pre = (x - bias) @ sae.W_enc + sae.b_enc
    match sae.activation:
        case TopK(k):
            mask = torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)
        case BatchTopK(k) if training:
            chosen = pre.flatten().topk(round(k * len(x))).indices
            mask = torch.zeros_like(pre).flatten().index_fill(0, chosen, 1.0).view_as(pre)
        case AbsTopK(k):
            return pre * torch.zeros_like(pre).scatter(1, pre.abs().topk(k, dim=1).indices, 1.0)
        case GroupMax(k):
            groups = pre.unflatten(1, (k, -1))
            mask = (groups == groups.amax(2, keepdim=True)).flatten(1)
        case TanhReLU():
            return pre.relu().tanh()
        case ReLU():
            mask = torch.ones_like(pre)
        case Gated():
            return (pre > 0) * ((pre - sae.b_enc) * sae.r_mag.exp() + sae.b_mag).relu()
        case _:
            mask = pre > sae.threshold
    return pre.relu() * mask


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("dense_above", [0.0, 1.0], ids=["dense", "sparse"])
def test_training_pass_equals_dense_autograd(activation, apply_b_dec_to_input, dense_above, monkeypatch):
    """pitfall_100, 101, 143: gradients reach the chosen latents, none where the value is 0; inputs are not clamped."""
    monkeypatch.setattr(sae_module, "DENSE_ABOVE", dense_above)
    sae, x = make(activation, apply_b_dec_to_input=apply_b_dec_to_input), inputs().requires_grad_()
    codes = sae.training_codes(x).codes
    if isinstance(activation, ReLU | TanhReLU | JumpReLU):
        assert isinstance(codes, DenseCodes if dense_above == 0 else SparseCodes)
    (ops.decode(codes, sae.W_dec) + sae.b_dec - x).pow(2).sum().backward()
    parameters = {n: p for n, p in sae.named_parameters() if n != "threshold"} | {"x": x}
    ours = {n: p.grad.clone() for n, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    expected = dense_codes(sae, x, training=True)
    torch.testing.assert_close(codes.to_dense(), expected)
    (expected @ sae.W_dec + sae.b_dec - x).pow(2).sum().backward()
    for name, p in parameters.items():
        torch.testing.assert_close(ours[name], p.grad, msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_inference_is_a_function_of_each_token(activation):
    """pitfall_031, pitfall_046: no coupling between tokens, no state changed by encoding."""
    sae, x = make(activation), inputs()
    before = {n: t.clone() for n, t in sae.state_dict().items()}
    together = sae.encode(x)
    alone = torch.cat([sae.encode(row[None]) for row in x])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together, dense_codes(sae, x, training=False))
    torch.testing.assert_close(sae(x), together @ sae.W_dec + sae.b_dec)
    assert all(torch.equal(before[n], t) for n, t in sae.state_dict().items())


@pytest.mark.parametrize("activation", [*ACTIVATIONS, MatchingPursuit(3)], ids=str)
def test_modes_change_nothing_and_can_be_chained(activation):
    """pitfall_069, 070: nothing is lost by `eval`, and codes are the same in either mode."""
    sae, x = SAE(7, 24, activation), torch.randn(9, 7)
    if isinstance(activation, BatchTopK):
        sae.threshold.fill_(0.1)
    trained, codes = sae.training_codes(x).codes.to_dense(), sae.encode(x)
    assert sae.eval() is sae
    assert not sae.training
    assert torch.equal(sae.encode(x), codes)
    assert torch.equal(sae.training_codes(x).codes.to_dense(), trained)
    assert sae.eval().train() is sae
    assert sae.training
    assert torch.equal(sae.training_codes(x).codes.to_dense(), trained)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_codes_and_inputs_outlive_the_next_call(activation):
    """What encoding works in is used again."""
    sae, x = make(activation, d_in=300, dtype=torch.float32), torch.randn(50, 300)
    before = x.clone()
    with torch.no_grad():
        codes = sae.encode_sparse(x)
        kept = [t.clone() for t in (codes.indices, codes.values, codes.offsets)]
        sae.encode_sparse(2 * x)
    assert torch.equal(x, before)
    assert all(torch.equal(t, k) for t, k in zip((codes.indices, codes.values, codes.offsets), kept, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_leading_dimensions(activation):
    """pitfall_025: (2, 3, d) gives what (6, d) gives."""
    sae, x = make(activation), inputs(6)
    torch.testing.assert_close(sae.encode(x.view(2, 3, 7)), sae.encode(x).view(2, 3, 24))
    torch.testing.assert_close(sae(x.view(2, 3, 7)), sae(x).view(2, 3, 7))
    assert sae.encode_sparse(x.view(2, 3, 7)).n_rows == 6
    assert sae(x[0]).shape == (7,)


def test_encode_is_differentiable_in_the_input():
    sae, x = make(TopK(3)), inputs().requires_grad_()
    sae.encode(x).sum().backward()
    ours, x.grad = x.grad, None
    dense_codes(sae, x, training=False).sum().backward()
    torch.testing.assert_close(ours, x.grad)


@pytest.mark.parametrize("activation", [TopK(8), BatchTopK(8)], ids=str)
def test_a_step_has_one_dense_product(activation):
    """Forward and backward together cost one `x @ W_enc`, and a mat-vec for the bias (pitfall_306)."""
    n, d, m = 1100, 32, 512
    sae, x = make(activation, d, m, torch.float32), torch.randn(n, d)
    with FlopCounterMode(display=False) as counter:
        codes = sae.training_codes(x).codes
        (ops.decode(codes, sae.W_dec) + sae.b_dec - x).pow(2).sum().backward()
    assert counter.get_total_flops() <= 2 * n * d * m + 4 * d * m


def test_jumprelu_threshold_gradient_by_hand():
    """pitfall_056, pitfall_057: -(threshold / bandwidth) inside the window, on both sides of the threshold."""
    sae = SAE(1, 1, JumpReLU(init_threshold=0.5, bandwidth=0.4)).double()
    sae.W_enc.data.fill_(1.0), sae.W_dec.data.fill_(1.0)
    for pre, expected in ((0.45, -0.5 / 0.4), (0.65, -0.5 / 0.4), (0.75, 0.0), (0.25, 0.0)):
        sae.zero_grad()
        sae.training_codes(torch.tensor([[pre]], dtype=torch.float64)).codes.values.sum().backward()
        grad = 0.0 if sae.threshold.grad is None else sae.threshold.grad.item()
        assert grad == pytest.approx(expected)


@pytest.mark.parametrize("hint", [1e-3, 0.5, 100.0])
def test_batch_topk_is_exact_whatever_the_last_threshold_was(hint):
    sae, x = make(BatchTopK(3)), inputs()
    expected = dense_codes(sae, x, training=True)
    sae.threshold.fill_(hint)
    torch.testing.assert_close(sae.training_codes(x).codes.to_dense(), expected)


def test_negative_values_of_topk_are_zero():
    """pitfall_041: a row of negative pre-activations has L0 0."""
    sae = SAE(4, 6, TopK(3))
    sae.b_enc.data.fill_(-100.0)
    assert sae.encode_sparse(torch.randn(5, 4)).l0().tolist() == [0] * 5


def test_thresholds_are_compared_strictly():
    """pitfall_075"""
    sae = SAE(1, 1, JumpReLU(init_threshold=1.0))
    sae.W_enc.data.fill_(1.0)
    assert sae.encode(torch.tensor([[1.0], [1.5]])).flatten().tolist() == [0.0, 1.5]


def test_dead_latents_come_from_the_same_pass():
    sae, x = make(TopK(2)), inputs()
    dead = torch.tensor([4, 9, 20])
    aux = sae.training_codes(x, dead, k_aux=2).aux
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    expected = pre[:, [4, 9, 20]].topk(2, dim=1).values.sort(dim=1).values
    torch.testing.assert_close(aux.values.view(-1, 2).sort(dim=1).values, expected)
    aux.values.sum().backward()
    assert (sae.W_enc.grad.abs().sum(0) > 0).nonzero().flatten().tolist() == sorted(set(aux.indices.tolist()))


def test_encoder_and_decoder_have_their_own_storage():
    """pitfall_168; the encoder is laid out latent by latent."""
    sae = SAE(4, 8, TopK(2))
    assert sae.W_enc.shape == (4, 8)
    assert sae.W_enc.T.is_contiguous()
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()


@pytest.mark.parametrize(("d_in", "d_sae", "k"), [(0, 4, 1), (4, 0, 1), (4, 4, 5), (4, -3, 1)])
def test_impossible_shapes_are_refused(d_in, d_sae, k):
    with pytest.raises(UnweaveError, match="d_sae"):
        SAE(d_in, d_sae, TopK(k))


@pytest.mark.parametrize("cls", [TopK, BatchTopK])
def test_k_of_zero_is_refused(cls):
    with pytest.raises(UnweaveError, match="k=0"):
        cls(0)


def test_wrong_width_is_refused():
    with pytest.raises(UnweaveError, match="width 4"):
        SAE(4, 8, TopK(2))(torch.randn(3, 5))


def test_uncalibrated_batch_topk_does_not_infer():
    """pitfall_074"""
    with pytest.raises(UnweaveError, match="calibrate"):
        SAE(4, 8, BatchTopK(2)).encode(torch.randn(3, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_of_input(dtype):
    sae, x = make(TopK(3), dtype=torch.float32), torch.randn(5, 7).to(dtype)
    assert sae(x).dtype == dtype
    assert sae.encode(x).dtype == torch.float32


def test_pitfall_259_262_an_sae_has_no_length_and_only_the_attributes_that_it_has():
    sae = SAE(4, 8, TopK(2))
    with pytest.raises(TypeError):
        len(sae)
    with pytest.raises(AttributeError, match="metadat"):
        sae.metadat  # noqa: B018
    with pytest.raises(AttributeError):
        sae.metadata.hook_name  # noqa: B018
