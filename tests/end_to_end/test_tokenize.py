"""`unweave tokenize` as a user types it: killed at any moment, it goes on and ends in the same bytes."""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from unweave.activations import TokenRows, standard_library_text
from unweave.activations.config import DataConfig
from unweave.activations.tokenized import open_token_folder, tokenize
from unweave.cli import main
from unweave.sae import SAE

# The command commits all the time, so that little data have many moments to be killed in.
OFTEN = {"COMMIT_SECONDS": 0.0, "CHUNK_DOCUMENTS": 4, "CHUNK_CHARS": 1 << 14}
COMMAND = f"""
import sys
from unweave.activations.tokenized import tokenize
from unweave.cli import main
vars(tokenize).update({OFTEN})
if __name__ == "__main__":
    sys.exit(main(["tokenize", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, bad_text: Path) -> tuple[Path, str, str]:
    """An uninterrupted run: where it was, and what it printed."""
    folder, out, errors = tmp_path_factory.mktemp("whole"), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        for name, value in OFTEN.items():
            patch.setattr(tokenize, name, value)
        patch.chdir(folder)
        assert main(["tokenize", str(bad_text), "--out", "t", "--saelens", "s", "--context", "32"]) == 0
    return folder, out.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def whole(run: tuple[Path, str, str]) -> dict[str, bytes]:
    """What an uninterrupted run ends in."""
    return contents(run[0] / "t")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    (cwd / "command.py").write_text(COMMAND)
    command = [sys.executable, "command.py", *map(str, arguments), "--context", "32"]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed_again_and_again(bad_text: Path, cwd: Path, seed: int, kills: int, *options: str) -> int:
    """Kill the command at random moments after it began to write, and resume it. Returns how often it was killed."""
    moments, n = random.Random(seed), 0
    while True:
        resume = ["--resume"] if (cwd / "t").exists() else []
        process = start(bad_text, "--out", "t", *resume, *options, cwd=cwd)
        before = (cwd / "t" / "progress.json").stat().st_mtime_ns if (cwd / "t" / "progress.json").exists() else 0
        if n < kills:
            while process.poll() is None:
                progress = cwd / "t" / "progress.json"
                if progress.exists() and progress.stat().st_mtime_ns != before:
                    time.sleep(moments.uniform(0, 0.1))
                    break
                time.sleep(0.001)
            process.kill()
        _, errors = process.communicate(timeout=120)
        if process.returncode == 0:
            return n
        assert process.returncode == -signal.SIGKILL, errors
        n += 1


def test_killed_it_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, bad_text: Path, whole: dict[str, bytes]) -> None:
    assert killed_again_and_again(bad_text, tmp_path, seed=0, kills=1) > 0
    assert contents(tmp_path / "t") == whole


def test_what_it_says_and_writes(run: tuple[Path, str, str]) -> None:
    where, out, errors = run
    folder = open_token_folder(where / "t", verify=True)
    assert f"saved t: {folder.n_rows():,} rows of 32 tokens for training" in out
    assert "skipped 2 documents that cannot be read" in errors
    assert "1.jsonl, line 22, holds a value of type int" in errors
    assert (where / "s" / "sae_lens.json").exists()
    assert len(TokenRows(where / "t", None, DataConfig(context=32), held_out=True).next_rows(10)) == 10


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, bad_text: Path) -> None:
    text = tmp_path / "text"  # so much that it is not done with before the signal comes, however busy the machine is
    text.mkdir()
    for i in range(20):
        for file in bad_text.iterdir():
            shutil.copy(file, text / f"{i}-{file.name}")
    process = start(text, "--out", "t", cwd=tmp_path)
    while process.poll() is None and not (tmp_path / "t" / "progress.json").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped; go on with --resume --out t" in errors


def test_what_was_tokenised_is_trained_on_as_it_was_laid_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shorter rows and another held-out share than the defaults are the folder's to say, in all that follows."""
    text = tmp_path / "text.jsonl"
    documents = [text[:600] for text, _ in zip(standard_library_text(), range(60), strict=False)]
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents), encoding="utf-8")
    few = ["--tokens", "400", "--d-sae", "32", "--k", "4", "--batch-size", "200", "--buffer", "400"]
    few += ["--prompts-per-pass", "4", "--eval-tokens", "0"]
    tokens, run = str(tmp_path / "t"), str(tmp_path / "run")
    assert main(["tokenize", str(text), "--context", "32", "--held-out", "0.3", "--out", tokens]) == 0
    assert main(["train", "--data", tokens, "--out", run, *few]) == 0
    metadata = SAE.load(tmp_path / "run" / "sae").metadata
    assert (metadata["context_size"], metadata["text"]["held_out"]) == (32, 0.3)
    capsys.readouterr()
    assert main(["train", "--data", tokens, "--held-out", "0.1", "--out", f"{run}2", *few]) == 2
    assert "made with held_out=0.3, and held_out=0.1 was asked for" in capsys.readouterr().err
    assert main(["eval", f"{run}/sae", "--data", tokens, "--held-out", "0.1", "--tokens", "300"]) == 2
    assert "made with held_out=0.3, and held_out=0.1 was asked for" in capsys.readouterr().err
