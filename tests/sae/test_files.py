import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from unweave._errors import UnweaveError
from unweave._files import write_tensors
from unweave.sae import SAE, AbsTopK, BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TanhReLU, TopK
from unweave.sae.files import save_training_form

ACTIVATIONS = [
    ReLU(), TanhReLU(), TopK(3), AbsTopK(3), GroupMax(23), BatchTopK(3), BatchTopK(2.5), JumpReLU(0.2, 0.1),
    JumpReLU(0.2, 0.1, kernel="quartic", ste_to_input=True, shared=True, log_threshold=True), Gated(),
]  # fmt: skip


def make(activation, dtype=torch.float32):
    sae = SAE(
        7,
        23,
        activation,
        generator=torch.Generator().manual_seed(0),
        metadata={"hook_name": "blocks.1.hook_resid_post"},
    )
    sae.b_enc.data.copy_(torch.linspace(-0.3, 0.3, 23))
    sae.b_dec.data.copy_(torch.linspace(-1, 1, 7))
    if isinstance(activation, BatchTopK):
        sae.threshold.fill_(0.4)
    if isinstance(activation, JumpReLU):
        sae.threshold.data.copy_(torch.linspace(0, 1, 23) if sae.threshold.ndim else torch.tensor(0.3))
    if isinstance(activation, Gated):
        sae.r_mag.data.copy_(torch.linspace(0.5, -0.5, 23))
        sae.b_mag.data.copy_(torch.linspace(-0.2, 0.4, 23))
    sae = sae.to(dtype)
    if sae.threshold is not None:
        sae.threshold.data = sae.threshold.data.float()
    return sae.requires_grad_(False)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip(activation, dtype, tmp_path):
    """pitfall_053, 60, 192, 270: thresholds are in the file, in float32; the file's dtype is kept."""
    sae, x = make(activation, dtype), torch.randn(30, 7)
    loaded = SAE.load(sae.save(tmp_path / "a b"))
    assert loaded.dtype == dtype
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert torch.equal(loaded(x), sae(x))
    assert loaded.metadata["hook_name"] == "blocks.1.hook_resid_post"
    if loaded.threshold is not None:
        assert loaded.threshold.dtype == torch.float32
    again = SAE.load(loaded.save(tmp_path / "again"))
    assert torch.equal(again(x), sae(x))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_training_form_round_trip(activation, tmp_path):
    """pitfall_191: the trained k stays available beside the inference form."""
    sae, x = make(activation), torch.randn(30, 7)
    loaded = SAE.load(save_training_form(sae, tmp_path, {}))
    assert loaded.activation == activation
    assert torch.equal(loaded(x), sae(x))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_inference_form_of_the_training_form(activation, tmp_path):
    """Both forms give the same codes, and the first can be made of the second."""
    sae, x = make(activation), torch.randn(30, 7)
    training = SAE.load(save_training_form(sae, tmp_path / "training", {}))
    inference = SAE.load(training.save(tmp_path / "inference"))
    assert torch.equal(inference.encode(x), sae.encode(x))
    assert torch.equal(training.encode(x), sae.encode(x))


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_per_token_normalisation_is_saved(kind, tmp_path):
    """pitfall_135"""
    sae, x = make(TopK(3)), 5 * torch.randn(30, 7) + 2
    plain = sae(x)
    sae.per_token = kind
    config = json.loads((sae.save(tmp_path) / "cfg.json").read_text())
    assert config["normalize_activations"] == kind
    loaded = SAE.load(tmp_path)
    assert torch.equal(loaded(x), sae(x))
    assert not torch.allclose(loaded(x), plain)


def test_own_architectures_are_not_read_as_another(tmp_path):
    """pitfall_197, pitfall_067: who does not know GroupMax must fail, and so do we where the fields are not ours."""
    folder = make(GroupMax(23)).save(tmp_path)
    config = json.loads((folder / "cfg.json").read_text())
    assert config["architecture"] == "groupmax"
    assert config["metadata"]["unweave"]["activation"] == {"type": "groupmax", "k": 23}
    for activation, message in (
        ({"type": "unheard", "k": 3}, "'groupmax', which is none of"),
        ({"type": "groupmax", "k": 23, "size": 3}, "'size', which GroupMax does not know"),
        ({"type": "groupmax"}, "without k"),
    ):
        change(folder, metadata={"unweave": {"activation": activation}})
        with pytest.raises(UnweaveError, match=message):
            SAE.load(folder)


def test_another_tool_may_have_changed_the_architecture(tmp_path):
    """SAELens keeps our metadata when it makes the inference form of a BatchTopK's training form."""
    sae = make(BatchTopK(3))
    metadata = json.loads((save_training_form(sae, tmp_path / "training", {}) / "cfg.json").read_text())["metadata"]
    sae.save(tmp_path / "sae")
    change(tmp_path / "sae", metadata=metadata)
    loaded = SAE.load(tmp_path / "sae")
    assert isinstance(loaded.activation, JumpReLU)
    change(tmp_path / "training", k=5)
    assert SAE.load(tmp_path / "training").activation == BatchTopK(5)


def test_thresholds_that_are_shared_are_one(tmp_path):
    folder = save_training_form(make(JumpReLU(0.2, 0.1, shared=True)), tmp_path, {})
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["threshold"][3] = 0.9
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(UnweaveError, match="latents share one"):
        SAE.load(folder)


def test_thresholds_below_zero(tmp_path):
    """pitfall_055: `relu(pre)` above the threshold, in training as in inference."""
    folder, x = make(JumpReLU()).save(tmp_path), torch.randn(30, 7)
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["threshold"] = torch.linspace(-1, 1, 23)
    save_file(tensors, folder / "sae_weights.safetensors")
    sae = SAE.load(folder)
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    torch.testing.assert_close(sae.encode(x), pre * (pre > tensors["threshold"]))
    torch.testing.assert_close(sae.training_codes(x).codes.to_dense(), sae.encode(x))


def test_logarithms_of_thresholds_are_read(tmp_path):
    """As in older SAELens checkpoints."""
    sae = make(JumpReLU())
    sae.threshold.data.clamp_(min=0.1)
    folder = sae.save(tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, folder / "sae_weights.safetensors")
    torch.testing.assert_close(SAE.load(folder).threshold, sae.threshold)


def test_layout_is_sae_lens(tmp_path):
    config = json.loads((make(BatchTopK(3)).save(tmp_path) / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    assert config["metadata"]["training_architecture"] == "batchtopk"
    assert {"d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations"} <= config.keys()
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        "W_enc": (7, 23), "b_enc": (23,), "W_dec": (23, 7), "b_dec": (7,), "threshold": (23,),
    }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize("write", [SAE.save, lambda sae, folder: save_training_form(sae, folder, {})])
def test_gated_layout_is_sae_lens(write, tmp_path):
    """`b_enc` is called `b_gate` there."""
    sae = make(Gated())
    assert json.loads((write(sae, tmp_path) / "cfg.json").read_text())["architecture"] == "gated"
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        "W_enc": (7, 23), "W_dec": (23, 7), "b_dec": (7,), "b_gate": (23,), "b_mag": (23,), "r_mag": (23,),
    }  # fmt: skip
    assert torch.equal(tensors["b_gate"], sae.b_enc)


def test_a_gated_file_without_its_gate_is_refused(tmp_path):
    folder = make(Gated()).save(tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["b_enc"] = tensors.pop("b_gate")
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(UnweaveError, match="lacks the tensor 'b_gate'"):
        SAE.load(folder)


def test_matryoshka_batchtopk_forms(tmp_path):
    """pitfall_191: JumpReLU for everybody, and the training form with its prefixes; both load and keep them."""
    sae, x = make(BatchTopK(3)), torch.randn(30, 7)
    sae.metadata["matryoshka_widths"] = [4, 10, 23]
    inference = json.loads((sae.save(tmp_path / "sae") / "cfg.json").read_text())
    assert inference["architecture"] == "jumprelu"
    assert inference["metadata"]["training_architecture"] == "matryoshka_batchtopk"
    for folder in (tmp_path / "sae", save_training_form(sae, tmp_path / "training", {})):
        loaded = SAE.load(folder)
        assert torch.equal(loaded(x), sae(x))
        assert loaded.metadata["matryoshka_widths"] == [4, 10, 23]
        assert "unknown_keys" not in loaded.metadata
    training = json.loads((tmp_path / "training" / "cfg.json").read_text())
    assert training["architecture"] == "matryoshka_batchtopk"
    assert (training["k"], training["matryoshka_widths"]) == (3, [4, 10, 23])
    assert training["use_matryoshka_aux_loss"] is False
    again = save_training_form(SAE.load(tmp_path / "training"), tmp_path / "again", {})
    assert json.loads((again / "cfg.json").read_text())["architecture"] == "matryoshka_batchtopk"


def test_ranking_by_decoder_norms_is_folded(tmp_path):
    """pitfall_065"""
    sae = make(TopK(3))
    sae.W_dec.mul_(torch.linspace(0.5, 2, 23)[:, None])
    x = torch.randn(30, 7)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    ranked = pre * sae.W_dec.norm(dim=1)
    codes = pre.relu() * torch.zeros_like(pre).scatter(1, ranked.topk(3, dim=1).indices, 1.0)
    expected = codes @ sae.W_dec + sae.b_dec
    sae.save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"rescale_acts_by_decoder_norm": True}))
    torch.testing.assert_close(SAE.load(tmp_path)(x), expected)


def change(folder, **keys):
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | keys))


def test_equal_saes_have_equal_bytes(tmp_path):
    """pitfall_194: whatever the order in which tensors and metadata were put together."""
    saes = [make(BatchTopK(3)) for _ in range(2)]
    saes[0].metadata |= {"layers": {"b": 1, "a": 2}, "seed": 3}
    saes[1].metadata = {"seed": 3, "layers": {"b": 1, "a": 2}} | saes[1].metadata
    for i, sae in enumerate(saes):
        sae.save(tmp_path / str(i))
    for name in ("sae_weights.safetensors", "cfg.json"):
        texts = [(tmp_path / str(i) / name).read_bytes() for i in range(2)]
        if name == "cfg.json":  # keys of metadata are in the order in which they were given
            texts = [json.dumps(json.loads(text), sort_keys=True).encode() for text in texts]
        assert texts[0] == texts[1]
    tensors = load_file(tmp_path / "0" / "sae_weights.safetensors")
    for order in (sorted(tensors), sorted(tensors, reverse=True)):
        write_tensors(tmp_path / "again.safetensors", {name_: tensors[name_] for name_ in order})
        assert (tmp_path / "again.safetensors").read_bytes() == (
            tmp_path / "0" / "sae_weights.safetensors"
        ).read_bytes()


def test_unknown_keys_are_kept(tmp_path):
    """pitfall_271"""
    change(make(ReLU()).save(tmp_path), favourite_colour="green")
    assert SAE.load(tmp_path).metadata["unknown_keys"] == {"favourite_colour": "green"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architecture": "glu"}, "'glu'"),  # pitfall_067
        ({"d_sae": 22}, "W_dec"),
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
        ({"reshape_activations": "other"}, "other"),
    ],
)
def test_what_is_not_understood_is_refused(keys, message, tmp_path):
    change(make(ReLU()).save(tmp_path), **keys)
    with pytest.raises(UnweaveError, match=message):
        SAE.load(tmp_path)


def test_topk_without_k_is_refused(tmp_path):
    """pitfall_068"""
    folder = make(TopK(3)).save(tmp_path)
    config = json.loads((folder / "cfg.json").read_text())
    del config["k"]
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UnweaveError, match="without k"):
        SAE.load(folder)


def test_damaged_files(tmp_path):
    folder = make(ReLU()).save(tmp_path / "sae")
    weights = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UnweaveError, match="damaged"):
        SAE.load(folder)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(UnweaveError, match="missing"):
        SAE.load(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(UnweaveError, match="not valid JSON"):
        SAE.load(folder)
    with pytest.raises(UnweaveError, match=r"did you mean '.*sae'"):
        SAE.load(tmp_path / "sea")


def test_nan_and_extra_tensors_are_refused(tmp_path):
    folder = make(ReLU()).save(tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"r_mag": torch.ones(23)}, folder / "sae_weights.safetensors")
    with pytest.raises(UnweaveError, match="r_mag"):
        SAE.load(folder)
    tensors["b_dec"][0] = float("nan")
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(UnweaveError, match="b_dec"):
        SAE.load(folder)


def test_uncalibrated_threshold_is_not_saved(tmp_path):
    """pitfall_074"""
    with pytest.raises(UnweaveError, match="threshold"):
        SAE(7, 23, BatchTopK(3)).save(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    """pitfall_186"""
    sae, x = make(ReLU()), torch.randn(3, 7)
    folder = sae.save(tmp_path)

    def no_space(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unweave.sae.files.write_tensors", no_space)
    with pytest.raises(OSError, match="No space"):
        make(TopK(3)).save(folder)
    monkeypatch.undo()
    assert torch.equal(SAE.load(folder)(x), sae(x))
    assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
