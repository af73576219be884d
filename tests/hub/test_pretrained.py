"""`SAE.from_pretrained` and `sae_info` through huggingface_hub's real client and a hub on localhost."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

import unweave as uw
from unweave import SAE, UnweaveError
from unweave.hub import describe_sae, read_sae, sae_info, write_sae
from unweave.hub.download import fetch
from unweave.hub.repo import Repo
from unweave.sae import TopK

D_IN, D_SAE = 16, 64
JB, JB_ID = "gpt2-small-res-jb", "blocks.8.hook_resid_pre"
JB_REPO = "jbloom/GPT2-Small-SAEs-Reformatted"


@torch.no_grad()
def an_sae(d_in: int = D_IN, d_sae: int = D_SAE, **metadata: Any) -> SAE:
    sae = SAE(d_in, d_sae, uw.JumpReLU(), metadata={"hook_name": "blocks.1.hook_resid_post"} | metadata)
    for name in ("b_enc", "b_dec"):
        getattr(sae, name).normal_()
    sae.threshold.uniform_(0.1, 0.5)
    return sae


def files_of(folder: Path, prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}{p.relative_to(folder).as_posix()}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def legacy_files(folder: str, **config: Any) -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """An SAE as SAELens 3 wrote it."""
    w = {"W_enc": torch.randn(D_IN, D_SAE), "W_dec": torch.randn(D_SAE, D_IN), "b_enc": torch.randn(D_SAE),
         "b_dec": torch.randn(D_IN)}  # fmt: skip
    cfg = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "model_name": "gpt2-small",
           "hook_name": JB_ID, "hook_layer": 8, "activation_fn_str": "relu", "apply_b_dec_to_input": True,
           "prepend_bos": True, "normalize_activations": "none"} | config  # fmt: skip
    content = {"cfg.json": json.dumps(cfg).encode(), "sae_weights.safetensors": save(w)}
    return {f"{folder}/{name}": value for name, value in content.items()}, w


@pytest.fixture
def shared(hub: Any, tmp_path: Path) -> SAE:
    """An SAE that lies in `me/saes`, in a folder beside things that loading it does not take."""
    sae = an_sae()
    files = files_of(sae.save(tmp_path / "made"), "blocks.1/")
    hub.add("me/saes", files | {
        "README.md": b"# saes", "blocks.1/eval.json": b"{}", "blocks.1/features.html": b"<html>",
        "blocks.1/sparsity.safetensors": save({"sparsity": torch.zeros(D_SAE)}), "blocks.1/eval_h_1.json": b"{}",
        "blocks.1/training/cfg.json": b"{}", "blocks.1/runner_cfg.json": b"{}",
    })  # fmt: skip
    return sae


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(20, D_IN)


# What is found.


def test_a_release_and_an_id(hub: Any, x: torch.Tensor) -> None:
    files, w = legacy_files(JB_ID)
    hub.add(JB_REPO, files | {"blocks.9.hook_resid_pre/cfg.json": b"{}", "sparsity.safetensors": b""})
    sae = SAE.from_pretrained(JB, JB_ID)
    expected = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    torch.testing.assert_close(sae.encode(x), expected)
    torch.testing.assert_close(sae(x), expected @ w["W_dec"] + w["b_dec"])
    assert sae.metadata["model_from_pretrained_kwargs"] == {"center_writing_weights": True}  # of the directory
    assert (sae.metadata["sae_lens_release_id"], sae.metadata["sae_lens_id"]) == (JB, JB_ID)
    assert sae.metadata["neuronpedia_id"] == "gpt2-small/8-res-jb"
    (commit,) = hub.repos["model", JB_REPO].commits
    assert sae.metadata["source"] == {"repo": JB_REPO, "path": JB_ID, "commit": commit, "release": JB, "id": JB_ID}
    assert sorted(hub.downloaded()) == sorted(files)


def test_the_same_by_its_repository(hub: Any) -> None:
    """What the directory knows holds whichever way the SAE is named."""
    hub.add(JB_REPO, legacy_files(JB_ID)[0])
    by_repository = SAE.from_pretrained(JB_REPO, JB_ID)
    assert by_repository.metadata == SAE.from_pretrained(JB, JB_ID).metadata


@pytest.mark.parametrize(("kind", "scaled"), [("expected_average_only_in", True), ("none", False)])
def test_the_directory_s_scale_is_applied_once_and_only_if_the_config_asks(
    hub: Any, x: torch.Tensor, kind: str, scaled: bool
) -> None:
    release = uw.releases("gpt2-small-mlp-tm")[0]
    published = release["blocks.3.hook_mlp_out"]
    files, w = legacy_files(published.path, normalize_activations=kind)
    hub.add(release.repo_id, files)
    sae = SAE.from_pretrained(release.name, published.id)
    s = published.norm_scaling_factor if scaled else 1.0
    expected = torch.relu((s * x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    torch.testing.assert_close(sae.encode(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae(x), (expected @ w["W_dec"] + w["b_dec"]) / s, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stated", ["none", "expected_average_only_in"])
def test_a_normalisation_that_only_the_directory_knows(hub: Any, x: torch.Tensor, stated: str) -> None:
    """It takes the place of what the file says, which would need a factor that is nowhere."""
    release = uw.releases("mistral-7b-res-wg")[0]
    files, w = legacy_files(release.saes[0].path, normalize_activations=stated)
    hub.add(release.repo_id, files)
    sae = SAE.from_pretrained(release.name, release.saes[0].id)
    norms = x.norm(dim=1, keepdim=True) / D_IN**0.5
    codes = torch.relu((x / norms - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    torch.testing.assert_close(sae.encode(x), codes, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sae(x), (codes @ w["W_dec"] + w["b_dec"]) * norms, atol=1e-4, rtol=1e-4)


def test_keys_of_a_config_are_replaced_before_it_is_read(tmp_path: Path) -> None:
    """Whichever format's: the width that a key gives is that which the weights must have."""
    folder, overrides = an_sae().save(tmp_path / "ours"), {"normalize_activations": "layer_norm", "model_name": "gpt2"}
    sae = read_sae(folder, config_overrides=overrides)
    assert (sae.per_token, sae.metadata["model_name"]) == ("layer_norm", "gpt2")
    assert describe_sae(folder, config_overrides=overrides)["metadata"] == sae.metadata
    with pytest.raises(UnweaveError, match="its config says"):
        read_sae(folder, config_overrides={"d_sae": D_SAE + 1})
    with pytest.raises(UnweaveError, match="asks for normalize_activations='strange'"):
        read_sae(folder, config_overrides={"normalize_activations": "strange"})
    write_sae(SAE(D_IN, D_SAE, TopK(2)), tmp_path / "theirs", "sparsify")
    assert read_sae(tmp_path / "theirs", config_overrides={"model_name": "gpt2"}).metadata["model_name"] == "gpt2"
    with pytest.raises(UnweaveError, match="sparsify have no 'normalize_activations' that could be overridden"):
        read_sae(tmp_path / "theirs", config_overrides=overrides)


def gemma_npz(d_in: int = D_IN, d_sae: int = D_SAE) -> tuple[bytes, dict[str, np.ndarray[Any, Any]]]:
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    arrays["threshold"] = rng.uniform(0.1, 1, d_sae).astype("float32")
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue(), arrays


def test_a_canonical_gemma_scope_sae(hub: Any, x: torch.Tensor) -> None:
    content, w = gemma_npz()
    path = "layer_12/width_16k/average_l0_82/params.npz"
    hub.add("google/gemma-scope-2b-pt-res", {path: content, "layer_12/width_16k/average_l0_22/params.npz": b"other"})
    sae = SAE.from_pretrained("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical")
    pre = x.numpy() @ w["W_enc"] + w["b_enc"]
    np.testing.assert_allclose(sae.encode(x).numpy(), pre * (pre > w["threshold"]) * (pre > 0), rtol=1e-4, atol=1e-4)
    assert sae.metadata["hook_name"] == "blocks.12.hook_resid_post"
    assert hub.downloaded() == [path]


def test_a_repository_and_a_folder(hub: Any, shared: SAE, x: torch.Tensor) -> None:
    sae = SAE.from_pretrained("me/saes", "blocks.1")
    assert torch.equal(sae.encode(x), shared.encode(x))
    assert sorted(hub.downloaded()) == ["blocks.1/cfg.json", "blocks.1/sae_weights.safetensors"]


def test_a_repository_with_one_sae_needs_no_folder(hub: Any, tmp_path: Path, x: torch.Tensor) -> None:
    sae = an_sae()
    hub.add("me/one", files_of(sae.save(tmp_path / "made"), "deep/folder/") | {"README.md": b""})
    hub.add("me/top", files_of(tmp_path / "made") | {"README.md": b""})
    for repo in ("me/one", "me/top"):
        assert torch.equal(SAE.from_pretrained(repo).encode(x), sae.encode(x))


def test_a_repository_with_several_lists_them(hub: Any, tmp_path: Path) -> None:
    folder = an_sae().save(tmp_path / "made")
    hub.add("me/two", files_of(folder, "a/x/") | files_of(folder, "a/y/"))
    with pytest.raises(UnweaveError, match=r"the repository 'me/two' holds several SAEs; name one: 'a/x', 'a/y'\.$"):
        SAE.from_pretrained("me/two")
    with pytest.raises(UnweaveError, match=r"'a' of 'me/two' holds several SAEs; name one: 'a/x', 'a/y'\.$"):
        SAE.from_pretrained("me/two", "a")


def test_one_file_of_several(hub: Any) -> None:
    """mwhanna's transcoders: a file a layer."""
    made = {"W_enc": (D_SAE, D_IN), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    files = {f"layer_{i}.safetensors": save({n: torch.randn(s) for n, s in made.items()}) for i in range(2)}
    hub.add("me/transcoders", files | {"config.yaml": b"model_name: qwen3-0.6b"})
    sae = SAE.from_pretrained("me/transcoders", "layer_1.safetensors")
    assert isinstance(sae, uw.Transcoder)
    assert sae.metadata["hook_name_out"] == "blocks.1.hook_mlp_out"
    assert "layer_0.safetensors" not in hub.downloaded()
    with pytest.raises(UnweaveError, match=r"name one: 'layer_0\.safetensors', 'layer_1\.safetensors'\.$"):
        SAE.from_pretrained("me/transcoders")


def test_a_checkpoint_of_an_interrupted_run_finds_its_config(hub: Any) -> None:
    """dictionary_learning's config lies above the folder of checkpoints, and without it nobody knows the class."""
    tensors = {
        "encoder.weight": torch.randn(D_SAE, D_IN), "encoder.bias": torch.randn(D_SAE), "b_dec": torch.zeros(D_IN),
        "decoder.weight": torch.randn(D_IN, D_SAE), "k": torch.tensor(4), "threshold": torch.tensor(0.5),
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    config = json.dumps({"trainer": {"dict_class": "BatchTopKSAE"}}).encode()
    hub.add("me/run", {"a/config.json": config, "a/checkpoints/ae_10.pt": buffer.getvalue(), "config.json": b"[]"})
    sae = SAE.from_pretrained("me/run", "a/checkpoints/ae_10.pt")
    assert sae.activation == uw.BatchTopK(4)
    assert hub.downloaded() == ["a/config.json", "a/checkpoints/ae_10.pt"]


@pytest.mark.parametrize("name", ["pruned", "final"])
def test_weights_one_folder_below_their_config(hub: Any, name: str) -> None:
    w = {
        "W_E": torch.randn(D_IN, D_SAE),
        "b_E": torch.zeros(D_SAE),
        "W_D": torch.randn(D_SAE, D_IN),
        "b_D": torch.zeros(D_IN),
    }
    config = json.dumps({"sae_type": "sae", "d_model": D_IN, "expansion_factor": 4, "act_fn": "relu"}).encode()
    hub.add("me/scope", {"L3/config.json": config, f"L3/checkpoints/{name}.safetensors": save(w)})
    assert torch.equal(SAE.from_pretrained("me/scope", "L3").W_enc, w["W_E"])


def test_a_repository_without_an_sae(hub: Any) -> None:
    hub.add("me/nothing", {"README.md": b"", "model.gguf": b""})
    with pytest.raises(UnweaveError, match=r"'me/nothing' holds no SAE: there are 'README\.md', 'model\.gguf'\.$"):
        SAE.from_pretrained("me/nothing")
    hub.add("me/dcp", {"config.json": b'{"sae_type": "sae"}', "sae_weights.dcp/.metadata": b"\x80"})
    with pytest.raises(UnweaveError, match=r"'me/dcp' has its weights in 'sae_weights\.dcp', a distributed checkpoint"):
        SAE.from_pretrained("me/dcp")


def test_a_path(tmp_path: Path, x: torch.Tensor) -> None:
    sae = an_sae()
    sae.save(tmp_path / "saes" / "first")
    for found in (
        SAE.from_pretrained(tmp_path / "saes" / "first"),
        SAE.from_pretrained(str(tmp_path / "saes"), "first"),
    ):
        assert torch.equal(found.encode(x), sae.encode(x))
    assert SAE.from_pretrained(tmp_path / "saes", "first", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_release_is_meant_before_a_folder_of_its_name(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    an_sae().save(tmp_path / JB / JB_ID)
    hub.add(JB_REPO, legacy_files(JB_ID)[0])
    assert isinstance(SAE.from_pretrained(JB, JB_ID).activation, uw.ReLU)
    assert isinstance(SAE.from_pretrained(f"./{JB}", JB_ID).activation, uw.JumpReLU)


@pytest.mark.parametrize("id", ["../other", "a/../../b", "/etc", "..\\other", "C:/other"])
def test_a_path_that_leaves_its_folder_is_refused(hub: Any, shared: SAE, tmp_path: Path, id: str) -> None:
    for source in ("me/saes", tmp_path):
        if id == "/etc" and source == "me/saes":
            continue  # a slash in front is an habit
        with pytest.raises(UnweaveError, match="leads out of its folder"):
            SAE.from_pretrained(source, id)
    assert hub.downloaded() == []


def test_a_name_that_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_sae").mkdir()
    with pytest.raises(UnweaveError, match=r"no release and no folder 'my_sea'; did you mean 'my_sae'\?$"):
        SAE.from_pretrained("my_sea")
    with pytest.raises(UnweaveError, match=r"no release and no folder 'gpt2-res-jb'; did you mean 'gpt2-small-res-jb'"):
        SAE.from_pretrained("gpt2-res-jb", "x")
    with pytest.raises(UnweaveError, match=r"is a path, which has no revision 'v1'\.$"):
        SAE.from_pretrained(tmp_path, revision="v1")


def test_one_layer_of_a_cross_layer_transcoder_is_refused() -> None:
    with pytest.raises(UnweaveError, match=r"load the whole by its repository, 'mntss/clt-gemma-2-2b-2\.5M'\.$"):
        SAE.from_pretrained("mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_3")


# How it is downloaded.


def test_what_is_there_is_not_downloaded_again(hub: Any, shared: SAE, x: torch.Tensor) -> None:
    SAE.from_pretrained("me/saes", "blocks.1")
    hub.forget()
    SAE.from_pretrained("me/saes", "blocks.1")
    assert hub.downloaded() == []
    hub.forget()
    sae = SAE.from_pretrained("me/saes", "blocks.1", local_files_only=True)
    assert hub.requests == []
    assert torch.equal(sae.encode(x), shared.encode(x))
    SAE.from_pretrained("me/saes", "blocks.1", force_download=True)
    assert sorted(hub.downloaded()) == ["blocks.1/cfg.json", "blocks.1/sae_weights.safetensors"]


@pytest.mark.parametrize("moment", [r"HEAD .*cfg\.json", r"HEAD .*sae_weights"])
def test_all_files_are_of_one_commit(hub: Any, shared: SAE, tmp_path: Path, x: torch.Tensor, moment: str) -> None:
    """Somebody pushes while we download: the config and the weights must still be a pair that was pushed together."""
    repo = hub.repos["model", "me/saes"]
    other = files_of(SAE(D_IN, 32, uw.TopK(3)).save(tmp_path / "other"), "blocks.1/")
    answer = hub.fault_for

    def pushed_in_between(line: str) -> Any:
        if re.match(moment, line) and len(repo.commits) == 1:
            repo.commit("main", repo.files() | other)
        return answer(line)

    hub.fault_for = pushed_in_between
    sae = SAE.from_pretrained("me/saes", "blocks.1")
    assert len(repo.commits) == 2
    assert torch.equal(sae.encode(x), shared.encode(x))


def test_revisions(hub: Any, shared: SAE, tmp_path: Path) -> None:
    repo = hub.repos["model", "me/saes"]
    old = repo.branches["main"]
    repo.tags["v1"] = old
    repo.commit("main", files_of(SAE(D_IN, 32, uw.TopK(3)).save(tmp_path / "other"), "blocks.1/"))
    assert SAE.from_pretrained("me/saes", "blocks.1").d_sae == 32
    for revision in ("v1", old):
        sae = SAE.from_pretrained("me/saes", "blocks.1", revision=revision)
        assert (sae.d_sae, sae.metadata["source"]["commit"]) == (D_SAE, old)
    with pytest.raises(UnweaveError, match=r"'me/saes' has no revision 'v2'; it has 'main', 'v1'\.$"):
        SAE.from_pretrained("me/saes", "blocks.1", revision="v2")


def test_dtype(hub: Any, shared: SAE) -> None:
    sae = SAE.from_pretrained("me/saes", "blocks.1", dtype=torch.bfloat16, device="cpu")
    assert (sae.dtype, sae.threshold.dtype) == (torch.bfloat16, torch.float32)


def test_a_missing_folder_names_the_nearest(hub: Any, shared: SAE) -> None:
    with pytest.raises(UnweaveError, match=r"'me/saes' has no 'block\.1'; did you mean 'blocks\.1'"):
        SAE.from_pretrained("me/saes", "block.1")


def test_a_missing_file(hub: Any) -> None:
    files, _ = legacy_files(JB_ID)
    hub.add(JB_REPO, {name: content for name, content in files.items() if name.endswith(".json")})
    with pytest.raises(UnweaveError, match=rf"has no '{JB_ID}/sae_weights\.safetensors'"):
        SAE.from_pretrained(JB, JB_ID)


def test_a_repository_that_is_not_there(hub: Any, without_token: None) -> None:
    with pytest.raises(
        UnweaveError, match=r"no repository 'me/nowhere', or it is private and no token was given, pass"
    ):
        SAE.from_pretrained("me/nowhere", "a")


def test_a_private_repository(hub: Any, shared: SAE, without_token: None) -> None:
    hub.repos["model", "me/saes"].private = True
    with pytest.raises(UnweaveError, match=r"private and no token was given, pass token= or run `hf auth login`\.$"):
        SAE.from_pretrained("me/saes", "blocks.1")
    with pytest.raises(UnweaveError, match=r"private and the token that was given has no access to it\.$"):
        SAE.from_pretrained("me/saes", "blocks.1", token="hf_wrong")
    assert SAE.from_pretrained("me/saes", "blocks.1", token="hf_local").d_sae == D_SAE


def test_a_gated_repository_says_what_it_takes(hub: Any, without_token: None) -> None:
    hub.add(JB_REPO, legacy_files(JB_ID)[0], gated=True)
    with pytest.raises(
        UnweaveError, match=rf"'{JB_REPO}' is gated and needs a token .* {hub.url}/{JB_REPO}: no token was"
    ):
        SAE.from_pretrained(JB, JB_ID)
    assert SAE.from_pretrained(JB, JB_ID, token="hf_local").d_sae == D_SAE


def test_bytes_that_were_damaged_on_the_way(hub: Any, shared: SAE, x: torch.Tensor) -> None:
    """A flipped byte in the middle of the weights, in a file of the right size."""
    fault = hub.fault(r"^GET .*sae_weights", corrupt=True, times=1)
    with pytest.raises(
        UnweaveError, match=r"sae_weights\.safetensors' of the repository 'me/saes' arrived damaged and was"
    ):
        SAE.from_pretrained("me/saes", "blocks.1")
    assert fault.times == 0
    assert not list(hub.cache.rglob("sae_weights.safetensors"))
    assert torch.equal(SAE.from_pretrained("me/saes", "blocks.1").encode(x), shared.encode(x))


def test_a_small_damaged_file(hub: Any, shared: SAE) -> None:
    hub.fault(r"^GET .*cfg\.json", corrupt=True, times=1)
    with pytest.raises(UnweaveError, match=r"cfg\.json' of the repository 'me/saes' arrived damaged"):
        SAE.from_pretrained("me/saes", "blocks.1")
    assert SAE.from_pretrained("me/saes", "blocks.1").d_sae == D_SAE


def test_a_cache_without_links_is_checked_too(hub: Any, shared: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where the file's name does not tell its hash."""
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *args: False)
    hub.fault(r"^GET .*sae_weights", corrupt=True, times=1)
    with pytest.raises(UnweaveError, match=r"sae_weights\.safetensors' of the repository 'me/saes' arrived damaged"):
        SAE.from_pretrained("me/saes", "blocks.1")
    assert SAE.from_pretrained("me/saes", "blocks.1").d_sae == D_SAE


def test_a_mirror_with_etags_of_its_own(hub: Any, shared: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ETag that is no hash that we know is no sign of damage."""
    server = sys.modules[type(hub).__module__]
    monkeypatch.setattr(server, "etag_of", lambda path, content: f"version-{len(content)}")
    assert SAE.from_pretrained("me/saes", "blocks.1").d_sae == D_SAE


def test_a_file_that_was_uploaded_damaged(hub: Any, tmp_path: Path) -> None:
    files = files_of(an_sae().save(tmp_path / "made"), "a/")
    files["a/sae_weights.safetensors"] = files["a/sae_weights.safetensors"][:-100]
    hub.add("me/cut", files)
    with pytest.raises(UnweaveError, match=r"sae_weights\.safetensors' is damaged: "):
        SAE.from_pretrained("me/cut", "a")


def test_a_connection_that_drops_midway_goes_on_where_it_stopped(
    hub: Any, shared: SAE, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # of 10 MB, for large files
    fault = hub.fault(r"^GET .*sae_weights", drop_after=1000, times=1)
    sae = SAE.from_pretrained("me/saes", "blocks.1")
    assert fault.times == 0
    assert [r for r in hub.ranges if "sae_weights" in r] == ["blocks.1/sae_weights.safetensors bytes=1000-"]
    assert torch.equal(sae.encode(x), shared.encode(x))


def test_a_connection_that_keeps_dropping(hub: Any, shared: SAE) -> None:
    fault = hub.fault(r"^GET .*sae_weights", drop_after=0)
    with pytest.raises(
        UnweaveError, match=rf"^the connection to {hub.url} broke at 'blocks\.1/sae_weights.*: try again; in"
    ):
        SAE.from_pretrained("me/saes", "blocks.1")
    fault.times = 0
    assert SAE.from_pretrained("me/saes", "blocks.1").d_sae == D_SAE


def test_a_missing_file_is_missing_where_listing_fails_as_well(hub: Any, shared: SAE) -> None:
    """What is in the cache is named in place of what the repository has."""
    fetch(Repo("me/saes"), ["blocks.1/cfg.json"])
    for fault in ({"status": 500}, {"reset": True}):
        made = hub.fault(r"^GET /api/models", **fault)
        with pytest.raises(UnweaveError, match=r"^the repository 'me/saes' has no 'blocks\.1/cfg\.jsn'; did you mean "):
            fetch(Repo("me/saes"), ["blocks.1/cfg.jsn"])
        made.times = 0


def test_a_hub_that_fails(hub: Any, shared: SAE) -> None:
    hub.fault(r"^GET /api/models", status=500, times=20)
    with pytest.raises(UnweaveError, match=r"'me/saes' failed: the Hub answered with status 500, this was to fail\.$"):
        SAE.from_pretrained("me/saes", "blocks.1")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    def switch() -> None:
        from huggingface_hub import constants

        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
            value = getattr(constants, name)
            monkeypatch.setattr(constants, name, "http://127.0.0.1:1" + value[len(value.split("/{")[0]) :])

    return switch


def test_without_a_network_the_cache_is_used(hub: Any, shared: SAE, offline: Any, x: torch.Tensor) -> None:
    SAE.from_pretrained("me/saes", "blocks.1")
    offline()
    assert torch.equal(SAE.from_pretrained("me/saes", "blocks.1").encode(x), shared.encode(x))
    assert torch.equal(SAE.from_pretrained("me/saes").encode(x), shared.encode(x))


def test_without_a_network_what_is_cached_is_named(hub: Any, offline: Any) -> None:
    hub.add(JB_REPO, legacy_files(JB_ID)[0])
    SAE.from_pretrained(JB, JB_ID)
    offline()
    with pytest.raises(
        UnweaveError, match=rf"cannot be reached at http://127\.0\.0\.1:1 \(.*\); in the cache are of '{JB_REPO}': "
    ):
        SAE.from_pretrained(JB, "blocks.9.hook_resid_pre")
    with pytest.raises(UnweaveError, match=rf"was not downloaded before; in the cache are .*{JB_ID}/cfg\.json"):
        SAE.from_pretrained(JB, "blocks.9.hook_resid_pre", local_files_only=True)
    with pytest.raises(UnweaveError, match=r"nothing of 'me/other' is in the cache\.$"):
        SAE.from_pretrained("me/other", "a", local_files_only=True)
    with pytest.raises(UnweaveError, match=r"nothing of 'me/other' is in the cache\.$"):
        SAE.from_pretrained("me/other", "a")


# What it is, without its weights.


def test_info_reads_no_weights(hub: Any, tmp_path: Path) -> None:
    sae = an_sae(256, 4096, model_name="gpt2")
    files = files_of(sae.save(tmp_path / "made"), "a/")
    hub.add("me/large", files)
    info = sae_info("me/large", "a")
    assert (info.d_in, info.d_sae, info.dtype, info.kind, info.format) == (256, 4096, "float32", "SAE", "saelens")
    assert info.activation["type"] == "jumprelu"
    assert info.metadata["model_name"] == "gpt2"
    assert info.shapes == {"W_enc": (256, 4096), "W_dec": (4096, 256), "b_dec": (256,)}
    assert hub.sent < 300_000 < len(files["a/sae_weights.safetensors"])
    assert all("bytes=" in r for r in hub.ranges if "sae_weights" in r)
    assert not list(hub.cache.rglob("sae_weights.safetensors"))


def test_info_of_an_npz_and_of_a_pickle(hub: Any, tmp_path: Path) -> None:
    content, _ = gemma_npz(128, 8192)
    repo, path = "google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82"
    hub.add(repo, {f"{path}/params.npz": content})
    info = sae_info("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical")
    assert (info.d_in, info.d_sae, info.format, info.activation["type"]) == (128, 8192, "gemma_scope", "jumprelu")
    assert info.metadata["hook_name"] == "blocks.12.hook_resid_post"
    assert info.published is not None
    assert info.published.l0 == 82
    assert hub.sent < 900_000 < len(content) // 8

    state = {
        "encoder.weight": torch.randn(8192, 512), "encoder.bias": torch.randn(8192), "b_dec": torch.randn(512),
        "decoder.weight": torch.randn(512, 8192), "k": torch.tensor(8), "threshold": torch.tensor(0.5),
    }  # fmt: skip
    file = io.BytesIO()
    torch.save(state, file)
    config = {"trainer": {"dict_class": "AutoEncoderTopK", "activation_dim": 512, "dict_size": 8192, "k": 8}}
    hub.add("me/dl", {"trainer_0/ae.pt": file.getvalue(), "trainer_0/config.json": json.dumps(config).encode()})
    hub.forget()
    info = sae_info("me/dl", "trainer_0")
    assert (info.d_in, info.d_sae, info.format) == (512, 8192, "dictionary_learning")
    assert hub.sent < 1_500_000 < len(file.getvalue()) // 8


def test_info_of_an_archive_behind_something_else(hub: Any) -> None:
    config = {"d_model": 256, "d_sae": 4096, "activation": {"cls": "TopK", "params": {"top_k": 9}}}
    sizes = {"W_enc": (256, 4096), "b_enc": (4096,), "W_dec": (4096, 256), "b_dec": (256,)}
    file = io.BytesIO()
    torch.save({name: torch.ones(size) for name, size in sizes.items()}, file)
    content = json.dumps({"schema": 5, "cfg": config}).encode() + b"\n" + file.getvalue()
    hub.add("me/vision", {"sae.pt": content})
    info = sae_info("me/vision", "sae.pt")
    assert (info.format, info.d_in, info.d_sae, info.activation["k"]) == ("saev", 256, 4096, 9)
    assert hub.sent < 1_000_000 < len(content) // 8


def test_info_of_a_path_says_what_the_reader_says(tmp_path: Path) -> None:
    folder = an_sae().save(tmp_path / "made")
    info = sae_info(folder)
    for name, value in describe_sae(folder).items():
        assert getattr(info, name) == value


def test_info_of_what_is_cached(hub: Any, shared: SAE) -> None:
    with pytest.raises(UnweaveError, match=r"is in the cache\.$"):
        sae_info("me/saes", "blocks.1", local_files_only=True)
    SAE.from_pretrained("me/saes", "blocks.1")
    hub.forget()
    assert sae_info("me/saes", "blocks.1", local_files_only=True).d_sae == D_SAE
    assert hub.requests == []


@torch.no_grad()
def test_info_says_how_often_latents_fire(hub: Any, shared: SAE, tmp_path: Path) -> None:
    stored = torch.full((D_SAE,), -2.0)
    stored[:5], stored[5] = -10, float("nan")
    folder = an_sae().save(tmp_path / "made")
    assert sae_info(folder).log10_densities is None
    (folder / "sparsity.safetensors").write_bytes(save({"sparsity": stored}))
    hub.add("me/more", files_of(folder, "a/") | files_of(folder))
    for info in (sae_info(folder), sae_info("me/more", "a"), sae_info("me/more", "")):
        assert info.log10_densities is not None
        torch.testing.assert_close(info.log10_densities, stored, equal_nan=True)
        assert dict(info.rows())["latents that never fired"] == "5; the others on 1 % of tokens (median)"
    hub.forget()
    SAE.from_pretrained("me/more", "a")
    assert not any("sparsity" in name for name in hub.downloaded())
    (folder / "sparsity.safetensors").write_bytes(save({"sparsity": stored[1:]}))
    with pytest.raises(UnweaveError, match=r"'sparsity' of the shape \(63,\), and the SAE beside it has d_sae=64"):
        sae_info(folder)


def test_info_of_damaged_files(hub: Any, tmp_path: Path) -> None:
    files = files_of(an_sae().save(tmp_path / "made"), "a/")
    weights = files["a/sae_weights.safetensors"]
    hub.add("me/bad", files | {
        "b/cfg.json": files["a/cfg.json"], "b/sae_weights.safetensors": b"\xff" * 500,
        "c/cfg.json": files["a/cfg.json"], "c/sae_weights.safetensors": weights[:20],
        "d/cfg.json": b"{", "d/sae_weights.safetensors": weights, "e/params.npz": b"no zip",
    })  # fmt: skip
    for folder in "bc":
        with pytest.raises(UnweaveError, match=r"sae_weights\.safetensors' is damaged: "):
            sae_info("me/bad", folder)
    with pytest.raises(UnweaveError, match=r"cfg\.json' is not valid JSON"):
        sae_info("me/bad", "d")
    with pytest.raises(UnweaveError, match=r"'params\.npz' is a file without headers \(or damaged\)"):
        sae_info("me/bad", "e")
