"""Commands that write delete and overwrite nothing that is not theirs, whatever --overwrite says."""

import json
from pathlib import Path

import pytest

from unweave.cli import main

COMMANDS = {
    "train": ["train", "--overwrite"],
    "demo": ["demo", "--overwrite"],
    "demo-vision": ["demo", "--vision", "--overwrite"],
    "synth": ["synth", "independent", "--overwrite"],
    "cache": ["cache", "--hooks", "resid_post.1", "--tokens", "100"],
    "cache-resumed": ["cache", "--hooks", "resid_post.1", "--tokens", "100", "--resume"],
    "tokenize": ["tokenize", "stdlib"],
    "tokenize-resumed": ["tokenize", "stdlib", "--resume"],
}
FOREIGN = {
    "a text": {"thesis.tex": "\\section{One}"},
    "a model": {"config.json": json.dumps({"model_type": "gpt2"}), "model.safetensors": "weights"},
    "results": {"results.json": json.dumps({"accuracy": 1}), "model/weights.bin": "weights", "metrics.jsonl": "{}"},
    "SAEs": {"saes/mine/notes.txt": "mine", "checkpoints/step-000000001/state.pt": "state"},
    "pictures": {"pictures/holiday.png": "a beach"},
}


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_folder_of_somebody_else_is_refused(
    command: list[str], foreign: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in foreign.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert main([*command, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert str(tmp_path) in said
    assert contents(tmp_path) == foreign


def test_a_page_replaces_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.html").write_text("<title>My thesis</title>")
    for out, why in (("thesis.html", "is no page of features"), ("", "is a folder")):
        assert main(["dashboard", str(tmp_path), "--out", str(tmp_path / out)]) == 2
        assert why in capsys.readouterr().err
    assert contents(tmp_path) == {"thesis.html": "<title>My thesis</title>"}
