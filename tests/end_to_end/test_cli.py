"""The command line as a user types it: real files, exit statuses, one-sentence errors.

Training, evaluating, converting and the page are processes of their own, in which nothing was imported before, and so
is a run that is interrupted; the other commands run in this one, which saves the seconds that a new one takes to start.
"""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from unweave.cli import main
from unweave.sae import SAE

SMALL = ["--tokens", "6000", "--d-sae", "256", "--k", "8", "--batch-size", "512", "--buffer", "2048", "--context", "64"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some real documents, so that no test has to read the whole standard library."""
    from unweave.activations import standard_library_text

    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    documents = (t for t, _ in zip(standard_library_text(), range(300), strict=False))
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents), encoding="utf-8")
    return str(path)


def unweave(*arguments, cwd, check):
    """What a command prints to standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*map(str, arguments)])
    assert status == check, err.getvalue()
    return out.getvalue(), err.getvalue()


def started(*arguments, cwd):
    """A command in a process of its own that succeeds."""
    command = [sys.executable, "-m", "unweave", *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("run")
    return folder / "run", started("train", "--data", text, *SMALL, "--eval-tokens", "2000", "--out", "run", cwd=folder)


def test_train_writes_and_prints(run_folder):
    folder, result = run_folder
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "eval.json", "metrics.jsonl", "sae"]
    sae = SAE.load(folder / "sae")
    assert (sae.d_in, sae.d_sae, sae.activation.k) == (224, 256, 8)
    assert sae.metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert "explained variance" in result.stdout.lower()
    assert re.search(r"plan: 6,000 tokens in 12 steps", result.stderr)
    assert re.search(r"100% of 6,000 tokens.*EV.*dead.*tok/s", result.stderr)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["tokens"] == 6000
    report = json.loads((folder / "eval.json").read_text())
    assert report["eval_type_id"] == "core"
    assert report["eval_result_metrics"]["sparsity"]["l0"] == pytest.approx(8, abs=0.5)


def test_eval_and_dashboard_of_a_saved_sae(run_folder):
    """Model, data and hook come from the SAE itself."""
    folder, _ = run_folder
    result = started("eval", "run/sae", "--tokens", "2000", cwd=folder.parent)
    assert "explained variance" in result.stdout.lower()
    assert (folder / "sae" / "eval.json").exists()
    arguments = ["--tokens", "5000", "--features", "5", "--out", "page.html"]
    started("dashboard", "run/sae", *arguments, cwd=folder.parent)
    assert "<!doctype html>" in (folder.parent / "page.html").read_text(encoding="utf-8").lower()


def test_a_finished_run_is_protected(run_folder, text):
    folder, _ = run_folder
    before = (folder / "metrics.jsonl").read_bytes()
    _, errors = unweave("train", "--data", text, *SMALL, "--out", "run", cwd=folder.parent, check=2)
    assert "--overwrite" in errors
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_interrupt_and_resume_end_bit_equal(tmp_path, text):
    """pitfall_178, pitfall_179, through the command line: Ctrl-C saves and says how to go on."""
    long = ["--data", text, *SMALL, "--tokens", "30000", "--eval-tokens", "0"]
    unweave("train", *long, "--out", "whole", cwd=tmp_path, check=0)
    command = [sys.executable, "-m", "unweave", "train", *long, "--checkpoint-every", "5000", "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "run" / "checkpoints"
    while process.poll() is None and not (checkpoints.is_dir() and any(checkpoints.glob("step-*"))):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    unweave("train", "--out", "run", "--resume", "--eval-tokens", "0", cwd=tmp_path, check=0)
    whole, resumed = (SAE.load(tmp_path / name / "sae").state_dict() for name in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_toml_and_line(tmp_path, text):
    """A config file with several SAEs; the line wins over the file."""
    (tmp_path / "run.toml").write_text(
        f"""
        data = {json.dumps(text)}
        hooks = ["resid_post.0"]
        tokens = 999_999_999
        batch_size = 512
        buffer = 2048
        text = {{ context = 64 }}
        [[saes]]
        d_sae = 64
        activation = {{ type = "topk", k = 4 }}
        [[saes]]
        d_sae = 64
        activation = {{ type = "relu" }}
        """
    )
    arguments = ["--config", "run.toml", "--tokens", "2000", "--eval-tokens", "0", "--out", "out"]
    unweave("train", *arguments, cwd=tmp_path, check=0)
    names = sorted(p.name for p in (tmp_path / "out" / "saes" / "transformer.h.0").iterdir())
    assert names == ["00_topk", "01_relu"]


def test_a_gated_sae_from_the_line(tmp_path, text):
    small = [a for a in SMALL if a not in ("--k", "8")]
    more = ["--activation", "gated", "--l1", "2", "--matryoshka", "0.25", "128", "--pre-act", "1e-5"]
    unweave("train", "--data", text, *small, *more, "--eval-tokens", "1000", "--out", "run", cwd=tmp_path, check=0)
    sae = SAE.load(tmp_path / "run" / "sae")
    assert sae.activation.name == "gated"
    assert sae.metadata["matryoshka_widths"] == [64, 128, 256]
    assert (tmp_path / "run" / "eval.json").exists()


def test_objectives_from_the_line_and_the_file(tmp_path):
    """What the line says of an objective is put into the file's table; the rest of the table stays."""
    from unweave.cli.train import TrainArgs
    from unweave.objectives import AuxK, GhostGradients, Matryoshka, MultiTopK

    path = tmp_path / "run.toml"
    path.write_text("[[saes]]\nmulti_topk = { k = 40, coefficient = 0.5 }\nmatryoshka = { prefixes = [0.25, 8192] }")
    (sae,) = TrainArgs(config=path, multi_topk=64, ghost=0.3).to_config().saes
    assert sae.multi_topk == MultiTopK(64, 0.5)
    assert sae.matryoshka == Matryoshka((0.25, 8192))
    assert (sae.ghost, sae.auxk) == (GhostGradients(0.3), AuxK(0))
    (sae,) = TrainArgs(matryoshka=(128.0, 1024.0)).to_config().saes
    assert sae.matryoshka.widths_for(4096) == (128, 1024, 4096)


def test_dry_run_spends_nothing(tmp_path, text):
    printed, _ = unweave("train", "--data", text, *SMALL, "--dry-run", cwd=tmp_path, check=0)
    assert "6,000 tokens in 12 steps" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hooks", "resid_post.9"], r"resid_post\.9.*resid_post\.3"),
        (["--hooks", "transformer.h.1.mpl"], "transformer.h.1.mlp"),
        (["--model", "no/such/model/here"], "no/such/model/here"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--data", "empty.txt"], "empty.txt"),
        (["--data", "short.txt"], "short.txt"),
        (["--k", "300"], "k=300.*256"),
        (["--d-sae", "0"], "d_sae.*0"),
        (["--activation", "relu"], "--k goes with"),
        (["--activation", "gated"], "--k goes with"),
        (["--matryoshka", "300"], "300 latents is wider"),
        (["--multi-topk", "8"], "above the first, 8"),
        (["--pre-act", "1"], "TopK ranks"),
        (["--config", "bad.toml"], "did you mean 'hooks'"),
        (["--config", "broken.toml"], r"broken\.toml.*line 2"),
        (["--config", "program.py"], "program.py"),
        (["--config", "missing.toml"], "missing.toml"),
        (["--context", "100000"], "100000"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_wrong_input_is_one_sentence(tmp_path, text, arguments, message, capsys, monkeypatch):
    """Exit status 2, one line, nothing written. pitfall_357: a file that is broken, or a program, is an error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("A few words.")
    (tmp_path / "broken.toml").write_text("hooks = []\ntokens = = 5")
    (tmp_path / "program.py").write_text("open('was_run', 'w')")
    (tmp_path / "bad.toml").write_text('hook = ["resid_post.1"]')
    before = sorted(os.listdir(tmp_path))
    status = main(["train", "--data", text, *SMALL, "--out", "out", *arguments])
    errors = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert len(errors) == 1, errors
    assert re.search(message, errors[0])
    assert sorted(os.listdir(tmp_path)) == before


def test_eval_names_the_nearest_folder_or_release(run_folder, tmp_path, capsys, monkeypatch):
    folder, _ = run_folder
    monkeypatch.chdir(folder.parent)
    for given, said in {
        "nosuch": "there is no folder 'nosuch', and no release of this name.",
        "gpt2-smal-res-jb": "no release of this name; did you mean 'gpt2-small-res-jb'",
        "gpt2-small-res-jb": "'gpt2-small-res-jb' is a release on the Hub, and a folder is needed: ",
        "run/sea": "there is no folder 'run/sea', and no release of this name; did you mean 'run/sae'",
        "run": "the folder 'run' has no SAE in it; there is one in 'run/sae'.",
        str(tmp_path): "has no SAE in it (cfg.json is missing), and none below it.",
    }.items():
        for command in ("eval", "dashboard"):
            assert main([command, given]) == 2
            errors = capsys.readouterr().err.splitlines()
            assert len(errors) == 1
            assert said in errors[0]


def test_convert_names_the_nearest_folder_or_release(run_folder, capsys, monkeypatch):
    monkeypatch.chdir(run_folder[0].parent)
    for given, said in {
        "nosuch": "there is no folder 'nosuch', and no release of this name.",
        "run/sea": "there is no folder 'run/sea', and no release of this name; did you mean 'run/sae'",
        "gpt2-small-res-jb": "'gpt2-small-res-jb' is a release on the Hub, and a folder is needed: ",
    }.items():
        assert main(["convert", given, "out", "--to", "sparsify"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_eval_takes_every_format_but_no_file(run_folder, tmp_path, capsys):
    sae = str(run_folder[0] / "sae")
    started("convert", sae, "an ae", "--to", "dictionary_learning", cwd=tmp_path)
    options = ["--model", "demo", "--data", "stdlib", "--hook", "resid_post.1", "--tokens", "200"]
    assert main(["eval", str(tmp_path / "an ae"), *options]) == 0
    assert (tmp_path / "an ae" / "eval.json").is_file()
    capsys.readouterr()
    assert main(["eval", f"{sae}/cfg.json"]) == 2
    assert "cfg.json' is a file, and the folder of an SAE is needed." in capsys.readouterr().err


def test_info_of_a_trained_sae(run_folder, capsys):
    """A short table with what was measured, and no JSON in it; all of it with --json."""
    sae = str(run_folder[0] / "sae")
    assert main(["info", sae]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 15
    assert not set('{"') & set(shown)
    for expected in (r"^what +SAE topk\(k=8\)", r"^model +demo", r" W_enc 224×256  W_dec 256×224  b_dec 224  float32",
                     r"^trained on +6,000 tokens", r"^measured on .* held.out tokens .*variance \d"):  # fmt: skip
        assert re.search(expected, shown, re.MULTILINE | re.IGNORECASE), (expected, shown)
    assert main(["info", sae, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["d_sae"], said["shapes"]["W_dec"], said["activation"]["k"]) == (256, [256, 224], 8)
    assert said["metadata"]["training"]["lr"] is None
    assert said["results"][0]["metrics"]


@pytest.mark.slow
def test_demo(tmp_path):
    """What the README promises: quality at L0 of at most 32 on held-out text, few dead latents, a page."""
    unweave("demo", "--out", "demo", cwd=tmp_path, check=0)
    assert {p.name for p in (tmp_path / "demo").iterdir()} >= {"sae", "eval.json", "metrics.jsonl", "features.html"}
    metrics = json.loads((tmp_path / "demo" / "eval.json").read_text())["eval_result_metrics"]
    assert metrics["sparsity"]["l0"] <= 32
    assert metrics["reconstruction_quality"]["explained_variance"] >= 0.75
    assert metrics["model_performance_preservation"]["ce_loss_score"] >= 0.90
    assert metrics["misc_metrics"]["frac_alive"] >= 0.95
