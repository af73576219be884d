"""pitfall_020, pitfall_373: no option is parsed and then ignored."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from unweave.cli import COMMANDS, FILES
from unweave.cli.evaluate import source_of
from unweave.cli.train import TrainArgs

RELU, TRANSCODER = {"activation": "relu"}, {"target": ("mlp_out.1",)}
# Of each option of `train` a value that is not its default, and the options that it needs.
CHANGED: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": ("gpt2", {}), "data": ("text.txt", {}), "hooks": (("resid_post.0",), {}), "target": (("mlp_out.1",), {}),
    "coder": ("crosscoder", {}), "skip": (True, TRANSCODER), "tokens": (77, {}), "out": ("elsewhere", {}),
    "recipe": ("topk", {"d_sae": 128, "tokens": 4096}), "d_sae": (128, {}), "activation": ("relu", {}), "k": (5.0, {}),
    "end_to_end": ("ce", {}), "downstream": (("resid_post.2",), {}), "l1": (3.0, RELU), "target_l0": (9.0, RELU),
    "matryoshka": ((0.5,), {}), "multi_topk": (64, {}), "pre_act": (1.0, RELU), "ghost": (1.0, {}),
    "normalize": ("whiten", {}), "lr": (0.1, {}), "precision": ("fp32", {}), "batch_size": (99, {}),
    "context": (33, {}), "column": ("body", {}), "max_bad": (7, {}), "streaming": (True, {}), "held_out": (0.3, {}),
    "buffer": (8192, {}), "prompts_per_pass": (3, {}), "model_precision": ("fp32", {}), "checkpoint_every": (5000, {}),
    "seed": (1, {}), "glu": (True, {}), "device": ("cpu", {}), "model_device": ("cpu", {}),
}  # fmt: skip
# What the command does with the settings; tests/end_to_end/test_cli.py looks at each.
ACTIONS = {"eval_tokens", "resume", "overwrite", "dry_run"}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TrainArgs) if f.name not in {"config", *ACTIONS}])
def test_every_setting_of_train_changes_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Some words.", encoding="utf-8")
    assert name in CHANGED, f"give CHANGED a value of --{name} that is not its default"
    value, needs = CHANGED[name]
    plain = TrainArgs(**needs).to_config()
    assert TrainArgs(**needs | {name: value}).to_config() != plain
    assert TrainArgs(**needs).to_config() == plain


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("tokens = 77", encoding="utf-8")
    assert TrainArgs(config=tmp_path / "run.toml").to_config().tokens == 77


def names_used(source: str) -> set[str]:
    """Attributes that are looked up, and strings, by which `getattr` may find them."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_is_looked_at(command: str) -> None:
    kind = getattr(import_module(f"unweave.cli.{FILES.get(command, command)}"), COMMANDS[command][0])
    files = {inspect.getfile(part) for part in kind.__mro__[:-1]}
    if command == "dashboard":  # which takes its data as `eval` does
        files.add(inspect.getfile(source_of))
    used = set().union(*(names_used(Path(file).read_text(encoding="utf-8")) for file in files))
    assert {field.name for field in dataclasses.fields(kind)} - used == set()
