"""`unweave cache` and `unweave train` on a cache, some of them real processes that are killed without warning."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unweave import open_cache
from unweave.cli import main

TOKENS = 6000
CACHE = ["--hooks", "resid_post.1", "resid_post.2", "--tokens", TOKENS, "--context", 64, "--shard-mb", 0.4,
         "--prompts-per-pass", 4]  # fmt: skip
TRAIN = ["--hooks", "resid_post.1", "--tokens", 30_000, "--d-sae", 256, "--k", 8, "--batch-size", 256,
         "--checkpoint-every", 2048, "--eval-tokens", 0]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from unweave.activations import standard_library_text

    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    documents = (t for t, _ in zip(standard_library_text(), range(120), strict=False))
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents), encoding="utf-8")
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "unweave", *map(str, arguments)]


def unweave(*arguments: object, check: int = 0) -> None:
    """A command in this process, which saves the seconds that a new one takes to start."""
    assert main([str(argument) for argument in arguments]) == check


def killed(arguments: list[object], when: Callable[[], bool], after: float) -> None:
    """Start a command, and kill it some time after something has happened."""
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not when():
            time.sleep(0.005)
        time.sleep(after)
    finally:
        process.kill()
        process.wait()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    out = tmp_path_factory.mktemp("whole") / "cache"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        unweave("cache", "--data", text, "--out", out, *CACHE)
    assert f"{TOKENS:,} tokens for training, 300 held out" in printed.getvalue()
    assert "shuffle: entropy over documents" in printed.getvalue()
    return out


def test_what_was_cached_is_trained_on_and_evaluated(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = open_cache(whole, verify=True)
    assert cache.hooks == ("transformer.h.1", "transformer.h.2")
    assert len(cache.manifest["sides"]["train"]["shards"]) > 3
    out = tmp_path / "run"
    unweave("train", "--data", whole, "--out", out, *TRAIN[:-1], 1000)
    printed = capsys.readouterr()
    assert "of a cache" in printed.err
    assert "held-out tokens of" in printed.out
    assert json.loads((out / "eval.json").read_text())
    unweave("eval", out / "sae", "--tokens", 500)
    assert "transformer.h.1 of demo" in capsys.readouterr().out


def test_without_held_out_rows_nothing_is_evaluated(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unweave("cache", "--data", text, "--out", tmp_path / "cache", *CACHE[:4], 500, "--held-out-tokens", 0)
    few = ["--hooks", "resid_post.1", "--tokens", 300, "--d-sae", 32, "--k", 4, "--batch-size", 100]
    unweave("train", "--data", tmp_path / "cache", "--out", tmp_path / "run", *few)
    assert "has no held-out rows" in capsys.readouterr().err
    assert (tmp_path / "run" / "sae").is_dir()


def test_one_sentence_for_what_is_wrong(
    whole: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(whole, bad)
    (bad / "train_00001" / "positions.npy").unlink()
    for arguments, sentence in (
        (["train", "--data", bad, "--out", tmp_path / "x", *TRAIN], "train_00001/positions.npy is missing"),
        (["cache", "--data", text, "--out", whole, *CACHE], "holds this cache already, finished"),
        (["cache", "--data", text, "--out", tmp_path / "y", *CACHE, "--positions", "64:"], "keeps nothing"),
    ):
        unweave(*arguments, check=2)
        printed = capsys.readouterr().err.strip().splitlines()
        assert sentence in printed[-1]
        assert printed[-1].startswith("unweave: ")


def _kill_and_resume_caching(whole: Path, text: Path, out: Path, moment: random.Random) -> None:
    arguments = ["cache", "--data", text, "--out", out, *CACHE]
    shards = moment.randrange(6)
    begun: list[Callable[[], bool]] = [
        lambda: (out / "manifest.json").exists(),
        lambda: (out / "tokens").exists(),
    ]
    when = begun[shards] if shards < 2 else lambda: len(list(out.glob("train_*"))) >= shards - 1
    killed(arguments, when, moment.random() * 0.2)
    unweave(*arguments, "--resume")
    assert files_of(out) == files_of(whole)


def test_a_cache_that_was_killed_goes_on_to_the_same_bytes(whole: Path, text: Path, tmp_path: Path) -> None:
    _kill_and_resume_caching(whole, text, tmp_path / "cache", random.Random(1))


def _kill_and_resume_training(cache: Path, trained: Path, out: Path, moment: random.Random) -> None:
    arguments = ["train", "--data", cache, "--out", out, *TRAIN]
    checkpoints = moment.randrange(1, 10)
    seen: set[str] = set()

    def far_enough() -> bool:
        seen.update(path.name for path in (out / "checkpoints").glob("step-*"))
        return len(seen) >= checkpoints

    killed(arguments, far_enough, moment.random() * 0.1)
    if not (out / "sae").exists():  # or it was too late to kill it
        unweave(*arguments, "--resume")
    assert files_of(out / "sae") == files_of(trained / "sae")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    unweave("train", "--data", whole, "--out", out, *TRAIN)
    return out


def test_training_on_a_cache_that_was_killed_goes_on_to_the_same_bits(
    whole: Path, trained: Path, tmp_path: Path
) -> None:
    _kill_and_resume_training(whole, trained, tmp_path / "run", random.Random(0))


def test_info_compares_checksums(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of caches and of token folders; a byte that changed in place is found by nothing else."""
    unweave("info", whole, "--verify")
    unweave("info", whole / "tokens", "--verify")
    assert capsys.readouterr().out.count("all as they were written") == 2
    bad = tmp_path / "bad"
    shutil.copytree(whole, bad)
    for name in ("train_00001/positions.npy", "tokens/train_00000.npy"):
        content = bytearray((bad / name).read_bytes())
        content[-1] ^= 1
        (bad / name).write_bytes(content)
    unweave("info", bad)
    capsys.readouterr()
    unweave("info", bad, "--verify", check=2)
    assert "train_00001/positions.npy, tokens/train_00000.npy changed after being written" in capsys.readouterr().err
    unweave("info", tmp_path, "--verify", check=2)
    assert "is no cache or token folder" in capsys.readouterr().err


def test_a_finished_run_is_only_evaluated_where_that_is_missing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed while it was evaluated, a run has its SAE and no eval.json."""
    arguments = ["train", "--data", whole, "--out", tmp_path / "run", *TRAIN[:-1], 500]
    arguments[arguments.index("--tokens") + 1] = 2000
    unweave(*arguments)
    evaluation = tmp_path / "run" / "eval.json"
    before = json.loads(evaluation.read_text())["eval_result_metrics"]
    evaluation.unlink()
    unweave(*arguments, "--resume")
    assert json.loads(evaluation.read_text())["eval_result_metrics"] == before
    made = evaluation.stat().st_mtime_ns
    unweave(*arguments, "--resume")
    assert evaluation.stat().st_mtime_ns == made
