"""A release of each format of the directory, laid on the hub as its repository has it, loads with its authors' numbers.

That is: the files that we ask for are those that the format's reader takes, under the names that the directory gives.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from unweave import SAE
from unweave.hub import sae_info
from unweave.hub.published import directory


def _cases() -> dict[str, tuple[str, Callable[[Path], Any]]]:
    """How each format is written, from the tests of the readers beside this file."""
    name = "unweave_test_published"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("test_published.py"))
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    cases: dict[str, tuple[str, Callable[[Path], Any]]] = module.CASES
    return cases


CASES = _cases()
RELEASES = {  # case, release, what only these small stand-ins need to be told
    "saelens_legacy_gated": ("gpt2-small-resid-post-v5-32k", {}),
    "gemma_scope_residual": ("gemma-scope-9b-pt-res-canonical", {}),
    "gemma_scope_transcoder": ("gemma-scope-2b-pt-transcoders", {}),
    "gemma_scope_2_residual_without_config": ("gemma-scope-2-1b-pt-res", {}),
    "gemma_scope_2_affine_transcoder": ("gemma-scope-2-270m-it-transcoders", {}),
    "llama_scope": ("llama_scope_lxr_8x", {}),
    "llama_scope_r1": ("llama_scope_r1_distill", {}),
    "dictionary_learning_topk": ("gpt-oss-20b-andyrdt", {}),
    "qwen_scope": ("qwen-scope-3-1.7b-base-w32k-l50", {"k": 6}),
    "goodfire": ("goodfire-llama-3.1-8b-instruct", {}),
    "deepseek_r1": ("deepseek-r1-distill-llama-8b-qresearch", {}),
    "temporal": ("temporal-sae-gemma-2-2b", {"norm_scaling_factor": 0.3}),
    "mwhanna_transcoder": ("mwhanna-qwen3-4b-transcoders", {}),
    "hook_z": ("gpt2-small-hook-z-kk", {}),
}
SINGLE_FILES = {"qwen_scope", "goodfire", "deepseek_r1", "mwhanna_transcoder", "hook_z"}


def test_every_format_of_the_directory_is_here() -> None:
    refused = {"clt_layer_transcoder"}  # one layer of a cross-layer transcoder
    assert {directory()[release].format for release, _ in RELEASES.values()} | refused == {
        release.format for release in directory().values()
    }


def in_the_repository(made: Path, path: str, *, is_file: bool) -> dict[str, bytes]:
    """The files of a case, under the names that a release has for them."""
    top, files = made if made.is_dir() else made.parent, {}
    for file in filter(Path.is_file, top.rglob("*")):
        name = file.relative_to(top).as_posix()
        if not is_file:
            name = f"{path}/{name}"
        elif name.endswith("_cfg.json"):
            name = f"{path.removesuffix('.pt')}_cfg.json"
        elif file.suffix == Path(path).suffix:
            name = path
        files[name] = file.read_bytes()
    return files


@pytest.mark.parametrize("case", RELEASES)
def test_a_release_loads_with_its_authors_numbers(hub: Any, tmp_path: Path, case: str) -> None:
    """pitfall_275"""
    name, told = RELEASES[case]
    release = directory()[name]
    published = release.saes[0]
    made = CASES[case][1](tmp_path / "made")
    files = in_the_repository(made.path, published.path, is_file=case in SINGLE_FILES)
    others = {"README.md": b"", "other/sae_weights.safetensors": b"", "layer_99.safetensors": b"", "notes.pt": b""}
    hub.add(release.repo_id, files | others)

    hints = made.hints | told
    info = sae_info(name, published.id, **hints)
    sae = SAE.from_pretrained(name, published.id, **hints)
    assert isinstance(sae, made.kind)
    assert (info.d_in, info.d_out, info.d_sae) == (sae.d_in, sae.d_out, sae.d_sae)
    torch.testing.assert_close(sae.encode(made.x), made.codes, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sae(made.x), made.output, atol=1e-4, rtol=1e-4)
    assert not set(hub.downloaded()) & set(others)
    assert sae.metadata["model_name"]
    assert sae.metadata["source"]["release"] == name
