"""What SAELens 3 to 5 left undecided, and what it got wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unweave._errors import UnweaveError
from unweave.hub import read_sae
from unweave.sae import JumpReLU, TanhReLU, TopK

D, M = 6, 10


def legacy(folder: Path, tensors: dict[str, Any] | None = None, **keys: Any) -> Path:
    weights = {
        "W_enc": torch.randn(D, M), "b_enc": torch.randn(M), "W_dec": torch.randn(M, D), "b_dec": torch.randn(D),
    }  # fmt: skip
    config = {"architecture": "standard", "d_in": D, "d_sae": M, "hook_name": "blocks.3.attn.hook_z"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config | keys))
    save_file(weights | (tensors or {}), folder / "sae_weights.safetensors")
    return folder


SCALED = {"normalize_activations": "expected_average_only_in"}


def test_a_factor_in_no_file_is_asked_for(tmp_path: Path) -> None:
    """pitfall_132, pitfall_272"""
    folder = legacy(tmp_path / "1000", **SCALED)
    with pytest.raises(UnweaveError, match="pass norm_scaling_factor="):
        read_sae(folder)
    plain, scaled = read_sae(folder, norm_scaling_factor=1), read_sae(folder, norm_scaling_factor=0.5)
    x = torch.randn(20, D)
    torch.testing.assert_close(scaled(2 * x), 2 * plain(x))
    torch.testing.assert_close(scaled.encode(2 * x), plain.encode(x))


def test_true_means_scaled(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="norm_scaling_factor"):
        read_sae(legacy(tmp_path / "1000", normalize_activations=True))


def test_a_finished_run_is_never_folded_twice(tmp_path: Path) -> None:
    """pitfall: its config says `expected_average_only_in` after the fold, too."""
    folder = legacy(tmp_path / "final_1000", **SCALED)
    state = {"n_dataset_processed": torch.tensor(3)}
    save_file(state, folder / "activations_store_state.safetensors")
    assert torch.equal(read_sae(folder).W_dec, load_file(folder / "sae_weights.safetensors")["W_dec"])


@pytest.mark.parametrize(("norm", "warns"), [(1.0, True), (2.5, False)])
def test_unit_rows_after_the_fold_are_pointed_out(tmp_path: Path, norm: float, warns: bool) -> None:
    """pitfall D-TR-2: rows that were held at norm 1 have the norm 1/scale, unless they were normalised once more."""
    rows = torch.nn.functional.normalize(torch.randn(M, D), dim=1) * norm
    folder = legacy(tmp_path / "final_1000", {"W_dec": rows}, **SCALED, normalize_sae_decoder=True)
    if warns:
        with pytest.warns(UserWarning, match="decoded too large"):
            read_sae(folder)
    else:
        read_sae(folder)


def test_tanh_is_kept_and_topk_needs_its_k(tmp_path: Path) -> None:
    """pitfall D-SA-5"""
    assert read_sae(legacy(tmp_path / "a", activation_fn_str="tanh-relu")).activation == TanhReLU()
    topk = legacy(tmp_path / "b", activation_fn_str="topk", activation_fn_kwargs={"k": 3}, architecture="standard")
    assert read_sae(topk).activation == TopK(3)
    with pytest.raises(UnweaveError, match="without k"):
        read_sae(legacy(tmp_path / "c", activation_fn_str="topk", activation_fn_kwargs={}))
    with pytest.raises(UnweaveError, match="'gelu', which is none of relu, tanh-relu, topk"):
        read_sae(legacy(tmp_path / "d", activation_fn_str="gelu"))
    with pytest.raises(UnweaveError, match="jumprelu SAE of tanh-relu"):
        read_sae(
            legacy(tmp_path / "e", {"threshold": torch.ones(M)}, activation_fn_str="tanh-relu", architecture="jumprelu")
        )


def test_what_the_config_knew_is_kept(tmp_path: Path) -> None:
    sae = read_sae(legacy(tmp_path, {"threshold": torch.ones(M)}, architecture="jumprelu", prepend_bos=False, seed=3))
    assert isinstance(sae.activation, JumpReLU)
    assert sae.metadata["hook_name"] == "blocks.3.attn.hook_z"
    assert sae.metadata["prepend_bos"] is False
    assert sae.metadata["seed"] == 3
    assert json.loads((sae.save(tmp_path / "new") / "cfg.json").read_text())["reshape_activations"] == "hook_z"


@pytest.mark.parametrize(("version", "is_old"), [("5.10.1", True), ("6.0.0-rc.0", False), ("6.54.12", False)])
def test_the_version_decides(tmp_path: Path, version: str, is_old: bool) -> None:
    """`apply_b_dec_to_input` has a default in old files and is demanded of new ones."""
    folder = legacy(tmp_path, sae_lens_version=version)
    if is_old:
        assert read_sae(folder).apply_b_dec_to_input
    else:
        with pytest.raises(UnweaveError, match="apply_b_dec_to_input"):
            read_sae(folder)


def test_a_factor_of_the_wrong_length(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match=r"finetuning_scaling_factor has the shape \(3,\)"):
        read_sae(legacy(tmp_path, {"finetuning_scaling_factor": torch.full((3,), 2.0)}))


def test_a_file_of_the_folder_stands_for_it(tmp_path: Path) -> None:
    folder = legacy(tmp_path / "old")
    ours = read_sae(folder).save(tmp_path / "new")
    x = torch.randn(20, D)
    for place in (folder, ours):
        for name in ("cfg.json", "sae_weights.safetensors"):
            assert torch.equal(read_sae(place / name)(x), read_sae(ours)(x))
