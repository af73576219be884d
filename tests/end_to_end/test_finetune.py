"""`unweave finetune` and `unweave train --end-to-end` as a user types them; some are killed without warning."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unweave.cli import main
from unweave.cli.train import TrainArgs
from unweave.objectives import EndToEnd
from unweave.sae import SAE, MatchingPursuit, Temporal, TemporalSAE, TopK, Transcoder
from unweave.training import SAEConfig, train_on

SMALL = ["--tokens", "2000", "--batch-size", "256", "--context", "32"]
FRESH = ["--d-sae", "64", "--k", "4", "--buffer", "1024", "--eval-tokens", "0"]


def unweave(*arguments: object, check: int = 0) -> None:
    """A command in this process, which saves the seconds that a new one takes to start."""
    assert main([str(argument) for argument in arguments]) == check


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from unweave.activations import standard_library_text

    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    documents = (t[:4000] for t, _ in zip(standard_library_text(), range(60), strict=False))
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    out = tmp_path_factory.mktemp("first") / "run"
    unweave("train", "--data", text, *SMALL, *FRESH, "--lr", "2e-3", "--out", out)
    return out / "sae"


@pytest.mark.parametrize("what", ["scale", "end_to_end"])
def test_it_is_better_afterwards_and_the_other_commands_take_it(
    sae: Path, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model, data, hook and context are the SAE's own."""
    out = tmp_path / "run"
    small = ["--tokens", "2500", "--batch-size", "128", "--lr", "3e-3", "--eval-tokens", "1000"]
    unweave("finetune", sae, "--what", what, *small, "--out", out)
    printed = capsys.readouterr()
    assert re.search(r"100% of 2,500 tokens.*EV.*s left", printed.err)
    table = printed.out[printed.out.index("before") :]
    assert all(name in table for name in ("explained variance", "L0", "loss recovered", "loss with SAE"))
    names = ["config.json", "eval.json", "eval_before.json", "metrics.jsonl", "sae"]
    assert sorted(path.name for path in out.iterdir()) == names
    before, after = (json.loads((out / f"{name}.json").read_text()) for name in ("eval_before", "eval"))
    key = (
        ("model_behavior_preservation", "kl_div_with_sae")
        if what == "end_to_end"
        else ("reconstruction_quality", "mse")
    )
    values = [report["eval_result_metrics"][key[0]][key[1]] for report in (before, after)]
    assert values[1] < values[0]
    tuned = SAE.load(out / "sae")
    assert tuned.metadata["context_size"] == 32
    assert tuned.metadata["finetuning"]["method"] == what
    unweave("info", out / "sae")
    unweave("eval", out / "sae", "--tokens", "500")
    unweave("dashboard", out / "sae", "--tokens", "1000", "--features", "2", "--out", tmp_path / "page.html")


@pytest.mark.parametrize(
    ("hooks", "what"),
    [
        (["--hooks", "h.1.mlp:in", "--target", "h.1.mlp", "--skip"], "decoder"),
        (["--hooks", "resid_post.0", "resid_post.1", "--coder", "crosscoder"], "end_to_end"),
        (["--hooks", "h.1.mlp:in", "h.2.mlp:in", "--target", "h.1.mlp", "h.2.mlp", "--coder", "clt"], "scale"),
    ],
    ids=["transcoder", "crosscoder", "clt"],
)
def test_coders_of_every_kind(
    hooks: list[str], what: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """pitfall_177: what a run has saved is fine-tuned where it belongs, and compared at each hook that it predicts."""
    first, out = tmp_path / "first", tmp_path / "tuned"
    unweave("train", "--data", text, *SMALL, *FRESH, "--lr", "2e-3", *hooks, "--out", first)
    capsys.readouterr()
    small = ["--tokens", "1500", "--batch-size", "128", "--lr", "3e-3", "--eval-tokens", "400"]
    unweave("finetune", first / "sae", "--what", what, *small, "--out", out)
    printed = capsys.readouterr().out
    start, tuned = SAE.load(first / "sae"), SAE.load(out / "sae")
    assert type(tuned) is type(start)
    assert tuned.metadata["finetuning"]["method"] == what
    after = sorted(path.name for path in out.glob("eval*.json") if "before" not in path.name)
    before = sorted(path.name.replace("_before", "") for path in out.glob("eval_before*.json"))
    assert before == after
    assert len(after) == (1 if what == "decoder" else 2) == printed.count("loss recovered") // 2
    key = (
        ("model_behavior_preservation", "kl_div_with_sae")
        if what == "end_to_end"
        else ("reconstruction_quality", "mse")
    )
    sums = [0.0, 0.0]
    for name in after:
        for i, file in enumerate((name.replace("eval", "eval_before"), name)):
            sums[i] += json.loads((out / file).read_text())["eval_result_metrics"][key[0]][key[1]]
    assert sums[1] < sums[0]


@pytest.mark.parametrize("what", ["decoder", "end_to_end"])
def test_temporal_saes(text: Path, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """pitfall_177: by a folder and a name, on rows in the order of the text; and better afterwards."""
    from unweave.models import capture, load_model, resolve_hooks

    model, hook = load_model("demo"), "transformer.h.1"
    assert model.tokenizer is not None
    documents = (json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines())
    ids = [ids[i : i + 32] for ids in (model.tokenizer(t)["input_ids"] for t in documents) for i in (0, 32, 64)]
    rows = torch.tensor([row for row in ids if len(row) == 32])
    x = capture(model.module, resolve_hooks(model.module, [hook]), input_ids=rows)[hook]
    config = SAEConfig(d_sae=64, activation=TopK(4), temporal=Temporal(32, 2, 1, 8), lr=5e-3)
    (start,) = train_on([part.flatten(0, 1) for part in x.split(8) if len(part) == 8], [config], progress=False)
    start.metadata |= {"model_name": "demo", "hf_hook_name": hook, "dataset_path": str(text), "context_size": 32}
    start.save(tmp_path / "run" / "temporal")
    capsys.readouterr()
    small = ["--tokens", "2000", "--batch-size", "128", "--lr", "3e-3", "--eval-tokens", "400"]
    unweave("finetune", tmp_path / "run", "temporal", "--what", what, *small, "--out", tmp_path / "tuned")
    assert "loss recovered" in capsys.readouterr().out
    tuned = SAE.load(tmp_path / "tuned" / "sae")
    assert isinstance(tuned, TemporalSAE)
    metric = "kl_div_with_sae" if what == "end_to_end" else "mse"
    group = "model_behavior_preservation" if what == "end_to_end" else "reconstruction_quality"
    before, after = (
        json.loads((tmp_path / "tuned" / f"{name}.json").read_text())["eval_result_metrics"][group][metric]
        for name in ("eval_before", "eval")
    )
    assert after < before


def test_one_of_the_saes_of_a_run(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its path, or by the end of it beside the run's; without a name, one sentence says which there are."""
    run = tmp_path / "run"
    unweave("train", "--data", text, *SMALL, *FRESH, "--hooks", "resid_post.0", "resid_post.1", "--out", run)
    capsys.readouterr()
    small = ["--tokens", "300", "--batch-size", "128", "--what", "scale", "--eval-tokens", "0"]
    for arguments, message in (
        ([], r"has no SAE in it; there is one in '.*transformer.h.0/00_topk', '.*transformer.h.1/00_topk'\.$"),
        (["00_topk"], r"2 SAEs whose path ends in '00_topk'; there is 'saes/transformer.h.0/00_topk', '"),
        (
            ["transformer.h.7"],
            r"no SAE whose path ends in 'transformer.h.7'; there is 'saes/transformer.h.0/00_topk', ",
        ),
    ):
        unweave("finetune", run, *arguments, *small, "--out", tmp_path / "out", check=2)
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1
        assert re.search(message, errors[0]), errors
    unweave("finetune", run, "transformer.h.1/00_topk", *small, "--out", tmp_path / "named")
    unweave("finetune", run / "saes" / "transformer.h.1" / "00_topk", *small, "--out", tmp_path / "path")
    assert files_of(tmp_path / "named" / "sae") == files_of(tmp_path / "path" / "sae")
    assert SAE.load(tmp_path / "named" / "sae").metadata["hf_hook_name"] == "transformer.h.1"


def killed(arguments: list[object], when: Callable[[], bool]) -> None:
    command = [sys.executable, "-m", "unweave", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not when():
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


def test_killed_it_goes_on_to_the_same_bytes(sae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also without naming the SAE again; and another setting is refused."""
    arguments = ["finetune", sae, "--what", "end_to_end", *SMALL, "--checkpoint-every", "300", "--eval-tokens", "0"]
    unweave(*arguments, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    killed([*arguments, "--out", out], lambda: any((out / "checkpoints").glob("step-*")))
    capsys.readouterr()
    unweave(*arguments, "--lr", "1", "--out", out, "--resume", check=2)
    assert "has start={" in capsys.readouterr().err
    unweave("finetune", "--out", out, "--resume", "--eval-tokens", "0")
    assert files_of(out / "sae") == files_of(tmp_path / "whole" / "sae")


def test_training_end_to_end_from_the_line(text: Path, tmp_path: Path) -> None:
    """The file says it as the line does; that it survives kills is the slow test's."""
    unweave("train", "--data", text, *SMALL, *FRESH, "--downstream", "resid_post.2", "--out", tmp_path / "run")
    written = json.loads((tmp_path / "run" / "config.json").read_text())["end_to_end"]
    assert (written["kl"], written["downstream"], written["hooks"]) == (1.0, 1.0, ["resid_post.2"])
    assert SAE.load(tmp_path / "run" / "sae").metadata["training_tokens"] == 2000
    file = tmp_path / "run.toml"
    file.write_text('end_to_end = { kl = 1.0, downstream = 1.0, hooks = ["resid_post.2"] }')
    said = EndToEnd(kl=1.0, downstream=1.0, hooks=("resid_post.2",))
    assert TrainArgs(config=file).to_config().end_to_end == said
    assert TrainArgs(end_to_end="balanced").to_config().end_to_end == EndToEnd(beta=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["finetune", "train"])
def test_killed_at_twenty_moments(killer: Callable[..., None], sae: Path, text: Path, command: str) -> None:
    def phase(out: Path) -> str:
        if any((out / "checkpoints").glob("step-*")):
            return "during"
        return "after" if (out / "sae").is_dir() else "before"

    of_train = ["--data", text, *FRESH, "--end-to-end", "kl"]
    of_finetune = [sae, "--what", "decoder", "--eval-tokens", 0]
    more = ["--checkpoint-every", 300]
    killer(
        lambda out: [command, *(of_train if command == "train" else of_finetune), *SMALL, *more, "--out", out],
        phase=phase, result=lambda out: files_of(out / "sae"), seed=len(command),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the SAE"),
        (["nowhere"], "nowhere"),
        (["SAE", "--tokens", "0"], "tokens must be at least 1"),
        (["SAE", "--lr", "0"], "lr must be above 0"),
        (["SAE", "--checkpoint-every", "0"], "checkpoint_every must be at least 1"),
        (["SAE", "--hook", "resid_post.2"], "is of the hook"),
        (["SAE", "--hook", "transformer.h.1.mlp.act"], "width 224, and those at"),
        (["SAE", "--model", "demo-vit"], "demo-vit|transformer.h.1"),
        (["SAE", "--data", "missing.txt"], "missing.txt"),
        (["transcoder"], "does not say which hook it predicts; pass --target"),
        (["transcoder", "--target", "transformer.h.2"], "predicts activations of width 128, and those at"),
        (["pursuit"], "chooses each atom by what the atoms before it leave .* it can be trained end to end"),
        (["unknown"], "does not say which"),
        (["--resume"], "config"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_sentence(
    sae: Path, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    where = {"hf_hook_name": "transformer.h.1", "model_name": "demo", "dataset_path": "stdlib"}
    Transcoder(224, 128, 8, TopK(2), metadata=where).save("transcoder")
    SAE(224, 8, TopK(2)).save("unknown")
    SAE(224, 8, MatchingPursuit(2), metadata=where).save("pursuit")
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    unweave("finetune", *(str(sae) if each == "SAE" else each for each in arguments), check=2)
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1, errors
    assert re.search(message, errors[0])
    assert sorted(tmp_path.iterdir()) == before
