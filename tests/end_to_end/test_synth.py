"""`unweave synth` as a user types it: a world in, a folder out, one sentence for wrong input."""

import json
import os
import re

import pytest

from unweave import SAE
from unweave.cli import main
from unweave.synthetic import figures
from unweave.synthetic.model import SyntheticModel

WORLD = """
description = "a small one"
samples = 3000
training_samples = 5000
batch_size = 500
eval_samples = 2000

[model]
num_features = 24
hidden_dim = 12
firing_probability = { generator_name = "linear", max_prob = 0.3, min_prob = 0.05 }

[model.hierarchy]
total_root_nodes = 4
branching_factor = 2
max_depth = 2
mutually_exclusive_portion = 0.5

[[saes]]
d_sae = 24
activation = { type = "topk", k = 4 }
lr = 3e-3

[[saes]]
d_sae = 30
activation = { type = "relu" }
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(WORLD)
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch):
    """As where matplotlib is missing; drawing takes most of a small study's time."""
    monkeypatch.setattr(figures, "find_spec", lambda name: None)


def synth(*arguments):
    return main(["synth", *map(str, arguments)])


def test_a_study(here, capsys):
    assert synth("small.toml", "--out", "out") == 0
    shown = capsys.readouterr()
    out = here / "out"
    assert sorted(p.name for p in out.iterdir()) == ["metrics.jsonl", "model", "pictures", "results.json", "saes"]
    assert sorted(p.name for p in (out / "saes").iterdir()) == ["00_topk", "01_relu"]
    pictures = {p.name for p in (out / "pictures").iterdir()}
    stems = ("firing_rates", "correlations", "superposition", "recovery", "similarity", "similarity_00_topk",
             "similarity_01_relu")  # fmt: skip
    assert pictures == {f"{stem}.{suffix}" for stem in stems for suffix in ("png", "svg")}
    assert all((out / "pictures" / name).stat().st_size > 5000 for name in pictures)

    results = json.loads((out / "results.json").read_text())
    assert results["world"]["model"]["seed"] == 0
    assert results["statistics"]["hierarchy"] == {"children_without_parent": 0, "exclusive_together": 0}
    first, second = results["saes"]
    assert (first["name"], first["folder"]) == ("TopK(k=4), 24", "saes/00_topk")
    assert first["scores"]["num_samples"] == 2000
    assert first["scores"]["hierarchy"]["absorption"] is not None
    assert SAE.load(out / second["folder"]).d_sae == 30
    assert SyntheticModel.load_from_disk(out / "model").cfg.num_features == 24
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert (rows[-1]["tokens"], rows[-1]["sae"]) == (5000, 1)

    assert re.search(r"plan: small, 24 features in 12 dimensions", shown.err)
    assert re.search(r"100% of 5,000 tokens.*s left", shown.err)
    for word in ("requested", "measured", "firing rate", "correlation", "orphans", "largest |cosine|", "interference",
                 "MCC", "F1", "EV", "unique", "shrink", "dead", "absorb", "split", "TopK(k=4)"):  # fmt: skip
        assert word in shown.out
    assert f"true L0 of {first['scores']['true_l0']:.2f}" in shown.out
    assert all(len(line) <= 80 for line in shown.out.splitlines())


@pytest.mark.usefixtures("no_pictures")
def test_a_seed_repeats_everything(here):
    small = ("--samples", 500, "--tokens", 1000, "--eval-samples", 500)
    same = ("--d-sae", 20, "--activation", "topk", "--k", 3, "--lr", 3e-3)
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert synth("small.toml", "--out", out, "--seed", seed, *small, *same) == 0
    a, b, c = (json.loads((here / out / "results.json").read_text()) for out in "abc")
    assert a == b
    assert a["statistics"] != c["statistics"]
    assert [sae["folder"] for sae in a["saes"]] == ["saes/00_topk"]  # the line made both the same


def test_a_folder_is_protected(here, capsys):
    few = ("--samples", 100, "--no-train")
    assert synth("small.toml", "--out", "out", "--tokens", 600) == 0
    (here / "out" / "mine.txt").write_text("kept")
    before = (here / "out" / "results.json").read_bytes()
    assert synth("small.toml", "--out", "out", *few) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (here / "out" / "results.json").read_bytes() == before
    assert synth("small.toml", "--out", "out", *few, "--overwrite") == 0
    names = sorted(p.name for p in (here / "out").iterdir())
    assert names == ["mine.txt", "model", "pictures", "results.json"]
    assert json.loads((here / "out" / "results.json").read_text())["saes"] == []
    (here / "other").mkdir()
    (here / "other" / "mine.txt").write_text("kept")
    assert synth("small.toml", "--out", "other", *few, "--overwrite") == 2
    assert "no study" in capsys.readouterr().err
    assert synth("small.toml", "--out", "small.toml", *few) == 2
    assert "is a file" in capsys.readouterr().err


def test_dry_run_writes_nothing(here, capsys):
    assert synth("small.toml", "--dry-run", "--samples", 10**9) == 0
    shown = capsys.readouterr().out
    assert "1,000,000,000 samples" in shown
    assert re.search(r"2 SAEs on 5,000 samples in 10 steps", shown)
    assert re.search(r"dictionary.*moments.*about", shown)
    assert os.listdir(here) == ["small.toml"]


@pytest.mark.usefixtures("no_pictures")
def test_without_matplotlib_there_is_a_note(here, capsys):
    assert synth("small.toml", "--out", "out", "--no-train", "--samples", 100) == 0
    shown = capsys.readouterr().err
    assert "note: matplotlib is missing" in shown
    assert "pip install 'unweave[plots]'" in shown
    assert sorted(p.name for p in (here / "out").iterdir()) == ["model", "results.json"]


@pytest.mark.usefixtures("no_pictures")
def test_warnings_of_a_world_are_one_line(here, capsys):
    text = WORLD.replace('generator_name = "linear", max_prob = 0.3, min_prob = 0.05',
                         'generator_name = "constant", probability = 0.3')  # fmt: skip
    text = text.replace("max_depth = 2", "max_depth = 2\ncompensate_probabilities = true")
    (here / "odd.toml").write_text(text)
    assert synth("odd.toml", "--no-train", "--samples", 100, "--out", "out") == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
    assert "cannot fire as often as requested" in line


def test_list(capsys):
    assert synth("--list") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("independent", "zipfian", "correlated", "hierarchical", "superposed_1m"))


def test_settings_go_to_the_saes_that_take_them(here):
    from unweave.cli.synth import SynthArgs

    first, second = SynthArgs(world="small.toml", k=7, l1=0.5, lr=1e-4).to_world().saes
    assert (first.activation.k, first.lr, second.lr, second.sparsity.coefficient) == (7, 1e-4, 1e-4, 0.5)
    first, second = SynthArgs(world="small.toml", target_l0=3.0).to_world().saes
    assert (first.l0_controller, second.l0_controller.target) == (None, 3.0)
    assert SynthArgs(world="superposed_1m", d_sae=512, k=9).to_world().saes[0].activation.k == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["indepedent"], "did you mean 'independent'"),
        (["nowhere.toml"], "nowhere.toml"),
        (["misspelt.toml"], "'num_feature'; did you mean 'num_features'"),
        (["small.toml", "--samples", "0"], "samples.*0"),
        (["small.toml", "--activation", "relu", "--k", "3"], "--k goes with"),
        (["small.toml", "--activation", "topk", "--target-l0", "3"], "--target-l0 goes with"),
        (["small.toml", "--no-train", "--k", "3"], "--no-train"),
        (["small.toml", "--k", "25"], "k=25.*24"),
    ],
)
def test_wrong_input_is_one_sentence(here, arguments, message, capsys):
    (here / "misspelt.toml").write_text(WORLD.replace("num_features", "num_feature"))
    before = sorted(os.listdir(here))
    assert synth(*arguments, "--out", "out") == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, error)
    assert sorted(os.listdir(here)) == before
