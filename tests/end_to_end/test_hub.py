"""The Hub from the command line, in processes of their own, as a user would have it set up in the environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unweave import SAE, TopK
from unweave.cli import main

HOOK = "blocks.1.hook_resid_post"


def run(*arguments: str) -> str:
    """What a process prints."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_push_look_and_load(hub: Any, tmp_path: Path) -> None:
    sae = SAE(16, 64, TopK(4), metadata={"hook_name": HOOK, "model_name": "gpt2"})
    sae.save(tmp_path / "sae")
    printed = run("-m", "unweave", "push", str(tmp_path / "sae"), "me/saes", "--private", "--license", "mit")
    assert printed == f"pushed {hub.url}/me/saes/tree/main/{HOOK}\n"
    assert hub.repos["model", "me/saes"].private

    program = (
        "import json, torch, unweave as uw\nfrom unweave.cli import main\n"
        f"assert main(['info', 'me/saes', {HOOK!r}]) == 0\n"
        f"sae = uw.SAE.from_pretrained('me/saes', {HOOK!r})\n"
        "x = torch.linspace(-1, 1, 32).reshape(2, 16)\n"
        "print(json.dumps([sae.encode(x).tolist(), sae.metadata['source']['repo']]))"
    )
    *shown, last = run("-c", program).splitlines()
    assert {"topk(k=4)", "16×64"} <= set(" ".join(shown).split())
    codes, repo = json.loads(last)
    x = torch.linspace(-1, 1, 32).reshape(2, 16)
    torch.testing.assert_close(torch.tensor(codes), sae.encode(x).detach())
    assert repo == "me/saes"


def test_errors_are_one_sentence(hub: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(tmp_path), "me/saes"]) == 2
    assert capsys.readouterr().err.startswith(f"unweave: '{tmp_path}' holds nothing that can be pushed")
    assert main(["info", "me/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("unweave: there is no repository 'me/nowhere', or it is private and")
    assert main(["info"]) == 2
    assert capsys.readouterr().err.startswith("unweave: name a release, a repository or a path")


def test_the_directory_needs_no_network(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["gemma transcoder 270m"], ["gemma", "transcoder", "270m"]):
        assert main(["info", "--releases", *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1 + 4
        assert all(line.split()[0].startswith("gemma-scope-2-270m") for line in lines[1:])
    assert main(["info", "--releases"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 170  # each on a line of its own
    assert main(["info", "--releases", "gtp2"]) == 2
    assert capsys.readouterr().err.startswith("unweave: no release matches 'gtp2'; did you mean")
    assert main(["info", "gpt2-small-res-jb"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("gpt2-small-res-jb: gpt2-small, saelens, jbloom/GPT2-Small-SAEs-Reformatted on the Hub")
    assert "blocks.8.hook_resid_pre " in listed
