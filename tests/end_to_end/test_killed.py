"""`kill -9` at twenty moments of tokenising, caching and training: each goes on, and ends as if nothing had happened.

See `Killer` in conftest.py. Tokenising with processes of its own is killed less often, as these take many times as long
to start as to write. One kill of each command, of a process that was started from nothing, is in the tests of the
commands, which are not slow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the commands are forked from one process"),
]

Killer = Callable[..., None]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def holds(folder: Path, name: str) -> bool:
    """Whether a folder, which may vanish meanwhile, holds something whose name begins so."""
    try:
        return any(each.startswith(name) for each in os.listdir(folder))
    except FileNotFoundError:
        return False


def read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())  # type: ignore[no-any-return]
    except FileNotFoundError:
        return {}


@pytest.mark.parametrize("processes", [1, 2])
def test_tokenising(killer: Killer, bad_text: Path, processes: int) -> None:
    def phase(out: Path) -> str:
        state = read(out / "progress.json").get("state") or {}
        if (out / "manifest.json").exists() or state.get("part") == 4:  # the files are read, and it finishes the folder
            return "after"
        return "during" if state else "before"

    # It commits all the time, so that little text has many moments to be killed in.
    module = "unweave.activations.tokenized.tokenize"
    often = {f"{module}.COMMIT_SECONDS": 0.0, f"{module}.CHUNK_DOCUMENTS": 4, f"{module}.CHUNK_CHARS": 1 << 14}
    killer(
        lambda out: ["tokenize", bad_text, "--context", 32, "--processes", processes, "--out", out],
        phase=phase, result=files_of, settings=often, seed=processes,
        kills=20 if processes == 1 else 6,  # each start of two processes takes many seconds
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["text", "images"])
def test_caching(killer: Killer, bad_text: Path, kind: str) -> None:
    def phase(out: Path) -> str:
        if read(out / "manifest.json").get("complete"):
            return "after"
        return "during" if holds(out, "train_") else "before"

    of_text = ["--data", bad_text, "--hooks", "resid_post.1", "resid_post.2", "--tokens", 12_000, "--context", 64]
    of_images = ["--data", "digits", "--model", "demo-vit", "--hooks", "resid_post.1", "--tokens", 20_000]
    small = ["--shard-mb", 0.4, "--prompts-per-pass", 4 if kind == "text" else 16]
    killer(
        lambda out: ["cache", *(of_text if kind == "text" else of_images), *small, "--out", out],
        phase=phase, result=files_of, seed=len(kind),
    )  # fmt: skip


@pytest.mark.parametrize("source", ["text", "cache"])
def test_training(killer: Killer, commands: Any, bad_text: Path, source: str, tmp_path: Path) -> None:
    """SAEs, metrics and evaluation; of the metrics all but the speed, of the evaluation what was measured."""
    data = bad_text
    if source == "cache":
        data = tmp_path / "data"
        made = ["--data", bad_text, "--hooks", "resid_post.1", "--tokens", 10_000, "--context", 64]
        commands.start(["cache", *made, "--out", data], {})
        assert commands.wait() == 0

    def phase(out: Path) -> str:
        if holds(out / "sae", "sae_weights"):
            return "after"
        return "during" if holds(out / "checkpoints", "step-") else "before"

    def result(out: Path) -> dict[str, Any]:
        files: dict[str, Any] = files_of(out)
        rows = [json.loads(line) for line in files.pop("metrics.jsonl").splitlines()]
        own: tuple[str, ...] = ("config.json", "eval.json")
        assert set(own) < set(files)
        return {name: data for name, data in files.items() if name not in own} | {
            "rows": [row | {"tokens_per_second": 0} for row in rows],
            "measured": read(out / "eval.json")["eval_result_metrics"],
        }

    few = ["--hooks", "resid_post.1", "--tokens", 40_000, "--d-sae", 256, "--k", 8, "--batch-size", 256]
    few += ["--checkpoint-every", 2048, "--eval-tokens", 2000]
    few += ["--context", 64, "--buffer", 2048] if source == "text" else []
    killer(lambda out: ["train", "--data", data, *few, "--out", out], phase=phase, result=result, seed=len(source))
