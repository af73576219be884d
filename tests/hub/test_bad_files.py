"""Files that lie, are broken, or want to run something; each is refused with a sentence that says what is wrong."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from unweave._errors import UnweaveError
from unweave.hub import describe_sae, formats, read_sae
from unweave.hub.layout import take
from unweave.sae import SAE, ReLU

D, M = 6, 10


class Code:
    """What a pickle may hold."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def linear() -> dict[str, torch.Tensor]:
    return {
        "encoder.weight": torch.randn(M, D), "encoder.bias": torch.randn(M), "decoder.weight": torch.randn(D, M),
        "bias": torch.randn(D),
    }  # fmt: skip


def dictionary(folder: Path, tensors: Any, **trainer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"} | trainer}))
    torch.save(tensors, folder / "ae.pt")
    return folder


def sparsify(folder: Path, **keys: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "encoder.weight": torch.randn(M, D), "encoder.bias": torch.randn(M), "W_dec": torch.randn(M, D),
        "b_dec": torch.randn(D),
    }  # fmt: skip
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": M, "k": 2} | keys))
    return folder


@pytest.mark.parametrize("name", ["ae.pt", "sae.pth"])
def test_code_is_never_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pitfall_269"""
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder.weight": Code()}, tmp_path / name)
    with pytest.raises(UnweaveError, match="is a pickle with code in it"):
        read_sae(tmp_path / name)
    torch.save(Code(), tmp_path / name, _use_new_zipfile_serialization=False)
    with pytest.raises(UnweaveError, match="is a pickle with code in it"):
        read_sae(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_python_objects_in_an_npz(tmp_path: Path) -> None:
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
        with pytest.raises(UnweaveError, match=r"damaged: (it holds Python objects|Object arrays cannot be loaded)"):
            read_sae(tmp_path)


def write_npz(folder: Path) -> Path:
    path = folder / "params.npz"
    shapes = {"W_enc": (D, M), "b_enc": (M,), "W_dec": (M, D), "b_dec": (D,), "threshold": (M,)}
    np.savez(path, **{name: np.random.rand(*shape).astype(np.float32) for name, shape in shapes.items()})
    return path


def write_pt(folder: Path) -> Path:
    return dictionary(folder, linear()) / "ae.pt"


def write_saev(folder: Path) -> Path:
    SAE(D, M, ReLU()).save(folder / "ours")
    with (path := folder / "sae.pt").open("wb") as file:
        file.write(b'{"schema": 5, "cfg": {"d_model": 6, "d_sae": 10, "activation": {"cls": "Relu"}}}\n')
        torch.save(
            {"W_enc": torch.ones(D, M), "b_enc": torch.ones(M), "W_dec": torch.ones(M, D), "b_dec": torch.ones(D)}, file
        )
    return path


def write_safetensors(folder: Path) -> Path:
    return sparsify(folder) / "sae.safetensors"


@pytest.mark.parametrize("write", [write_npz, write_pt, write_saev, write_safetensors])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_files(write: Any, keep: float, tmp_path: Path) -> None:
    path = write(tmp_path)
    read_sae(path if write is not write_safetensors else tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UnweaveError, match=r"damaged|of a format that is known|code in it"):
        read_sae(path if write is not write_safetensors else tmp_path)


def test_shapes_are_compared_with_the_config(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match=r"encoder.weight.*\(10, 6\), and \(d_sae=11, d_in=6\) was expected"):
        read_sae(sparsify(tmp_path / "a", num_latents=11))
    with pytest.raises(UnweaveError, match=r"encoder.weight.*\(10, 6\), and \(d_sae=10, d_in=7\) was expected"):
        read_sae(sparsify(tmp_path / "b", d_in=7))
    with pytest.raises(UnweaveError, match=r"encoder.weight.*\(d_sae=10, d_in=5\)"):
        read_sae(dictionary(tmp_path / "c", linear(), activation_dim=5, dict_size=M))
    with pytest.raises(UnweaveError, match=r"decoder.weight.*\(10, 6\), and \(d_in=6, d_sae=10\)"):
        read_sae(dictionary(tmp_path / "d", linear() | {"decoder.weight": torch.randn(M, D)}))


def test_tensors_that_are_missing_unknown_or_not_finite(tmp_path: Path) -> None:
    tensors = linear()
    with pytest.raises(UnweaveError, match="lacks the tensor 'bias'"):
        read_sae(dictionary(tmp_path / "a", {k: v for k, v in tensors.items() if k != "bias"}))
    with pytest.raises(UnweaveError, match="holds the tensor 'gain'"):
        read_sae(dictionary(tmp_path / "b", tensors | {"gain": torch.ones(M)}))
    tensors["decoder.weight"][2, 3] = float("inf")
    with pytest.raises(UnweaveError, match=r"W_dec.*not finite"):
        read_sae(dictionary(tmp_path / "c", tensors))
    with pytest.raises(UnweaveError, match="no dictionary of tensors"):
        read_sae(dictionary(tmp_path / "d", linear() | {"name": "x"}))
    with pytest.raises(UnweaveError, match=r"stored as torch\.float8_e5m2"):
        read_sae(dictionary(tmp_path / "e", {n: t.to(torch.float8_e5m2) for n, t in linear().items()}))


@pytest.mark.parametrize("name", ["../layer_3.safetensors", "/etc/layer_3.safetensors", "a/../../x", "C:\\x", "..\\x"])
def test_a_path_that_leaves_its_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "sub"
    folder.mkdir()
    for place in (tmp_path, folder):
        save_file({"W_enc": torch.ones(M, D)}, place / "layer_3.safetensors")
    entry = {"layer": 3, "filepath": name}
    (folder / "config.yaml").write_text(yaml.safe_dump({"transcoders": [entry]}))
    with pytest.raises(UnweaveError, match="outside of its folder"):
        read_sae(folder, layer=3)


def test_yaml_runs_nothing(tmp_path: Path) -> None:
    save_file({"W_enc": torch.ones(M, D)}, tmp_path / "layer_3.safetensors")
    (tmp_path / "config.yaml").write_text("!!python/object/apply:os.system ['touch executed']")
    with pytest.raises(UnweaveError, match="not valid YAML"):
        read_sae(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"activation": "gelu"}, "'gelu', which is none of topk, groupmax"),
        ({"k": None}, "no whole number 'k'"),
        ({"skip_connection": True}, "skip_connection=True, unlike its tensors"),
    ],
)
def test_sparsify_that_is_not_understood(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match=message):
        read_sae(sparsify(tmp_path, **keys))


def test_classes_that_are_not_known_or_not_said(tmp_path: Path) -> None:
    """pitfall_197"""
    with pytest.raises(UnweaveError, match="'AutoEncoderTopk'; did you mean 'AutoEncoderTopK'"):
        read_sae(dictionary(tmp_path / "a", linear(), dict_class="AutoEncoderTopk"))
    tensors = linear()
    tensors["b_dec"] = tensors.pop("bias")
    torch.save(tensors, tmp_path / "ae.pt")
    with pytest.raises(UnweaveError, match="pass dict_class=, one of AutoEncoderTopK, BatchTopKSAE"):
        read_sae(tmp_path / "ae.pt")
    with pytest.raises(UnweaveError, match="does not say its k"):
        read_sae(tmp_path / "ae.pt", dict_class="AutoEncoderTopK")
    assert read_sae(tmp_path / "ae.pt", dict_class="AutoEncoderTopK", k=3).activation.k == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("version", ["6.54.12", None])
def test_an_unknown_architecture_is_answered_with_the_known(version: str | None, tmp_path: Path) -> None:
    config = json.loads((SAE(D, M, ReLU()).save(tmp_path) / "cfg.json").read_text())
    if version is None:  # as versions 3 to 5 have it
        del config["metadata"]
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"architecture": "kronecker"}))
    for read in (read_sae, describe_sae):
        with pytest.raises(UnweaveError, match="architecture 'kronecker', which is none of standard, ") as error:
            read(tmp_path)
        known = ("topk", "batchtopk", "jumprelu", "gated")
        assert all(name in str(error.value) for name in known)


@pytest.mark.parametrize("activation", ["Identity", "Gelu"])
def test_openai_activations_that_no_sae_has(activation: str, tmp_path: Path) -> None:
    tensors = linear()
    value = {
        "pre_bias": tensors.pop("bias"),
        "latent_bias": tensors.pop("encoder.bias"),
        **tensors,
        "activation": activation,
    }
    torch.save(value, tmp_path / "3.pt")
    with pytest.raises(UnweaveError, match=f"activation '{activation}'"):
        read_sae(tmp_path / "3.pt")


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"sae_type": "lorsa"}, {}, "'lorsa', which is low-rank sparse attention, .*; read are sae, crosscoder, clt"),
        ({"sae_type": "molt"}, {}, "'molt', which is a mixture of linear transforms, .*; read are sae"),
        ({"sae_type": "transcoder9"}, {}, "'transcoder9', which is nothing that is known; read are sae"),
        ({"act_fn": "prolu"}, {}, "act_fn 'prolu', which is none of"),
        ({"norm_activation": "batch-wise"}, {}, "batch-wise"),
        ({"norm_activation": "dataset-wise"}, {}, r"no dataset_average_activation_norm\.a"),
        ({}, {"W_E_glu": torch.ones(D, M)}, "lacks the tensor 'b_E_glu'"),
        ({"sae_type": "crosscoder"}, {"W_E_glu": torch.ones(D, M)}, "GLU.*no crosscoder here computes"),
        ({"sae_type": "clt"}, {"W_E_glu": torch.ones(D, M)}, "GLU.*no clt here computes"),
        ({"sae_type": "crosscoder", "sparsity_include_decoder_norm": True, "act_fn": "jumprelu"}, {}, "head by head"),
        ({"sae_type": "clt", "act_fn": "topk", "top_k": 2}, {}, "over all layers together"),
    ],
)
def test_llamascopium_that_no_sae_computes(
    keys: dict[str, Any], tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    config = {"sae_type": "sae", "d_model": D, "hook_point_in": "a", "hook_point_out": "a", "act_fn": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    weights = {"W_E": torch.ones(D, M), "b_E": torch.ones(M), "W_D": torch.ones(M, D), "b_D": torch.ones(D)}
    save_file(weights | tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(UnweaveError, match=message):
        read_sae(tmp_path)


@pytest.mark.parametrize("read", [read_sae, describe_sae])
@pytest.mark.parametrize("place", ["sae_weights.dcp", "checkpoints/final.dcp"])
@pytest.mark.parametrize("files", [[".metadata"], [".metadata", "__0_0.distcp"]])
def test_a_distributed_checkpoint_is_named(read: Any, place: str, files: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"sae_type": "sae", "d_model": D}))
    (tmp_path / place).mkdir(parents=True)
    for name in files:
        (tmp_path / place / name).write_bytes(b"\x80")
    name = Path(place).name
    with pytest.raises(UnweaveError, match=rf"has its weights in '{name}', a distributed checkpoint of PyTorch, whose"):
        read(tmp_path)


def test_overcomplete_where_it_is_not_safe(tmp_path: Path) -> None:
    tensors = {
        "encoder.final_block.0.weight": torch.randn(M, D), "encoder.final_block.0.bias": torch.randn(M),
        "dictionary._weights": torch.nn.functional.normalize(torch.randn(M, D), dim=1),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "sae.pt")
    with pytest.raises(UnweaveError, match="pass activation="):
        read_sae(tmp_path)
    plain = read_sae(tmp_path, activation=ReLU())
    torch.save(tensors | {"dictionary._weights": 3 * tensors["dictionary._weights"]}, tmp_path / "sae.pt")
    with pytest.raises(UnweaveError, match=r"norms from 3 to 3.*pass normalization="):
        read_sae(tmp_path, activation=ReLU())
    torch.testing.assert_close(read_sae(tmp_path, activation=ReLU(), normalization="l2").W_dec, plain.W_dec)
    torch.testing.assert_close(read_sae(tmp_path, activation=ReLU(), normalization="identity").W_dec, 3 * plain.W_dec)
    tied = {"encoder.weight": torch.ones(M, D), "dictionary._weights": tensors["dictionary._weights"]}
    torch.save(tied, tmp_path / "sae.pt")
    with pytest.raises(UnweaveError, match="is tied to its dictionary"):
        read_sae(tmp_path, activation=ReLU())
    torch.save(tensors | {"encoder.final_block.1.running_mean": torch.ones(M)}, tmp_path / "sae.pt")
    with pytest.raises(UnweaveError, match="more than one linear layer"):
        read_sae(tmp_path, activation=ReLU())


def test_a_clt_in_pieces(tmp_path: Path) -> None:
    names = {"w_enc": (D, M), "b_enc": (M,), "b_dec": (D,), "threshold": (M,), "w_dec": (M, 2, D)}
    tensors = {name: torch.ones(shape) for name, shape in names.items()}
    for i in (0, 2):
        save_file(tensors, tmp_path / f"params_layer_{i}.safetensors")
    with pytest.raises(UnweaveError, match="give the folder"):
        read_sae(tmp_path / "params_layer_0.safetensors")
    with pytest.raises(UnweaveError, match=r"lacks the file 'params_layer_1\.safetensors'"):
        read_sae(tmp_path)
    (tmp_path / "params_layer_2.safetensors").rename(tmp_path / "params_layer_1.safetensors")
    read_sae(tmp_path)
    save_file(tensors | {"affine_skip_connection": torch.ones(D, D)}, tmp_path / "params_layer_1.safetensors")
    with pytest.raises(UnweaveError, match=r"some layers of .* have a 'skip', and others have none"):
        read_sae(tmp_path)
    save_file(tensors | {"w_dec": torch.ones(M, 3, D)}, tmp_path / "params_layer_1.safetensors")
    with pytest.raises(UnweaveError, match="2 or 1 targets"):
        read_sae(tmp_path)


@pytest.mark.parametrize(
    ("schema", "activation", "says"),
    [(1, {"cls": "Relu", "params": {}}, "still subtracted"), (2, {"cls": "Relu", "params": {}}, "it is not"),
     (1, None, None), (3, {"cls": "Relu", "params": {}}, None)],
)  # fmt: skip
def test_saev_of_the_day_of_the_change(schema: int, activation: Any, says: str | None, tmp_path: Path) -> None:
    """pitfall_141"""
    path = write_saev(tmp_path)
    config = {"d_vit": D} | ({} if activation is None else {"activation": activation})
    header = json.dumps({"schema": schema, "cfg": config, "cls": "Relu"}).encode()
    path.write_bytes(header + b"\n" + path.read_bytes().split(b"\n", 1)[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sae = read_sae(path, normalized=True if schema == 1 else None)
    assert sae.apply_b_dec_to_input is (schema == 1)
    assert [str(w.message) for w in caught if "31 July 2025" in str(w.message)] == [str(w.message) for w in caught]
    assert len(caught) == (says is not None)
    assert says is None or says in str(caught[0].message)


def test_saev_of_before_august_2025_needs_what_no_file_has(tmp_path: Path) -> None:
    """pitfall_142, pitfall_187"""
    path = write_saev(tmp_path)
    body = path.read_bytes().split(b"\n", 1)[1]
    path.write_bytes(b'{"d_vit": 6, "seed": 0}\n' + body)
    with pytest.raises(UnweaveError, match="pass mean= and scale="):
        read_sae(path)
    path.write_bytes(b'{"schema": 9, "cfg": {}}\n' + body)
    with pytest.raises(UnweaveError, match="schema 9"):
        read_sae(path)


def test_several_saes_in_a_folder_are_listed(tmp_path: Path) -> None:
    for i in range(7):
        save_file({"W_enc": torch.ones(M, D)}, tmp_path / f"layer_{i}.safetensors")
    with pytest.raises(UnweaveError, match=r"holds several SAEs \(layer_0\.safetensors, .*, \.\.\.\)"):
        read_sae(tmp_path)


def test_hints_and_formats_that_are_not_known(tmp_path: Path) -> None:
    folder = sparsify(tmp_path / "sae")
    with pytest.raises(UnweaveError, match="'norm_scaling_factor'; what may be said is repo"):
        read_sae(folder, norm_scaling_factor=2)
    with pytest.raises(UnweaveError, match="no format 'sparsfy'; did you mean 'sparsify'"):
        read_sae(folder, format="sparsfy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnweaveError, match="Known are: ") as failure:
        read_sae(tmp_path / "empty")
    assert all(name in str(failure.value) for name in formats())
    with pytest.raises(UnweaveError, match=r"did you mean '.*sae'"):
        read_sae(tmp_path / "sea")


def test_a_square_layout_is_refused_where_it_is_not_square() -> None:
    with pytest.raises(UnweaveError, match="should be square"):
        take({"S": torch.ones(3, 4)}, {"W_skip": "S d d"}, "here")


@pytest.mark.parametrize("square", [False, True])
def test_orientation_follows_from_the_table(square: bool) -> None:
    """pitfall_263, pitfall_279: also where the shape would not tell."""
    d, m = (4, 4) if square else (4, 7)
    stored = {"e": torch.randn(m, d), "f": torch.randn(d, m), "g": torch.randn(m, d), "s": torch.randn(d, d)}
    kept = dict(stored)
    layout = {"W_enc": "e M d", "W_dec": "f d M", "W_skip": "s d o"}
    taken = take({k: v for k, v in stored.items() if k != "g"}, layout, "here")
    assert torch.equal(taken["W_enc"], kept["e"].T)
    assert torch.equal(taken["W_dec"], kept["f"].T)
    assert torch.equal(taken["W_skip"], kept["s"].T)
    taken = take(
        {"e": kept["f"], "g": kept["g"], "s": kept["s"]},
        {"W_enc": "e d M", "W_dec": "g M o", "W_skip": "s o d"},
        "here",
    )
    assert torch.equal(taken["W_enc"], kept["f"])
    assert torch.equal(taken["W_dec"], kept["g"])
    assert torch.equal(taken["W_skip"], kept["s"])


@pytest.mark.parametrize("read", [read_sae, describe_sae])
@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("sae_weights.safetensors", {"sae_type": "sae", "act_fn": "topk"}, "lacks the key 'top_k'"),
        ("sae_weights.safetensors", {"sae_type": "sae", "act_fn": "topk", "top_k": "many"}, "of the wrong kind.*many"),
        ("sae_weights.safetensors", {"sae_type": ["sae"]}, "of the wrong kind"),
    ],
)
def test_a_config_with_holes_or_other_values(
    read: Any, name: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """pitfall_272"""
    tensors = {"W_E": torch.randn(6, 10), "b_E": torch.randn(10), "W_D": torch.randn(10, 6), "b_D": torch.randn(6)}
    save_file(tensors, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnweaveError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("key", ["d_model", "act_fn", "norm_activation", "dataset_average_activation_norm"])
def test_llama_scope_without_what_its_scale_follows_from(key: str, tmp_path: Path) -> None:
    """pitfall_132, pitfall_272: whether inputs were scaled, and by what, is not guessed."""
    config = {
        "d_model": 6, "d_sae": 10, "act_fn": "jumprelu", "jump_relu_threshold": 0.5, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 2.0, "out": 2.0}, "hook_point_in": "blocks.3.hook_resid_post",
        "hook_point_out": "blocks.3.hook_resid_post",
    }  # fmt: skip
    weights = {"encoder.weight": torch.randn(10, 6), "encoder.bias": torch.ones(10), "decoder.weight": torch.ones(6, M)}
    save_file(weights, tmp_path / "final.safetensors")
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    assert read_sae(tmp_path).d_sae == 10
    del config[key]
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    with pytest.raises(UnweaveError, match=key):
        read_sae(tmp_path)


def test_metadata_and_hints_of_another_kind(tmp_path: Path) -> None:
    SAE(6, 10, ReLU()).save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"metadata": ["gpt2"]}))
    with pytest.raises(UnweaveError, match="of the wrong kind"):
        read_sae(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"normalize_activations": "expected_average_only_in"}))
    with pytest.raises(UnweaveError, match=r"of the wrong kind.*twice"):
        read_sae(tmp_path, norm_scaling_factor="twice")


def test_negative_thresholds_of_circuit_tracer_are_refused(tmp_path: Path) -> None:
    """Its JumpReLU has no ReLU, so codes between the threshold and 0 are negative."""
    tensors = {
        "W_enc": torch.randn(10, 6),
        "b_enc": torch.randn(10),
        "W_dec": torch.randn(10, 6),
        "b_dec": torch.randn(6),
    }
    for sign in (1, -1):
        save_file(
            tensors | {"activation_function.threshold": torch.full((10,), sign * 0.1)}, tmp_path / "layer_0.safetensors"
        )
        if sign > 0:
            assert read_sae(tmp_path).threshold is not None
        else:
            with pytest.raises(UnweaveError, match="thresholds below 0"):
                read_sae(tmp_path)


def test_the_mean_of_another_width(tmp_path: Path) -> None:
    buffer = tmp_path / "sae.pt"
    tensors = {
        "W_enc": torch.randn(6, 10),
        "b_enc": torch.randn(10),
        "W_dec": torch.randn(10, 6),
        "b_dec": torch.randn(6),
    }
    torch.save(tensors, buffer)
    buffer.write_bytes(b'{"d_vit": 6}\n' + buffer.read_bytes())
    with pytest.raises(UnweaveError, match=r"mean has the shape \(2,\), and .* takes \(6,\)"):
        read_sae(buffer, mean=[1.0, 2.0], scale=1.0)
