"""Sharing through huggingface_hub's real client and a hub on localhost: what arrives, and what its page says."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load

import unweave as uw
from unweave import SAE, UnweaveError
from unweave.activations import TokenBatch
from unweave.evaluation import Report
from unweave.hub import pull, push
from unweave.hub.card import BEGIN, END
from unweave.synthetic import SyntheticModel, SyntheticModelConfig

HOOK, REPO = "blocks.1.hook_resid_post", "me/saes"


def an_sae(activation: uw.Activation | None = None, hook: str = HOOK, **metadata: Any) -> SAE:
    known = {"hook_name": hook, "model_name": "gpt2-small", "dataset_path": "monology/pile-uncopyrighted"}
    return SAE(224, 32, activation or uw.TopK(4), metadata=known | metadata)


@pytest.fixture(scope="module")
def report() -> Report:
    """What was measured of an SAE on a few rows of the demo model."""
    torch.manual_seed(0)
    ids = torch.randint(5, 2000, (4, 16))
    batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(4)[:, None].expand(4, 16))
    with pytest.warns(UserWarning, match="was trained on the model 'gpt2-small'"):
        return uw.evaluate(an_sae(), model="demo", data=[batch], tokens=64, hook="resid_post.1")


def files(hub: Any, repo: str = REPO, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
    return {name: content for name, content in hub.repos[kind, repo].files(revision).items() if name[0] != "."}


def card(hub: Any, repo: str = REPO, kind: str = "model") -> tuple[dict[str, Any], str]:
    """The keys and the text of a page."""
    text = files(hub, repo, kind)["README.md"].decode()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


# An SAE.


def test_everything_that_belongs_to_an_sae_arrives(hub: Any, report: Report, tmp_path: Path) -> None:
    sae = an_sae()
    page = tmp_path / "page.html"
    page.write_text("<!doctype html>")
    address = sae.push_to_hub(REPO, report=report, dashboard=page, license="mit", commit_message="first")
    assert address == f"{hub.url}/{REPO}/tree/main/{HOOK}"
    there = files(hub)
    names = ("cfg.json", "sae_weights.safetensors", "eval.json", "features.html", "sparsity.safetensors")
    assert set(there) == {"README.md", *(f"{HOOK}/{name}" for name in names)}
    assert json.loads(there[f"{HOOK}/eval.json"]) == json.loads(json.dumps(report.to_json()))
    assert there[f"{HOOK}/features.html"] == b"<!doctype html>"

    density = report.per_feature["feature_density"].double()
    sparsity = load(there[f"{HOOK}/sparsity.safetensors"])["sparsity"]
    assert sparsity.dtype == torch.float32
    torch.testing.assert_close(sparsity.double(), torch.log10(density + 1e-10), atol=1e-4, rtol=1e-4)
    assert sparsity.min() == -10  # never fired

    x = torch.randn(8, 224)
    assert torch.equal(SAE.from_pretrained(REPO, HOOK).encode(x), sae.encode(x))


def test_the_page_has_what_the_hub_and_others_go_by(hub: Any, report: Report) -> None:
    """pitfall_369: base model, licence and metrics are on the card."""
    an_sae().push_to_hub(REPO, report=report, license="mit")
    keys, text = card(hub)
    assert keys["library_name"] == "saelens"
    assert {"saelens", "sparse-autoencoder", "unweave"} <= set(keys["tags"])
    assert keys["base_model"] == "openai-community/gpt2"
    assert keys["datasets"] == ["monology/pile-uncopyrighted"]
    assert keys["license"] == "mit"
    (model,) = keys["model-index"]
    assert model["name"] == HOOK
    (result,) = model["results"]
    measured = {m["type"]: m["value"] for m in result["metrics"]}
    for name in ("l0", "explained_variance", "mse", "frac_alive"):
        assert measured[name] == pytest.approx(report[name], rel=1e-5)
    assert report["ce_loss_score"] is None  # this model's ablation costs nothing
    assert "ce_loss_score" not in measured
    assert result["dataset"]["name"].startswith("64 ")
    assert f"| {report['l0']:.4g} |" in text
    assert "| monology/pile-uncopyrighted |" in text
    assert "features.html" not in text  # there is none


def test_the_code_on_the_page_runs(hub: Any) -> None:
    an_sae().push_to_hub(REPO)
    ours, theirs = python_blocks(card(hub)[1])
    namespace: dict[str, Any] = {}
    exec(ours, namespace)
    assert namespace["codes"].shape == (8, 32)
    assert namespace["x_hat"].shape == (8, 224)
    assert f'SAE.from_pretrained("{REPO}", "{HOOK}")' in theirs


def test_an_sae_that_sae_lens_cannot_read_is_not_listed_as_one_of_its_own(hub: Any) -> None:
    an_sae(uw.GroupMax(4)).push_to_hub(REPO)
    keys, text = card(hub)
    assert keys["library_name"] == "unweave"
    assert "saelens" not in keys["tags"]
    assert "sae_lens" not in text
    assert SAE.from_pretrained(REPO, HOOK).activation == uw.GroupMax(4)


def test_names_that_are_no_repositories_stay_out_of_the_keys(hub: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A model in a folder of this machine, and data in a file, are nothing that the Hub can link to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "model").mkdir(parents=True)
    an_sae(model_name="my/model", dataset_path="/data/text.jsonl").push_to_hub(REPO)
    keys, _ = card(hub)
    assert not {"base_model", "datasets", "model-index", "license"} & set(keys)


def test_the_top_of_a_repository(hub: Any) -> None:
    sae = an_sae()
    assert sae.push_to_hub(REPO, subfolder="") == f"{hub.url}/{REPO}/tree/main"
    assert "cfg.json" in files(hub)
    namespace: dict[str, Any] = {}
    exec(python_blocks(card(hub)[1])[0], namespace)
    assert namespace["codes"].shape == (8, 32)


def test_a_name_alone_is_in_one_s_own_name_space(hub: Any) -> None:
    an_sae().push_to_hub("mine")
    assert f"{HOOK}/cfg.json" in files(hub, "me/mine")


def test_a_second_sae_keeps_the_first(hub: Any, report: Report) -> None:
    an_sae().push_to_hub(REPO, report=report)
    second, tenth = (f"blocks.{i}.hook_resid_post" for i in (2, 10))
    an_sae(hook=tenth).push_to_hub(REPO)
    an_sae(uw.ReLU(), hook=second).push_to_hub(REPO)
    assert {f"{hook}/cfg.json" for hook in (HOOK, second, tenth)} <= set(files(hub))
    keys, text = card(hub)
    assert [m["name"] for m in keys["model-index"]] == [HOOK]  # its numbers stay
    rows = re.findall(r"^\| \[`(.*?)`\].*?\| (\w+) \|", text, re.MULTILINE)
    assert rows == [(HOOK, "topk"), (second, "standard"), (tenth, "topk")]  # layer 10 after layer 2
    assert text.count(BEGIN) == text.count(END) == 1
    assert f"| {report['l0']:.4g} |" in text


def test_the_same_place_again_replaces_it(hub: Any, report: Report) -> None:
    an_sae().push_to_hub(REPO, report=report)
    other = an_sae(uw.ReLU())
    other.push_to_hub(REPO)
    assert isinstance(SAE.from_pretrained(REPO, HOOK).activation, uw.ReLU)
    keys, _ = card(hub)
    assert "model-index" not in keys  # the numbers were the other one's
    assert not {f"{HOOK}/eval.json", f"{HOOK}/sparsity.safetensors"} & set(files(hub))


def test_what_somebody_wrote_on_the_page_stays(hub: Any) -> None:
    an_sae().push_to_hub(REPO)
    repo = hub.repos["model", REPO]
    before = files(hub)["README.md"].decode()
    edited = before.replace("# saes\n", "# My SAEs\n\nRead the paper.\n")
    edited = edited.replace("tags:\n", "language: en\ntags:\n- mine\n")
    repo.commit("main", repo.files() | {"README.md": (edited + "\n## Thanks\n").encode()})
    an_sae(hook="h.2").push_to_hub(REPO)
    keys, text = card(hub)
    assert keys["language"] == "en"
    assert keys["tags"][0] == "mine"
    assert text.lstrip().startswith("# My SAEs\n\nRead the paper.\n")
    assert text.rstrip().endswith("## Thanks")
    assert "[`h.2`](h.2)" in text


def test_a_page_of_somebody_else_s_making_is_kept(hub: Any) -> None:
    hub.add(REPO, {"README.md": b"# Old\n\nAbout.\n"})
    an_sae().push_to_hub(REPO)
    keys, text = card(hub)
    assert text.lstrip().startswith("# Old\n\nAbout.\n\n" + BEGIN)
    assert keys["library_name"] == "saelens"


def test_a_branch(hub: Any) -> None:
    an_sae().push_to_hub(REPO)
    address = an_sae(hook="h.2").push_to_hub(REPO, revision="v2")
    assert address == f"{hub.url}/{REPO}/tree/v2/h.2"
    assert "h.2/cfg.json" in files(hub, revision="v2")
    assert "h.2/cfg.json" not in files(hub)
    assert SAE.from_pretrained(REPO, "h.2", revision="v2").metadata["hook_name"] == "h.2"


# When it goes wrong.


def test_an_interrupted_push_goes_on_where_it_stopped(hub: Any, tmp_path: Path) -> None:
    for i in range(3):
        an_sae(hook=f"h.{i}").save(tmp_path / f"h.{i}")
    hub.add("me/other", {})
    upload = {hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.rglob("*.safetensors")}
    stays = sorted(upload)[0]
    fault = hub.fault(rf"^PUT /lfs/{stays}", drop_after=100)
    with pytest.raises(
        UnweaveError, match=r"^the connection to http://127.* broke at the repository 'me/saes' .*: try again\.$"
    ):
        push(tmp_path, REPO)
    assert files(hub) == {}  # nothing is half there
    assert upload - set(hub.lfs) == {stays}
    hub.faults.remove(fault)
    hub.forget()
    push(tmp_path, REPO)
    assert [line for line in hub.requests if line.startswith("PUT")] == [f"PUT /lfs/{stays}"]
    assert len(files(hub)) == 7


def test_nothing_is_uploaded_twice(hub: Any) -> None:
    sae = an_sae()
    sae.push_to_hub(REPO)
    commits = len(hub.repos["model", REPO].commits)
    hub.forget()
    sae.push_to_hub(REPO)
    assert not [line for line in hub.requests if line.startswith("PUT")]
    assert len(hub.repos["model", REPO].commits) == commits


def test_two_pushes_at_once_both_stay(hub: Any) -> None:
    """Somebody's commit comes between our look and our commit: the page must list both SAEs."""
    an_sae(hook="h.1").push_to_hub(REPO)
    theirs = files(hub)
    repo, answer = hub.repos["model", REPO], hub.fault_for

    def pushed_in_between(line: str) -> Any:
        if "/commit/" in line and "h.3/cfg.json" not in repo.files():
            extra = {name.replace("h.1", "h.3"): content for name, content in theirs.items() if name.startswith("h.1")}
            repo.commit("main", repo.files() | extra)
        return answer(line)

    hub.fault_for = pushed_in_between
    an_sae(hook="h.2").push_to_hub(REPO)
    assert {"h.1/cfg.json", "h.2/cfg.json", "h.3/cfg.json"} <= set(files(hub))
    assert re.findall(r"\| \[`(h\.\d)`\]", card(hub)[1]) == ["h.1", "h.2", "h.3"]


def test_a_name_without_an_owner_needs_a_token(hub: Any, without_token: None) -> None:
    with pytest.raises(UnweaveError, match=r"^a name without an owner .*: no token was given, pass token="):
        an_sae().push_to_hub("saes")


def test_without_the_right_to_write(hub: Any, without_token: None) -> None:
    with pytest.raises(UnweaveError, match=r"needs a token with the right to do so: no token was given, pass token="):
        an_sae().push_to_hub(REPO)
    assert not hub.repos
    an_sae().push_to_hub(REPO, token="hf_local")
    assert files(hub)


def test_private_is_private(hub: Any) -> None:
    """pitfall_370: the request has the flag."""
    an_sae().push_to_hub(REPO, private=True)
    assert hub.repos["model", REPO].private
    an_sae(hook="h.2").push_to_hub(REPO, private=True)
    hub.add("me/public", {})
    with pytest.raises(UnweaveError, match=r"'me/public' is public already, and private=True was asked for\.$"):
        an_sae().push_to_hub("me/public", private=True)
    assert files(hub, "me/public") == {}


def test_what_cannot_be_pushed(hub: Any, tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match=r"no folder '.*nowhere' to push\.$"):
        push(tmp_path / "nowhere", REPO)
    with pytest.raises(UnweaveError, match=r"holds nothing that can be pushed: no SAE \(cfg\.json and sae_weights"):
        push(tmp_path, REPO)
    with pytest.raises(UnweaveError, match="has no threshold yet"):
        an_sae(uw.BatchTopK(4)).push_to_hub(REPO)
    with pytest.raises(UnweaveError, match=r"no file '.*page\.html' to push\.$"):
        an_sae().push_to_hub(REPO, dashboard=tmp_path / "page.html")
    with pytest.raises(UnweaveError, match="leads out of its folder"):
        an_sae().push_to_hub(REPO, subfolder="../x")
    with pytest.raises(UnweaveError, match=r"'me/a/b' is no repository on the Hub"):
        an_sae().push_to_hub("me/a/b")
    assert not hub.repos


# Runs, synthetic models, activations.


def test_all_saes_of_a_run(hub: Any, report: Report, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for hook in ("h.0", "h.1"):
        for i, activation in enumerate((uw.TopK(4), uw.ReLU())):
            folder = an_sae(activation, hook).save(run / "saes" / hook / f"{i:02d}_{activation.name}")
            an_sae(activation, hook).save(folder / "training")
    report.save(run / "saes" / "h.1" / "00_topk" / "eval.json")
    an_sae().save(run / "checkpoints" / "1")
    (run / "config.json").write_text("{}")
    assert push(run, REPO) == f"{hub.url}/{REPO}/tree/main"
    there = files(hub)
    places = ["h.0/00_topk", "h.0/01_relu", "h.1/00_topk", "h.1/01_relu"]
    assert {str(Path(name).parent) for name in there} == {".", *places}
    keys, text = card(hub)
    assert re.findall(r"^\| \[`(.*?)`\]", text, re.MULTILINE) == places
    assert [m["name"] for m in keys["model-index"]] == ["h.1/00_topk"]
    assert isinstance(SAE.from_pretrained(REPO, "h.0/01_relu").activation, uw.ReLU)
    with pytest.raises(UnweaveError, match=r"holds several SAEs; name one: 'h\.0/00_topk'"):
        SAE.from_pretrained(REPO, "h.0")


def test_the_one_sae_of_a_run_takes_the_report_beside_it(hub: Any, report: Report, tmp_path: Path) -> None:
    an_sae().save(tmp_path / "run" / "sae")
    report.save(tmp_path / "run" / "eval.json")
    (tmp_path / "run" / "features.html").write_text("<html>")
    push(tmp_path / "run", REPO, subfolder="mine")
    names = {"cfg.json", "sae_weights.safetensors", "eval.json", "features.html", "sparsity.safetensors"}
    assert set(files(hub)) == {"README.md", *(f"mine/{name}" for name in names)}


def test_a_synthetic_model(hub: Any, tmp_path: Path) -> None:
    model = SyntheticModel(SyntheticModelConfig(num_features=12, hidden_dim=6, seed=1))
    model.save(tmp_path / "world")
    push(tmp_path / "world", "me/world")
    keys, text = card(hub, "me/world")
    assert "synthetic" in keys["tags"]
    assert keys["library_name"] == "saelens"  # it reads them
    namespace: dict[str, Any] = {}
    exec(python_blocks(text)[0], namespace)
    loaded = namespace["model"]
    assert torch.equal(loaded.feature_dict.feature_vectors, model.feature_dict.feature_vectors)
    push(tmp_path / "world", "me/world", subfolder="again")
    exec(python_blocks(card(hub, "me/world")[1])[0], namespace)
    assert 'from_pretrained("me/world", "again")' in card(hub, "me/world")[1]
    assert sorted(hub.downloaded())[-1].startswith("synthetic_model")  # no page, and nothing but the model's files


@pytest.mark.parametrize("kind", ["unweave-cache", "unweave-tokens", "datasets"])
def test_cached_activations(hub: Any, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "cache"
    (folder / "train_00000").mkdir(parents=True)
    (folder / "train_00000" / "h.npy").write_bytes(b"\x01" * 64)
    if kind == "datasets":
        (folder / "dataset_info.json").write_text("{}")
        (folder / "state.json").write_text("{}")
    else:
        manifest = {"format": kind, "version": 1, "complete": True, "tokenizer": "gpt2", "sides": {}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert push(folder, "me/cache", private=True) == f"{hub.url}/datasets/me/cache/tree/main"
    there = files(hub, "me/cache", "dataset")
    assert there["train_00000/h.npy"] == b"\x01" * 64
    keys, text = card(hub, "me/cache", "dataset")
    assert ("tokens" if kind == "unweave-tokens" else "activations") in keys["tags"]
    namespace: dict[str, Any] = {}
    exec(python_blocks(text)[0], namespace)
    assert (namespace["folder"] / "train_00000" / "h.npy").read_bytes() == b"\x01" * 64
    assert pull("me/cache", "train_00000", kind="dataset").name == "train_00000"


@pytest.mark.parametrize("marker", ["manifest", "shards"])
def test_what_is_not_finished_is_not_pushed(hub: Any, tmp_path: Path, marker: str) -> None:
    if marker == "manifest":
        (tmp_path / "manifest.json").write_text('{"format": "unweave-cache", "complete": false}')
    else:
        for name in ("dataset_info.json", "state.json"):
            (tmp_path / name).write_text("{}")
        (tmp_path / ".tmp_shards").mkdir()
    with pytest.raises(UnweaveError, match="is not finished"):
        push(tmp_path, "me/cache")
    assert not hub.repos
