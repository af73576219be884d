"""What we write in other libraries' formats gives what the SAE gave, is laid out as they say, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from unweave._errors import UnweaveError
from unweave.cli import main
from unweave.hub import convert, formats, read_sae, write_sae
from unweave.hub.conversion import compare
from unweave.sae import (
    SAE,
    AbsTopK,
    Activation,
    BatchTopK,
    Crosscoder,
    CrossLayerTranscoder,
    Gated,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    RawTopK,
    ReLU,
    TopK,
    Transcoder,
)
from unweave.sae.files import save_training_form

D, M = 8, 24
WRITERS = [name for name, made in formats().items() if made.write is not None]


@torch.no_grad()
def randomise(sae: Any) -> Any:
    for name, parameter in sae.named_parameters():
        parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim == 2 else 0.2))
        if name == "threshold":
            parameter.copy_(torch.linspace(0, 0.5, M))
    if isinstance(sae.activation, BatchTopK):
        sae.threshold = torch.tensor(0.4)
    return sae.requires_grad_(False)


def autoencoder(activation: Activation, pre_bias: bool = True, **metadata: Any) -> SAE:
    metadata["hook_name"] = "blocks.3.hook_resid_post"
    return randomise(SAE(D, M, activation, apply_b_dec_to_input=pre_bias, metadata=metadata))  # type: ignore[no-any-return]


def transcoder(activation: Activation, *, skip: bool = False, d_out: int = D, **metadata: Any) -> Transcoder:
    return randomise(Transcoder(D, d_out, M, activation, skip=skip, metadata=metadata))  # type: ignore[no-any-return]


def cross_layer(activation: Activation, *, skip: bool = False, d_out: int = D, **metadata: Any) -> CrossLayerTranscoder:
    reads, writes = ({f"blocks.{i}.{hook}": n for i in range(3)} for hook, n in (("in", D), ("out", d_out)))
    made = CrossLayerTranscoder(reads, writes, M // 3, activation, skip=skip, metadata=metadata)
    return randomise(made)  # type: ignore[no-any-return]


EXPRESSIBLE = {
    "saelens": [autoencoder(ReLU()), autoencoder(Gated()), transcoder(TopK(3), skip=True, d_out=5)],
    "sparsify": [
        autoencoder(TopK(3)), autoencoder(GroupMax(4)), autoencoder(TopK(3), pre_bias=False), transcoder(TopK(3)),
        transcoder(TopK(3), skip=True),
    ],
    "dictionary_learning": [
        autoencoder(ReLU()), autoencoder(ReLU(), pre_bias=False), autoencoder(Gated()), autoencoder(TopK(3)),
        autoencoder(BatchTopK(3)), autoencoder(BatchTopK(3), matryoshka_widths=[6, M]),
        autoencoder(JumpReLU(), pre_bias=False), autoencoder(JumpReLU()), autoencoder(TopK(3), pre_bias=False),
    ],
    "circuit_tracer": [
        transcoder(ReLU()), transcoder(TopK(3), d_out=5), transcoder(JumpReLU(), skip=True),
        autoencoder(ReLU(), pre_bias=False), autoencoder(JumpReLU()), autoencoder(BatchTopK(3)),
        cross_layer(ReLU()), cross_layer(JumpReLU(), skip=True), cross_layer(BatchTopK(3), d_out=5),
    ],
    "saev": [autoencoder(ReLU()), autoencoder(RawTopK(3), pre_bias=False), autoencoder(BatchTopK(3))],
}  # fmt: skip


@pytest.mark.parametrize(("to", "index"), [(to, i) for to, saes in EXPRESSIBLE.items() for i in range(len(saes))])
def test_codes_and_outputs_survive(to: str, index: int, tmp_path: Path) -> None:
    sae = EXPRESSIBLE[to][index]
    result = convert(save_training_form(sae, tmp_path / "ours", {}), tmp_path / "theirs", to=to)
    theirs = read_sae(tmp_path / "theirs")
    assert theirs.metadata.get("source_format", "saelens") == to
    assert 0 < result.before.l0 < M
    assert max(result.codes, result.outputs) < 1e-5
    assert result.flipped == 0
    x = torch.randn(50, sae.d_in) + sae.b_dec[:1]
    torch.testing.assert_close(theirs.encode(x), sae.encode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(x), sae(x), atol=1e-5, rtol=1e-5)
    again = SAE.load(theirs.save(tmp_path / "again"))
    torch.testing.assert_close(again(x), sae(x), atol=1e-5, rtol=1e-5)


def test_every_writer_is_tested() -> None:
    assert set(EXPRESSIBLE) == set(WRITERS)


def layer_normed() -> SAE:
    sae = autoencoder(TopK(3))
    sae.per_token = "layer_norm"
    return sae


@pytest.mark.parametrize(
    ("to", "sae", "message"),
    [
        ("sparsify", autoencoder(ReLU()), "TopK and GroupMax, and not ReLU"),
        ("sparsify", autoencoder(AbsTopK(3)), "not AbsTopK"),
        ("sparsify", transcoder(TopK(3), d_out=5), "reads 8 and writes 5"),
        ("sparsify", layer_normed(), "normalises every token"),
        ("sparsify", randomise(Crosscoder({"a": 4, "b": 4}, M, TopK(3))), "no form for a Crosscoder"),
        ("dictionary_learning", transcoder(ReLU()), "no form for a Transcoder"),
        ("dictionary_learning", autoencoder(GroupMax(4)), "no class for GroupMax"),
        ("dictionary_learning", autoencoder(BatchTopK(2.5)), "whole k only"),
        ("dictionary_learning", SAE(D, M, BatchTopK(3)), "no threshold yet"),
        ("circuit_tracer", transcoder(GroupMax(4)), "not GroupMax"),
        ("circuit_tracer", randomise(Crosscoder({"a": 4, "b": 4}, M, TopK(3))), "no form for a Crosscoder"),
        ("circuit_tracer", cross_layer(TopK(3)), "cross-layer transcoders have ReLU and JumpReLU, and not TopK"),
        ("circuit_tracer", SAE(D, M, BatchTopK(3)), "no threshold yet"),
        ("sparsify", cross_layer(ReLU()), "no form for a CrossLayerTranscoder"),
        ("saev", autoencoder(TopK(3)), r"keeps negative codes \(RawTopK\), not TopK"),
        ("saev", autoencoder(Gated()), "not Gated"),
        ("saev", autoencoder(BatchTopK(2.5)), "whole k only"),
        ("openai", autoencoder(ReLU()), "is read, not written; written are saelens, sparsify"),
    ],
)
def test_what_a_format_cannot_express_is_refused(to: str, sae: SAE, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match=message):
        write_sae(sae, tmp_path, to)
    assert list(tmp_path.iterdir()) == []


def test_sparsify_layout(tmp_path: Path) -> None:
    write_sae(transcoder(TopK(3), skip=True), tmp_path, "sparsify")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "sae.safetensors").items()}
    assert shapes == {
        "encoder.weight": (M, D), "encoder.bias": (M,), "W_dec": (M, D), "b_dec": (D,), "W_skip": (D, D),
    }  # fmt: skip
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["num_latents"], config["transcode"], config["skip_connection"]) == (M, True, True)


def test_several_seeds_of_one_hook(tmp_path: Path) -> None:
    for place in ("layers.10", "layers.10/seed3"):
        folder = write_sae(autoencoder(TopK(3)), tmp_path / place, "sparsify")
        assert read_sae(folder).metadata["hf_hook_name"] == "layers.10"


def test_dictionary_learning_layout(tmp_path: Path) -> None:
    write_sae(autoencoder(BatchTopK(3), matryoshka_widths=[6, M]), tmp_path, "dictionary_learning")
    tensors = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert tensors["k"].dtype == torch.int32
    assert tensors["group_sizes"].tolist() == [6, M - 6]
    assert tensors["W_enc"].shape == (D, M)
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert (trainer["dict_class"], trainer["k"]) == ("MatryoshkaBatchTopKSAE", 3)


def test_saev_layout(tmp_path: Path) -> None:
    """One line of JSON, then a file of PyTorch's; the pre-encoder bias is folded, since schema 5 has none."""
    write_sae(autoencoder(ReLU()), tmp_path, "saev")
    first, rest = (tmp_path / "sae.pt").read_bytes().split(b"\n", 1)
    assert json.loads(first)["schema"] == 5
    assert rest.startswith(b"PK")
    assert not read_sae(tmp_path).apply_b_dec_to_input


def test_a_conversion_that_changes_codes_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = autoencoder(ReLU()).save(tmp_path / "ours")
    monkeypatch.setattr("unweave.hub.saev.with_pre_bias", lambda sae, weights, wanted: weights)
    with pytest.raises(UnweaveError, match="nothing was written"):
        convert(source, tmp_path / "theirs", to="saev")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = autoencoder(TopK(3)).save(tmp_path / "ours")
    with pytest.raises(UnweaveError, match="is not empty"):
        convert(source, source, to="sparsify")
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", to="sparsify")


def test_a_flipped_latent_is_told_from_a_changed_one() -> None:
    before = autoencoder(JumpReLU())
    after = autoencoder(JumpReLU())
    after.load_state_dict(before.state_dict())
    after.W_enc.mul_(1 + 1e-3)
    small = compare(before, after, target="saelens")
    assert 5e-4 < small.codes < 5e-3
    after.load_state_dict(before.state_dict())
    assert after.threshold is not None
    after.threshold.data.mul_(5)
    moved = compare(before, after, target="saelens")
    assert moved.codes == 0
    assert moved.flipped > 0.01


def test_probes_fire_at_every_scale() -> None:
    """Thresholds may be in units of raw activations of any size."""
    sae = autoencoder(JumpReLU())
    assert sae.threshold is not None
    sae.threshold.data.fill_(200.0)
    assert compare(sae, sae, target="saelens").before.l0 > 0
    assert compare(randomise(SAE(D, M, MatchingPursuit(3))), sae, target="saelens").before.l0 > 0


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = autoencoder(TopK(3)).save(tmp_path / "ours")
    assert main(["convert", str(source), str(tmp_path / "theirs"), "--to", "sparsify"]) == 0
    shown = capsys.readouterr().out
    assert "after (sparsify)" in shown
    assert "reconstruction error" in shown
    assert (tmp_path / "theirs" / "cfg.json").is_file()
    assert main(["convert", str(source), str(tmp_path / "other"), "--to", "saev"]) == 2
    assert "RawTopK" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_hints_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A saev file of before August 2025 needs a mean and a scale, which no file says."""
    weights = {"W_enc": torch.randn(D, M), "b_enc": torch.randn(M), "W_dec": torch.randn(M, D), "b_dec": torch.ones(D)}
    with (path := tmp_path / "sae.pt").open("wb") as file:
        file.write(b'{"d_vit": 8}\n')
        torch.save(weights, file)
    np.save(tmp_path / "mean.npy", np.arange(8, dtype=np.float32))
    made = tmp_path / "made"
    call = ["convert", str(path), str(made), "--to", "saelens", "--hint", "scale=2.5", "--hint"]
    assert main([*call, f"mean={tmp_path / 'mean.npy'}"]) == 0
    expected = read_sae(path, mean=torch.arange(8.0), scale=2.5)
    assert torch.equal(read_sae(made).W_enc, expected.W_enc)
    assert torch.equal(read_sae(made).b_enc, expected.b_enc)
    call[2] = str(tmp_path / "other")
    for hints, message in {
        "mean=[1,2]": "mean has the shape (2,)", "mean": "has the form KEY=VALUE", "scale=3": "is given twice",
        "means=[1]": "there is no hint 'means'; did you mean 'mean'", "to=saev": "there is no hint 'to'",
        "position=a": "files of the format saev leave nothing open that is called 'position'",
        "mean=none.npy": "cannot be read as an array",
    }.items():  # fmt: skip
        assert main([*call, hints]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert main(["info", str(path), "--hint", "normalized=true", "--hint", "repo=me/there"]) == 0
    assert "saev" in capsys.readouterr().out
    assert main([*call, "k=3", "--k", "4"]) == 2
    assert "k is 4 and, as a hint, 3" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("to", "lost"),
    [
        ("saelens", None), ("sparsify", "hf_hook_name, hook_name, model_name, dataset_path"),
        ("dictionary_learning", "hf_hook_name, hook_name, dataset_path"),
        ("circuit_tracer", "hf_hook_name, dataset_path"),
        ("saev", "hf_hook_name, hook_name, model_name, dataset_path"),
    ],
)  # fmt: skip
def test_what_a_target_has_no_place_for_is_said(to: str, lost: str | None, tmp_path: Path) -> None:
    activation = {"sparsify": TopK(3)}.get(to, ReLU())
    sae = autoencoder(activation, model_name="gpt2", dataset_path="text", hf_hook_name="transformer.h.3")
    notes = convert(sae.save(tmp_path / "ours"), tmp_path / "theirs", to=to).notes
    assert notes[:1] == ([] if lost is None else [f"files of {to} have no place for these metadata: {lost}"])
    assert (len(notes) > 1) == (to == "circuit_tracer")
    if to == "circuit_tracer":  # whose readers take an SAE for a transcoder from its hook to itself
        place = "'blocks.3.hook_resid_post'"
        assert notes[1] == f"the hook_name_out is {place} to readers of circuit_tracer, and it was not known"


def test_notes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = autoencoder(TopK(3), model_name="gpt2", hf_hook_name="transformer.h.3").save(tmp_path / "ours")
    assert main(["convert", str(source), str(tmp_path / "layers.3"), "--to", "sparsify"]) == 0
    shown = capsys.readouterr().out
    assert "note: files of sparsify have no place for these metadata: hook_name, model_name\n" in shown
    assert "note: the hf_hook_name is 'layers.3' to readers of sparsify, and it was 'transformer.h.3'\n" in shown


def test_a_layout_that_sae_lens_reads_with_an_architecture_that_it_does_not(tmp_path: Path) -> None:
    source = autoencoder(GroupMax(4)).save(tmp_path / "ours")
    (note,) = convert(source, tmp_path / "theirs", to="saelens").notes
    assert note.startswith("SAELens has no architecture 'groupmax' and refuses these files")
    assert convert(autoencoder(TopK(3)).save(tmp_path / "b"), tmp_path / "c", to="saelens").notes == []


def test_the_format_that_was_read_is_named_and_not_one_of_before(tmp_path: Path) -> None:
    convert(autoencoder(TopK(3)).save(tmp_path / "a"), tmp_path / "b", to="sparsify")
    convert(tmp_path / "b", tmp_path / "c", to="saelens")
    assert convert(tmp_path / "b", tmp_path / "d", to="dictionary_learning").source == "sparsify"
    assert convert(tmp_path / "c", tmp_path / "e", to="dictionary_learning").source == "saelens"


def test_circuit_tracer_s_layers_of_a_cross_layer_transcoder(tmp_path: Path) -> None:
    """An autoencoder reads and writes at one hook; of several layers the hooks' common part is what the config says."""
    write_sae(cross_layer(JumpReLU(), model_name="gpt2", d_out=5), tmp_path / "clt", "circuit_tracer")
    decoders = [load_file(tmp_path / "clt" / f"W_dec_{i}.safetensors")[f"W_dec_{i}"] for i in range(3)]
    assert [tuple(decoder.shape) for decoder in decoders] == [(M // 3, 3 - i, 5) for i in range(3)]
    config = yaml.safe_load((tmp_path / "clt" / "config.yaml").read_text())
    assert config == {"model_name": "gpt2", "feature_input_hook": "in", "feature_output_hook": "out"}
    write_sae(autoencoder(ReLU()), tmp_path / "sae", "circuit_tracer")
    read = read_sae(tmp_path / "sae").metadata
    assert (read["hook_name"], read["hook_name_out"]) == 2 * ("blocks.3.hook_resid_post",)


@pytest.mark.parametrize(
    ("name", "is_hook"),
    [("layers.10", True), ("model.layers.3.mlp", True), ("h.0", True), ("embed_tokens", True), ("wte", True),
     ("sae-2b", False), ("sparsify2", False), ("v1.2-final", False), ("run_3", False)],
)  # fmt: skip
def test_a_folder_s_name_is_a_hook_if_it_is_a_module_s(name: str, is_hook: bool, tmp_path: Path) -> None:
    folder = write_sae(autoencoder(TopK(3)), tmp_path / name, "sparsify")
    assert read_sae(folder).metadata.get("hf_hook_name") == (name if is_hook else None)


def test_help_names_the_formats_that_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in WRITERS)


def test_circuit_tracer_s_config_lists_the_layers(tmp_path: Path) -> None:
    for layer in (10, 2):
        reads, writes = f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out"
        metadata: dict[str, Any] = {"model_name": "gpt2", "hook_name": reads, "hook_name_out": writes}
        write_sae(transcoder(TopK(3), **metadata), tmp_path, "circuit_tracer")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert [(entry["layer"], entry["filepath"]) for entry in config["transcoders"]] == [
        (2, "layer_2.safetensors"), (10, "layer_10.safetensors")
    ]  # fmt: skip
    assert (config["model_name"], config["feature_input_hook"]) == ("gpt2", "ln2.hook_normalized")
    assert read_sae(tmp_path, layer=10).metadata["hook_name"] == "blocks.10.ln2.hook_normalized"
