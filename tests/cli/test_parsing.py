"""What was typed: options that are not there, values that are none, and help that fits the screen."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

from unweave.cli import COMMANDS, FILES, main
from unweave.cli.parsing import _sentence, options


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("trian", "there is no command 'trian'; did you mean 'train'?"),
        ("zzz", "there is no command 'zzz'; see `unweave --help`."),
        ("--tokens 5", "the first word is a command, not '--tokens'; see `unweave --help`."),
        ("train --tokns 100", "train has no option --tokns; did you mean '--tokens'?"),
        ("train --tokns=100", "train has no option --tokns; did you mean '--tokens'?"),
        ("eval x --k 5", "eval has no option --k; see `unweave eval --help`."),
        ("cache --tokns 100", "cache has no option --tokns; did you mean '--tokens'?"),  # before what is missing
        ("train -t 5", "train has no option -t; see `unweave train --help`."),
        ("synth --train", "synth has no option --train; did you mean '--no-train'?"),
        ("train extra", "train does not know what to do with 'extra'; see `unweave train --help`."),
        ("train --tokens", "--tokens needs a value; see `unweave train --help`."),
        ("train --tokens many", "--tokens cannot be 'many'; it takes a whole number."),
        ("train --tokens 2,000,000", "--tokens cannot be '2,000,000'; it takes a whole number, such as 2000000."),
        ("train --lr fast", "--lr cannot be 'fast'; it takes a number."),
        ("eval x --tokens 1.5", "--tokens cannot be '1.5'; it takes a whole number."),
        ("plan --seconds long", "--seconds cannot be 'long'; it takes a number."),
        ("plan --cache-dtype int", "--cache-dtype cannot be 'int'; it is one of bfloat16, float16, float32, int8; did "
                                   "you mean 'int8'?"),
        ("train --normalize scaler", "--normalize cannot be 'scaler'; it is one of center, constant_norm_rescale, "
                                     "layer_norm, scalar, whiten; did you mean 'scalar'?"),
        ("eval", "eval needs FOLDER; see `unweave eval --help`."),
        ("push x", "push needs OWNER/NAME; see `unweave push --help`."),
        ("cache", "cache needs --hooks NAME ... and --tokens N; see `unweave cache --help`."),
        ("convert", "convert needs SOURCE and DESTINATION and --to FORMAT; see `unweave convert --help`."),
        ("convert a b saev", "convert needs --to FORMAT; see `unweave convert --help`."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(
    typed: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pitfall_368"""
    monkeypatch.setenv("COLUMNS", "60")  # where tyro breaks its lines is not to matter
    assert main(typed.split()) == 2
    assert capsys.readouterr().err == f"unweave: {said}\n"


def test_a_box_with_borders() -> None:
    """tyro draws them on some terminals, and none on others."""
    box = """
╭─ Required options ───────────────────╮
│ Missing from unweave cache:          │
│     --hooks NAME ...                 │
│         Where to take activations    │
│     --tokens N                       │
│         Tokens to store. (required)  │
│ ──────────────────────────────────── │
│ For full helptext, run:              │
│     unweave cache --help             │
╰──────────────────────────────────────╯
"""
    for drawn in (box, re.sub("[│╭╮╰╯]", " ", box.replace("─", "-"))):
        expected = "cache needs --hooks NAME ... and --tokens N; see `unweave cache --help`."
        assert _sentence("cache", drawn) == expected
    assert _sentence("cache", "Something else.") is None


def test_both_spellings_and_an_equals_sign_are_options() -> None:
    """Of a command that would fail later, for another reason."""
    for typed in ("--d_sae 0", "--d-sae 0", "--d-sae=0", "--d_sae=0"):
        assert main(["train", *typed.split(), "--dry-run"]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_help(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the other way round: what is refused as unknown is what tyro does not know."""
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    module = import_module(f"unweave.cli.{FILES.get(command, command)}")
    listed = set(re.findall(r"^[│ ] (?:-h, )?(--[\w-]+)", shown, re.MULTILINE))
    assert listed == {*options(getattr(module, COMMANDS[command][0])), "--help"}
    assert shown.startswith(f"usage: unweave {command} ")


@pytest.mark.parametrize("typed", [["--help"], ["-h"], []])
def test_the_commands_fit_a_small_screen(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(typed) == (0 if typed else 2)
    printed = capsys.readouterr()
    lines = (printed.out if typed else printed.err).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert all(sum(line.split()[:1] == [name] for line in lines) == 1 for name in COMMANDS)
    (example,) = [line.partition("example:")[2].split() for line in lines if "example:" in line]
    known = set(options(import_module(f"unweave.cli.{example[1]}").TrainArgs))
    assert {word for word in example if word.startswith("--")} <= known


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    import unweave

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"unweave {unweave.__version__}\n"
