"""Transcoders and crosscoders: formulas by hand, folds, files, parts."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.sae import (
    SAE,
    AbsTopK,
    BatchTopK,
    Crosscoder,
    Gated,
    JumpReLU,
    ReLU,
    TopK,
    Transcoder,
    by_target,
    fold_decoder_norms,
    fold_input_scale,
)

RELU = ReLU()
ACTIVATIONS = [RELU, TopK(3), BatchTopK(3), JumpReLU(), Gated(), AbsTopK(3)]


@torch.no_grad()
def randomise(coder: SAE, seed: int = 0) -> SAE:
    """Every weight, bias and threshold away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in coder.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / (2 if parameter.ndim == 2 else 4))
        if name == "threshold":
            parameter.copy_(torch.rand(parameter.shape, generator=generator) / 2)
    if coder.activation.calibrated:
        coder.threshold.fill_(0.4)
    return coder.requires_grad_(False)


def transcoder(activation=RELU, *, skip=True, d_in=6, d_out=5, d_sae=12) -> Transcoder:
    coder = randomise(Transcoder(d_in, d_out, d_sae, activation, skip=skip))
    assert isinstance(coder, Transcoder)
    return coder


def crosscoder(activation=RELU, d_sae=12) -> Crosscoder:
    coder = randomise(Crosscoder({"a": 4, "b": 3, "c": 2}, d_sae, activation))
    assert isinstance(coder, Crosscoder)
    return coder


def test_a_transcoder_by_hand():
    coder = Transcoder(2, 1, 2, ReLU(), skip=True)
    with torch.no_grad():
        coder.W_enc.copy_(torch.tensor([[1.0, -1.0], [0.0, 2.0]]))
        coder.b_enc.copy_(torch.tensor([0.5, -1.0]))
        coder.W_dec.copy_(torch.tensor([[10.0], [100.0]]))
        coder.b_dec.fill_(0.25)
        coder.W_skip.copy_(torch.tensor([[3.0, 7.0]]))
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
    # pre: (1.5, 2) and (-0.5, 0); skip: 17 and -3.
    assert coder.encode(x).tolist() == [[1.5, 2.0], [0.0, 0.0]]
    assert coder(x).tolist() == [[15.0 + 200.0 + 0.25 + 17.0], [0.25 - 3.0]]


def test_a_fresh_skip_is_zero_and_its_absence_is_none():
    x = torch.randn(3, 6)
    with_skip = Transcoder(6, 5, 12, ReLU(), skip=True, generator=torch.Generator().manual_seed(0))
    without = Transcoder(6, 5, 12, ReLU(), generator=torch.Generator().manual_seed(0))
    assert without.W_skip is None
    assert "W_skip" not in without.state_dict()
    torch.testing.assert_close(with_skip(x), without(x))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(3, 20), st.integers(0, 6), st.booleans())
def test_a_transcoder_is_its_formula(d_in, d_out, d_sae, n, skip):
    coder = transcoder(skip=skip, d_in=d_in, d_out=d_out, d_sae=d_sae).double()
    x = torch.randn(n, d_in, dtype=torch.float64)
    expected = (x @ coder.W_enc + coder.b_enc).relu() @ coder.W_dec + coder.b_dec
    if coder.W_skip is not None:
        expected = expected + x @ coder.W_skip.T
    torch.testing.assert_close(coder(x), expected)
    assert coder(x.reshape(1, n, d_in)).shape == (1, n, d_out)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_a_crosscoder_has_one_code_and_a_reconstruction_for_each_hook(activation):
    """pitfall_062"""
    coder = crosscoder(activation)
    x = {"c": torch.randn(5, 2), "a": torch.randn(5, 4), "b": torch.randn(5, 3)}
    codes = coder.encode(coder.join(x))
    assert codes.shape == (5, 12)
    assert (codes != 0).any()
    W_enc, W_dec, b_dec = coder.split(coder.W_enc.T), coder.split(coder.W_dec), coder.split(coder.b_dec)
    if isinstance(activation, ReLU):
        torch.testing.assert_close(codes, (sum(x[h] @ W_enc[h].T for h in x) + coder.b_enc).relu())
    for hook, x_hat in coder.split(coder(coder.join(x))).items():
        torch.testing.assert_close(x_hat, codes @ W_dec[hook] + b_dec[hook])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_a_crosscoder_at_one_hook_is_a_transcoder_with_its_weights(activation):
    coder, x = crosscoder(activation), torch.randn(5, 9)
    coder.metadata["hf_hook_names"] = ["a", "b", "c"]
    assert list(by_target(coder)) == ["a", "b", "c"]
    for hook, part in by_target(coder).items():
        assert isinstance(part, Transcoder)
        torch.testing.assert_close(part.encode(x), coder.encode(x))
        torch.testing.assert_close(part(x), coder.split(coder(x))[hook])
        assert part.W_enc.data_ptr() == coder.W_enc.data_ptr()
        assert part.metadata == {"hf_hook_names": ["a", "b", "c"], "hf_hook_name_out": hook}
    with pytest.raises(UnweaveError, match="no hook 'd'"):
        coder.at("d")


def test_the_norms_of_a_crosscoder():
    coder = crosscoder()
    a, b, c = coder.W_dec.split([4, 3, 2], dim=1)
    torch.testing.assert_close(coder.decoder_norms(), a.norm(dim=1) + b.norm(dim=1) + c.norm(dim=1))
    torch.testing.assert_close(coder.hook_norms()["b"], b.norm(dim=1))
    fresh = Crosscoder({"a": 4, "b": 3}, 12, ReLU())
    torch.testing.assert_close(fresh.W_dec.norm(dim=1), torch.ones(12))
    torch.testing.assert_close(fresh.hook_norms()["a"], fresh.hook_norms()["b"])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_scales_fold_exactly(activation):
    """pitfall_131: hooks of scales 1, 10 and 0.2."""
    for coder, s_in, s_out in (
        (transcoder(activation), 0.3, 7.0),
        (crosscoder(activation), torch.tensor([1.0] * 4 + [10.0] * 3 + [0.2] * 2), None),  # a scale for each hook
    ):
        x, out = torch.randn(20, coder.d_in), s_in if s_out is None else s_out
        codes, predicted = coder.encode(s_in * x), coder(s_in * x) / out
        fold_input_scale(coder, s_in, s_out)
        torch.testing.assert_close(coder.encode(x), codes, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(coder(x), predicted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(), Gated()], ids=lambda a: a.name)
def test_decoder_norms_fold_exactly(activation):
    for coder in (transcoder(activation), crosscoder(activation)):
        x = torch.randn(20, coder.d_in)
        predicted, codes, norms = coder(x), coder.encode(x), coder.W_dec.norm(dim=1)
        fold_decoder_norms(coder)
        torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(12))
        torch.testing.assert_close(coder(x), predicted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(coder.encode(x), codes * norms, atol=1e-5, rtol=1e-5)


def test_a_fold_that_would_change_the_winners_is_refused():
    for coder in (transcoder(TopK(3)), crosscoder(BatchTopK(3))):
        with pytest.raises(UnweaveError, match="would change which latents"):
            fold_decoder_norms(coder)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_saved_and_loaded_it_predicts_the_same(activation, tmp_path):
    for coder in (transcoder(activation), transcoder(activation, skip=False), crosscoder(activation)):
        loaded = SAE.load(coder.save(tmp_path / "coder"))
        assert type(loaded) is type(coder)
        x = torch.randn(20, coder.d_in)
        assert torch.equal(loaded.encode(x), coder.encode(x))
        assert torch.equal(loaded(x), coder(x))
        if isinstance(coder, Crosscoder):
            assert loaded.widths == coder.widths


@pytest.mark.parametrize(
    ("activation", "skip", "architecture"),
    [
        (ReLU(), False, "transcoder"),
        (ReLU(), True, "skip_transcoder"),
        (BatchTopK(3), False, "jumprelu_transcoder"),
        (JumpReLU(), True, "jumprelu_skip_transcoder"),
        (TopK(3), True, "topk_skip_transcoder"),
    ],
)
def test_names_of_architectures(activation, skip, architecture, tmp_path):
    transcoder(activation, skip=skip).save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["architecture"], config["d_out"], config["apply_b_dec_to_input"]) == (architecture, 5, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"apply_b_dec_to_input": True}, "subtracts no decoder bias"),
        ({"d_out": None}, "lacks the key 'd_out'"),
        ({"d_out": 4}, "W_dec.*has the shape"),
        ({"architecture": "transcoder"}, "'W_skip', which a transcoder SAE has not"),
        ({"architecture": "crosscoder", "widths": {"a": 3, "b": 4}}, "d_in=6, and its widths make 7"),
        ({"normalize_activations": "layer_norm"}, "layer_norm.*does not apply"),
    ],
)
def test_bad_files(changes, message, tmp_path):
    transcoder().save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text()) | changes
    (tmp_path / "cfg.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(UnweaveError, match=message):
        SAE.load(tmp_path)


def test_impossible_shapes():
    for make in (
        lambda: Transcoder(3, 0, 4, ReLU()),
        lambda: Crosscoder({"a": 3}, 4, ReLU()),
        lambda: Crosscoder({"a": 3, "b": 0}, 4, ReLU()),
        lambda: Transcoder(3, 3, 4, TopK(5)),
    ):
        with pytest.raises(UnweaveError):
            make()
    coder = crosscoder()
    with pytest.raises(UnweaveError, match="also reads 'c'"):
        coder.join({"a": torch.ones(1, 4), "b": torch.ones(1, 3)})
