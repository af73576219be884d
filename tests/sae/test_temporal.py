"""Temporal SAEs against loops over tokens and heads in float64; what they predict never looks ahead."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.sae import (
    SAE,
    BatchTopK,
    Normalization,
    ReLU,
    Temporal,
    TemporalSAE,
    TopK,
    fold_decoder_norms,
    fold_input_scale,
    fold_normalization,
)
from unweave.sae.files import save_training_form


def make(d_in=5, d_sae=24, activation=None, seed=0, **kwargs):
    settings_ = Temporal(**({"n_heads": 2, "bottleneck": 3, "context": 6} | kwargs))
    sae = TemporalSAE(d_in, d_sae, activation or TopK(4), settings_).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        spread = 1.0 if parameter is sae.W_dec else parameter.shape[-1] ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * spread)
    return sae


def reference(sae, sequence):
    """Predicted codes, novel pre-activations and output of one sequence, one token and one head at a time."""
    encoder = sae.W_dec.T / (4 * sae.d_in) if sae.tied else sae.W_enc
    heads = sae.settings.n_heads
    residual = sequence * sae.scale - sae.b_dec
    predicted = torch.zeros(len(sequence), sae.d_sae, dtype=sequence.dtype)
    for layer in sae.attn_layers:
        z = (residual @ encoder).relu()
        left, made = residual.clone(), []
        for t in range(len(z)):
            past = torch.cat([torch.zeros_like(z[:1]), z[:t]])  # a token before the first, then all earlier ones
            parts = []
            for query, keys, values in zip(
                layer.q_target(z[t]).chunk(heads), layer.k_ctx(past).chunk(heads, 1),
                layer.v_ctx(past).chunk(heads, 1), strict=True,
            ):  # fmt: skip
                parts.append((keys @ query / len(query) ** 0.5).softmax(0) @ values)
            made.append(layer.c_proj(torch.cat(parts)).relu())
            direction = made[-1] @ sae.W_dec
            along = (direction @ residual[t]) / (direction.norm() + 1e-6) ** 2
            left[t] = residual[t] - along * direction
            predicted[t] += along * made[-1]
        residual = left
    return predicted, residual @ encoder


@settings(max_examples=15, deadline=None)
@given(
    tied=st.booleans(), layers=st.integers(1, 2), heads=st.sampled_from([1, 2, 4]), tokens=st.integers(1, 6),
    scale=st.sampled_from([1.0, 0.3]), seed=st.integers(0, 50),
)  # fmt: skip
def test_against_the_loop(tied, layers, heads, tokens, scale, seed):
    sae = make(tied=tied, n_layers=layers, n_heads=heads, seed=seed)
    sae.scale = scale
    x = torch.randn(2, tokens, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / scale
    for i in range(2):
        predicted, pre = reference(sae, x[i])
        novel = pre.relu() * (pre.argsort(1, descending=True).argsort(1) < 4)
        torch.testing.assert_close(sae.predicted(x)[i], predicted)
        torch.testing.assert_close(sae.encode(x)[i], novel)
        torch.testing.assert_close(sae(x)[i], ((predicted + novel) @ sae.W_dec + sae.b_dec) / scale)


def test_hand_computed_at_the_first_token():
    """One token sees only the token of zeros before it: with biases 0, nothing is predicted of it."""
    sae = make(activation=ReLU())
    for name, parameter in sae.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    x = torch.randn(1, 1, 5, dtype=torch.float64)
    assert (sae.predicted(x) == 0).all()
    torch.testing.assert_close(sae.encode(x), ((x - sae.b_dec) @ sae.W_dec.T / 20).relu())


def test_pitfall_072_all_codes_have_names():
    """decode(full_codes) is forward; encode is the novel part, and output adds what was predicted."""
    sae, x = make(), torch.randn(3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(sae.decode(sae.full_codes(x)), sae(x))
    torch.testing.assert_close(sae.full_codes(x), sae.encode(x) + sae.predicted(x))
    novel = sae.encode_sparse(x)
    torch.testing.assert_close(sae.output(novel, x).reshape(x.shape), sae(x))
    assert (sae.decode(sae.encode(x)) - sae(x)).norm() > 0.1 * sae(x).norm()


def test_no_token_sees_a_later_one():
    sae, x = make(n_layers=2), torch.randn(1, 6, 5, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4] += 1
    torch.testing.assert_close(sae(changed)[:, :4], sae(x)[:, :4])
    assert not torch.allclose(sae.predicted(changed)[:, 5], sae.predicted(x)[:, 5])


def test_training_rows_are_the_same_sequences():
    sae, x = make(), torch.randn(12, 5, dtype=torch.float64)
    left, constant = sae.split_input(x)
    codes = sae.training_codes(left).codes
    torch.testing.assert_close(codes.to_dense() @ sae.W_dec + constant, sae(x.reshape(2, 6, 5)).reshape(12, 5))
    with pytest.raises(UnweaveError, match="whole sequences of 6 tokens, and 13 rows"):
        sae.split_input(torch.randn(13, 5, dtype=torch.float64))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", [TopK(4), ReLU()])
def test_files(tied, activation, tmp_path):
    sae, x = make(activation=activation, tied=tied, n_layers=2).float(), torch.randn(3, 6, 5)
    sae.scale = 0.37
    for folder in (sae.save(tmp_path / "sae"), save_training_form(sae, tmp_path / "training", {})):
        loaded = SAE.load(folder)
        assert isinstance(loaded, TemporalSAE)
        assert loaded.activation == activation
        torch.testing.assert_close(loaded.full_codes(x), sae.full_codes(x))
        torch.testing.assert_close(loaded(x), sae(x))


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: make()(torch.randn(7, 5)), r"takes sequences \(..., tokens, 5\)"),
        (lambda: make()(torch.randn(2, 7, 4)), "takes sequences"),
        (lambda: make(d_sae=25), "25 is no multiple of 3 \\* 2"),
        (lambda: make(activation=BatchTopK(4)), "ReLU or TopK, not with BatchTopK"),
        (lambda: Temporal(n_heads=0), "n_heads of at least 1"),
        (lambda: fold_input_scale(make(), 2.0), "keeps sae.scale"),
        (lambda: fold_decoder_norms(make()), "keeps sae.scale"),
        (lambda: fold_normalization(make(), Normalization.fit("center", torch.randn(9, 5))), "keeps sae.scale"),
    ],
)
def test_bad_input(make_it, message):
    with pytest.raises(UnweaveError, match=message):
        make_it()
