"""Cross-layer transcoders: formulas by hand, what is selected where, folds, files, parts."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.kernels import LargestOfBatch
from unweave.sae import (
    SAE,
    AbsTopK,
    BatchTopK,
    CrossLayerTranscoder,
    DenseCodes,
    Gated,
    GroupMax,
    JumpReLU,
    Normalization,
    ReLU,
    TanhReLU,
    TopK,
    Transcoder,
    by_target,
    fold_decoder_norms,
    fold_input_scale,
    fold_normalization,
)
from unweave.sae.sae import DENSE_ABOVE

ACTIVATIONS = [ReLU(), TopK(3), BatchTopK(3), JumpReLU(), JumpReLU(shared=True), Gated(), AbsTopK(3), GroupMax(3)]
M, READS, WRITES = 12, {"a": 6, "b": 6, "c": 6}, {"ya": 4, "yb": 5, "yc": 3}


@torch.no_grad()
def clt(activation, reads=READS, writes=WRITES, m=M, seed=0, *, skip=False) -> CrossLayerTranscoder:
    """Every weight, bias and threshold away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    coder = CrossLayerTranscoder(reads, writes, m, activation, skip=skip, generator=generator)
    for name, parameter in coder.named_parameters():
        if name == "threshold":
            parameter.copy_(torch.rand(parameter.shape, generator=generator) / 2)
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / (2 if parameter.ndim == 2 else 4))
    if activation.calibrated:
        coder.threshold.fill_(0.4)
    return coder.requires_grad_(False)


def by_hand(coder, x):
    """Pre-activations and decoded codes, layer by layer, from the blocks."""
    n = coder.layers
    m = coder.d_sae // n
    pre = [
        x_l @ coder.W_enc[:, i * m : (i + 1) * m] + coder.b_enc[i * m : (i + 1) * m]
        for i, x_l in enumerate(x.split(x.shape[1] // n, 1))
    ]

    def decode(codes):
        return {
            target: coder.split(coder.b_dec)[target]
            + sum(codes[source] @ coder.decoder(source, target) for source in range(layer + 1))
            for layer, target in enumerate(coder.writes)
        }

    return pre, decode


def test_two_layers_by_hand():
    """pitfall_265, pitfall_266: a decoder for each pair of layers, kept apart."""
    coder = CrossLayerTranscoder({"a": 1, "b": 1}, {"ya": 1, "yb": 1}, 1, ReLU())
    with torch.no_grad():
        coder.W_enc.copy_(torch.tensor([[1.0, -1.0]]))
        coder.b_enc.copy_(torch.tensor([0.5, 4.0]))
        coder.decoder(0, "ya").fill_(10)
        coder.decoder(0, "yb").fill_(100)
        coder.decoder(1, "yb").fill_(1000)
        coder.b_dec.copy_(torch.tensor([0.25, 0.125]))
    x = coder.join({"b": torch.tensor([[2.0], [9.0]]), "a": torch.tensor([[1.5], [1.0]])})
    assert x.tolist() == [[1.5, 2.0], [1.0, 9.0]]
    assert coder.encode(x).tolist() == [[2.0, 2.0], [1.5, 0.0]]
    assert coder(x).tolist() == [[20.25, 2200.125], [15.25, 150.125]]
    assert coder.W_dec.tolist() == [[10.0, 100.0], [0.0, 1000.0]]
    assert coder.encode_sparse(x).indices.tolist() == [0, 1, 0]


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 4), st.integers(1, 5), st.integers(1, 4), st.integers(3, 9), st.integers(0, 6))
def test_it_is_its_formula(layers, d, d_out, m, n):
    """pitfall_063: decoder rows have other norms in each layer, and encoding asks none of them."""
    coder = clt(ReLU(), {f"x{i}": d for i in range(layers)}, {f"y{i}": d_out + i for i in range(layers)}, m).double()
    x = torch.randn(n, layers * d, dtype=torch.float64)
    pre, decode = by_hand(coder, x)
    codes = [p.relu() for p in pre]
    torch.testing.assert_close(coder.encode(x), torch.cat(codes, 1))
    for target, y in decode(codes).items():
        torch.testing.assert_close(coder.split(coder(x))[target], y)
    assert coder(x.reshape(1, n, layers * d)).shape == (1, n, coder.d_out)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_every_layer_is_encoded_as_an_sae_by_itself(activation):
    coder, x = clt(activation), torch.randn(7, 18)
    for i, (codes, x_l) in enumerate(zip(coder.encode(x).split(M, 1), x.split(6, 1), strict=True)):
        alone = SAE(6, M, activation, apply_b_dec_to_input=False).requires_grad_(False)
        own = slice(i * M, (i + 1) * M)
        alone.W_enc.copy_(coder.W_enc[:, own])
        for name, value in coder.state_dict().items():
            if name not in ("W_enc", "b_dec") and not name.startswith("W_dec"):
                getattr(alone, name).copy_(value[own] if value.ndim else value)
        torch.testing.assert_close(codes, alone.encode(x_l))
        assert (codes != 0).any()


@pytest.mark.parametrize("hint", [None, 0.0, 0.9, 50.0])
def test_the_winners_of_a_batch_are_those_of_all_layers(hint):
    coder, x = clt(BatchTopK(2)), torch.randn(10, 18)
    pre = torch.cat(by_hand(coder, x)[0], 1)
    found = coder._codes(coder.selected(x, LargestOfBatch(20, hint))).to_dense()
    smallest = pre.flatten().topk(60).values[-1]
    torch.testing.assert_close(found, torch.where(pre >= smallest, pre, 0.0))
    counts = (found.view(10, 3, M) != 0).sum((0, 2))
    assert counts.sum() == 60
    assert len(counts.unique()) > 1  # layers take different shares


def test_where_too_few_are_positive_all_of_them_win():
    coder, x = clt(BatchTopK(12)), torch.randn(10, 18)
    positive = torch.cat(by_hand(coder, x)[0], 1).relu()
    for hint in (None, 0.3):
        torch.testing.assert_close(coder._codes(coder.selected(x, LargestOfBatch(120, hint))).to_dense(), positive)


def test_the_strongest_dead_latents_of_each_layer():
    coder, x = clt(ReLU()), torch.randn(5, 18)
    dead = torch.tensor([1, 4, 7, 30])  # three of the first layer, none of the second, one of the third
    pre = torch.cat(by_hand(coder, x)[0], 1)
    found = coder._codes(coder.strongest(x, dead, 6)).to_dense()
    expected, first = torch.zeros_like(pre), pre[:, [1, 4, 7]].topk(2, dim=1)
    expected.scatter_(1, torch.tensor([1, 4, 7])[first.indices], first.values)
    expected[:, 30] = pre[:, 30]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", [ReLU(), TanhReLU(), JumpReLU(bandwidth=1.0)], ids=lambda a: a.name)
def test_dense_and_sparse_steps_have_one_gradient(activation, monkeypatch):
    coder, x = clt(activation).double(), torch.randn(6, 18, dtype=torch.float64)
    coder.requires_grad_(True)
    made = []
    for bound in (DENSE_ABOVE, 1.0):
        monkeypatch.setattr("unweave.sae.sae.DENSE_ABOVE", bound)
        x.grad = None
        found = coder.training_codes(x.requires_grad_())
        coder.output(found.codes, x).square().sum().backward()
        made.append((isinstance(found.codes, DenseCodes), x.grad, {n: p.grad for n, p in coder.named_parameters()}))
        coder.zero_grad()
    assert [is_dense for is_dense, _, _ in made] == [True, False]
    torch.testing.assert_close(*(grad for _, grad, _ in made))
    torch.testing.assert_close(*(grads for _, _, grads in made))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_at_one_output_it_is_a_transcoder_from_the_layers_up_to_it(activation):
    coder, x = clt(activation), torch.randn(5, 18)
    coder.metadata |= {
        "hook_names": ["A", "B", "C"], "hook_names_out": ["YA", "YB", "YC"], "hf_hook_names": list(READS),
        "hf_hook_names_out": list(WRITES), "seed": 3,
    }  # fmt: skip
    parts = by_target(coder)
    assert list(parts) == list(WRITES)
    for layers, (target, part) in enumerate(parts.items(), start=1):
        assert isinstance(part, Transcoder)
        shown = x[:, : 6 * layers]
        torch.testing.assert_close(part.encode(shown), coder.encode(x)[:, : M * layers])
        torch.testing.assert_close(part(shown), coder.split(coder(x))[target])
        assert part.W_enc.data_ptr() == coder.W_enc.data_ptr()
        assert part.metadata == {
            "hook_names": ["A", "B", "C"][:layers], "hook_name_out": ["YA", "YB", "YC"][layers - 1],
            "hf_hook_names": list(READS)[:layers], "hf_hook_name_out": target, "seed": 3,
        }  # fmt: skip
        with pytest.raises(UnweaveError, match="save the whole"):
            part.save("nowhere")
    with pytest.raises(UnweaveError, match="does not write to 'yd'"):
        coder.at("yd")


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_scales_fold_exactly(activation):
    """pitfall_130: with decoder norms other than 1."""
    for s_in, s_out in (
        (torch.tensor([0.3] * 6 + [2.0] * 6 + [7.0] * 6), torch.tensor([1.0] * 4 + [10.0] * 5 + [0.2] * 3)),
        (0.3, 7.0),
    ):
        coder, x = clt(activation), torch.randn(20, 18)
        codes, predicted = coder.encode(s_in * x), coder(s_in * x) / s_out
        fold_input_scale(coder, s_in, s_out)
        torch.testing.assert_close(coder.encode(x), codes, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(coder(x), predicted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(), Gated()], ids=lambda a: a.name)
def test_decoder_norms_fold_exactly(activation):
    """pitfall_130"""
    coder, x = clt(activation), torch.randn(20, 18)
    predicted, codes, norms = coder(x), coder.encode(x), coder.W_dec.norm(dim=1)
    torch.testing.assert_close(coder.decoder_norms(), norms)  # over all outputs together
    fold_decoder_norms(coder)
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(3 * M))
    torch.testing.assert_close(coder(x), predicted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(coder.encode(x), codes * norms, atol=1e-5, rtol=1e-5)


def test_folds_that_are_not_exact_are_refused():
    with pytest.raises(UnweaveError, match="would change which latents"):
        fold_decoder_norms(clt(TopK(3)))
    with pytest.raises(UnweaveError, match="folded into autoencoders"):
        fold_normalization(clt(ReLU()), Normalization.fit("center", torch.randn(30, 18)))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.name)
def test_saved_and_loaded_it_predicts_the_same(activation, tmp_path):
    coder, x = clt(activation), torch.randn(20, 18)
    loaded = SAE.load(coder.save(tmp_path / "clt"))
    assert isinstance(loaded, CrossLayerTranscoder)
    assert (loaded.reads, loaded.writes, loaded.latents_per_layer) == (READS, WRITES, M)
    assert torch.equal(loaded.encode(x), coder.encode(x))
    assert torch.equal(loaded(x), coder(x))
    assert torch.equal(loaded.W_dec, coder.W_dec)


def test_a_whole_decoder_cannot_be_put_in_place_of_the_blocks():
    """Registered as a parameter it would have taken their place without a word, and nothing would have decoded."""
    coder = clt(ReLU())
    for each in (coder, coder.at("yc")):
        before = {name: tensor.clone() for name, tensor in each.state_dict().items()}
        for value in (torch.nn.Parameter(each.W_dec.detach().clone()), each.W_dec.detach()):
            with pytest.raises(UnweaveError, match=r"write to decoders\[i\]"):
                each.W_dec = value
        assert each.state_dict().keys() == before.keys()


def test_it_holds_what_is_not_zero_and_parts_share_it():
    """`W_dec` is a copy, blocks and `decoder` are the memory itself, and gradients reach the blocks through both."""
    coder, x = clt(ReLU()), torch.randn(5, 18)
    assert sum(block.numel() for block in coder.decoders) == M * (12 + 8 + 3)
    assert list(coder.state_dict())[-3:] == ["W_dec.0", "W_dec.1", "W_dec.2"]
    before = coder(x)
    coder.W_dec.zero_()
    assert torch.equal(coder(x), before)
    part = coder.at("yc")
    coder.decoder(1, "yc").zero_()
    assert part.W_dec[M : 2 * M].count_nonzero() == coder.W_dec[M : 2 * M, 9:].count_nonzero() == 0
    assert coder.W_dec[M : 2 * M, 4:9].all()
    rows = torch.tensor([0, 3, M + 1, 3 * M - 1])
    assert torch.equal(coder.decoder_rows(rows), coder.W_dec[rows])
    coder.requires_grad_(True)
    coder.W_dec[M + 2].sum().backward()
    for i, block in enumerate(coder.decoders):
        expected = torch.zeros_like(block)
        expected[2] = float(i == 1)
        torch.testing.assert_close(block.grad, expected)


EVEN = {"ya": 4, "yb": 4, "yc": 4}


def test_a_skip_maps_each_layer_s_own_input(tmp_path):
    """In every output, part, and file; folds take it along."""
    torch.manual_seed(0)
    coder, plain, x = clt(JumpReLU(), writes=EVEN, skip=True), clt(JumpReLU(), writes=EVEN), torch.randn(20, 18)
    assert coder.W_skip.shape == (3, 6, 4)
    plain.load_state_dict({name: tensor for name, tensor in coder.state_dict().items() if name != "W_skip"})
    mapped = torch.cat([part @ S for part, S in zip(x.split(6, 1), coder.W_skip, strict=True)], 1)
    torch.testing.assert_close(coder(x), plain(x) + mapped)
    for i, target in enumerate(EVEN):
        torch.testing.assert_close(coder.at(target)(x[:, : 6 * (i + 1)]), coder.split(coder(x))[target])
    loaded = SAE.load(coder.save(tmp_path))
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "jumprelu_skip_clt"
    assert torch.equal(loaded(x), coder(x))
    assert torch.equal(loaded.W_skip, coder.W_skip)
    scale, target_scale = torch.rand(18) + 0.5, torch.rand(12) + 0.5
    expected = coder(x * scale) / target_scale
    fold_input_scale(coder, scale, target_scale)
    torch.testing.assert_close(coder(x), expected, atol=1e-5, rtol=1e-5)


def test_a_skip_learns():
    coder, x = CrossLayerTranscoder(READS, EVEN, M, TopK(3), skip=True), torch.randn(20, 18)
    coder(x).sum().backward()
    for part, gradient in zip(x.split(6, 1), coder.W_skip.grad, strict=True):
        torch.testing.assert_close(gradient, part.sum(0)[:, None].expand(6, 4))
    with pytest.raises(UnweaveError, match="with a skip have one width"):
        CrossLayerTranscoder(READS, WRITES, M, TopK(3), skip=True)


def test_a_file_has_the_decoders_of_each_source_and_no_zeros(tmp_path):
    from safetensors.torch import load_file

    coder = clt(TopK(3))
    coder.save(tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("W_dec")}
    assert shapes == {"W_dec.0": (M, 12), "W_dec.1": (M, 8), "W_dec.2": (M, 3)}
    assert torch.equal(tensors["W_dec.1"][:, 5:], coder.decoder(1, "yc"))
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["architecture"], config["reads"], config["d_sae"]) == ("topk_clt", READS, 3 * M)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reads": None}, "lacks the key 'reads'"),
        ({"writes": None}, "lacks the key 'writes'"),
        ({"d_in": 19}, "do not go with its reads"),
        ({"d_sae": 37}, "do not go with its reads"),
        ({"reads": {}}, "do not go with its reads"),
        ({"d_sae": 39}, r"W_enc in .* has the shape"),
        ({"writes": {"ya": 4, "yb": 5, "yc": 4}}, r"b_dec in .* has the shape \(12,\), and its config says"),
        ({"writes": {"ya": 5, "yb": 4, "yc": 3}}, r"W_dec.1 in .* has the shape \(12, 8\), and its config says"),
        ({"architecture": "topk_crosscoder", "widths": {"a": 9, "b": 9}}, "lacks the tensor 'W_dec'"),
        ({"apply_b_dec_to_input": True}, "a clt subtracts no decoder bias"),
    ],
)
def test_bad_files(changes, message, tmp_path):
    clt(TopK(3)).save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text()) | changes
    (tmp_path / "cfg.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(UnweaveError, match=message):
        SAE.load(tmp_path)


@pytest.mark.parametrize(
    ("reads", "writes", "m", "message"),
    [
        ({"a": 3}, {"y": 3}, 4, "two or more layers"),
        ({"a": 3, "b": 3}, {"y": 3}, 4, "2 inputs and 1 outputs"),
        ({"a": 3, "b": 4}, {"y": 3, "z": 3}, 4, r"one width, got \[3, 4\]"),
        ({"a": 3, "b": 3}, {"y": 3, "z": 0}, 4, "outputs of positive width"),
        ({"a": 3, "b": 3}, {"y": 3, "z": 3}, 0, "at least one latent"),
        ({"a": 3, "b": 3}, {"y": 3, "z": 3}, 2, "k=3 is larger than the number of latents"),
        ({"a": 0, "b": 0}, {"y": 3, "z": 3}, 4, "d_in"),
    ],
)
def test_impossible_shapes(reads, writes, m, message):
    with pytest.raises(UnweaveError, match=message):
        CrossLayerTranscoder(reads, writes, m, TopK(3))


def test_no_layer_writes_to_an_earlier_one():
    coder = clt(ReLU())
    for source, target in ((1, "ya"), (2, "yb"), (-1, "yc"), (3, "yc")):
        with pytest.raises(UnweaveError, match=f"layer {source} do not write to '{target}'"):
            coder.decoder(source, target)
    with pytest.raises(UnweaveError, match="also reads 'c'"):
        coder.join({"a": torch.ones(1, 6), "b": torch.ones(1, 6)})
    assert coder.W_dec[M:, :4].count_nonzero() == 0
    assert coder.W_dec[2 * M :, :9].count_nonzero() == 0
    assert coder.W_dec.count_nonzero() == M * (12 + 8 + 3)
