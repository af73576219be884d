"""`unweave info` of caches, of tokens, and of the folders that hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unweave.cli import main

TEXT = "".join(
    json.dumps({"text": f"document {i} has a few words in it, and then some more"}) + "\n" for i in range(60)
)


def test_a_cache_and_its_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jsonl").write_text(TEXT)
    made = ["cache", "--hooks", "resid_post.1", "--data", str(tmp_path / "text.jsonl"), "--context", "16"]
    assert main([*made, "--tokens", "300", "--held-out-tokens", "20", "--out", str(tmp_path / "cache")]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "cache")]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["what"].strip() == "cached activations"
    assert shown["model"].strip() == "demo"
    assert shown["hooks"].strip() == "transformer.h.1 (width 224)"
    assert shown["holds"].strip() == "300 tokens for training, 20 tokens held out"
    assert shown["type"].strip() == "bfloat16"
    assert main(["info", str(tmp_path / "cache"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["hooks"], said["train_rows"], said["complete"]) == ({"transformer.h.1": 224}, 300, True)
    assert said["bytes"] == sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file())

    tokens = tmp_path / "cache" / "tokens"
    assert main(["info", str(tokens)]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["what"].strip() == "text as tokens"
    assert "rows of 16 tokens for training" in shown["holds"]

    manifest = json.loads((tokens / "manifest.json").read_text())
    (tokens / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    assert main(["info", str(tokens)]) == 0
    assert "text as tokens, unfinished" in capsys.readouterr().out
    (tokens / "manifest.json").write_text(json.dumps(manifest | {"sides": 3}))
    assert main(["info", str(tokens)]) == 2
    assert "manifest.json' is damaged" in capsys.readouterr().err


def test_json_is_of_one_thing(capsys: pytest.CaptureFixture[str]) -> None:
    for typed in (["info", "--json"], ["info", "--json", "--releases", "gpt2"]):
        assert main(typed) == 2
        assert "--json prints what one SAE or one folder is" in capsys.readouterr().err
