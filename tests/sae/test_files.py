import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from unweave._errors import UnweaveError
from unweave.sae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.sae.files import save_training_form

ACTIVATIONS = [ReLU(), TopK(3), BatchTopK(3), JumpReLU(0.2, 0.1), Gated()]


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
        sae.threshold.data.copy_(torch.linspace(0, 1, 23))
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
    """pitfall_053, pitfall_060, pitfall_270: thresholds are in the file, in float32; the file's dtype is kept."""
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
    assert type(loaded.activation) is type(activation)
    assert getattr(loaded.activation, "k", None) == getattr(activation, "k", None)
    assert torch.equal(loaded(x), sae(x))


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


def test_unknown_keys_are_kept(tmp_path):
    """pitfall_271"""
    change(make(ReLU()).save(tmp_path), favourite_colour="green")
    assert SAE.load(tmp_path).metadata["unknown_keys"] == {"favourite_colour": "green"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architecture": "glu"}, "'glu'"),  # pitfall_067
        ({"d_sae": 22}, "W_dec"),
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
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
    with pytest.raises(UnweaveError, match="did you mean 'sae'"):
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
