"""From what was typed to a command's arguments; what is wrong with it is said in one sentence.

tyro reads the arguments. What it says of wrong ones is a box of several lines, with the options of every command that
sound alike: here it becomes a sentence about this command. What has another form than expected is passed on as it is.
"""

from __future__ import annotations

import dataclasses
import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from difflib import get_close_matches
from itertools import takewhile
from typing import TypeVar, get_args, get_type_hints

from unweave._errors import UnweaveError, nearest

Args = TypeVar("Args")

_KINDS = {"INT": "a whole number", "FLOAT": "a number"}


def parse_arguments(command: str, kind: type[Args], typed: Sequence[str]) -> Args:
    """The arguments of a command, of the dataclass `kind`; `--help` prints them and ends the process, as tyro does.

    Raises:
        UnweaveError: There is an option that the command does not have, one without a value or with a wrong one, or
            something is missing or too much.
    """
    import tyro

    _check_options(command, kind, typed)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            made, rest = tyro.cli(
                kind, prog=f"unweave {command}", args=list(typed), return_unknown_args=True,
                config=(tyro.conf.FlagCreatePairsOff,),
            )  # fmt: skip
    except SystemExit as stop:
        text = said.getvalue()
        if stop.code and (sentence := _sentence(command, text)) is not None:
            raise UnweaveError(sentence) from None
        sys.stderr.write(text)
        raise
    if rest:
        words = " ".join(map(repr, rest))
        raise UnweaveError(f"{command} does not know what to do with {words}; see `unweave {command} --help`.")
    return made


def options(kind: type) -> Iterator[str]:
    """How the options of a command's dataclass are written on the line; arguments without a name are not among them."""
    import tyro

    (positional,) = get_args(tyro.conf.Positional[int])[1:]
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        if positional not in get_args(hints[field.name])[1:]:
            name = field.name.replace("_", "-")
            yield f"--no-{name}" if field.default is True else f"--{name}"


def _check_options(command: str, kind: type, typed: Sequence[str]) -> None:
    known = [*options(kind), "--help"]
    for word in typed:
        name = word.partition("=")[0].replace("_", "-")
        if (re.match(r"--[a-zA-Z]", name) and name not in known) or (re.fullmatch(r"-[a-zA-Z]", name) and name != "-h"):
            near = get_close_matches(name[2:], [option[2:] for option in known], n=1, cutoff=0.5)  # dashes are alike
            hint = f"; did you mean '--{near[0]}'?" if near else f"; see `unweave {command} --help`."
            raise UnweaveError(f"{command} has no option {name}{hint}")


def _sentence(command: str, box: str) -> str | None:
    """What tyro's box says, about this command; None if the box has another form."""
    # Where the terminal cannot draw a box, a space stands for its border.
    lines = [line[1:].rstrip("│ ") for line in box.splitlines() if line.startswith(("│", " "))]
    lines = [line for line in lines if line.strip("─- ")]
    more = f"; see `unweave {command} --help`."
    if any(f"Missing from unweave {command}:" in line for line in lines):
        missing = takewhile(lambda line: "Unrecognized" not in line, lines)  # what is too much comes below
        needed = [line.strip() for line in missing if re.match(r" {5}\S", line)]
        named = [name for name in needed if not name.startswith(f"unweave {command}")]
        return f"{command} needs {' and '.join(named)}{more}"
    text = " ".join(" ".join(lines).split())
    if found := re.search(r"Missing value for argument \W+(--[\w-]+)'", text):
        return f"{found[1]} needs a value{more}"
    if found := re.search(r"invalid choice '(.*?)' for argument '(--[\w-]+)'.* Expected one of \((.*?)\)", text):
        return _wrong(found[2], found[1], found[3])
    if found := re.search(r"Error parsing (--[\w-]+): no type matching (\S+) could .*? from \['(.*?)'\]", text):
        return _wrong(found[1], found[3], "|".join(kind for kind in found[2].split("|") if kind != "{None}"))
    if found := re.search(r"Error parsing (--[\w-]+): invalid literal for (int|float)\(\).*?: '(.*?)'", text):
        return _wrong(found[1], found[3], found[2].upper())
    if found := re.search(r"Error parsing (--[\w-]+): could not convert string to float: '(.*?)'", text):
        return _wrong(found[1], found[2], "FLOAT")
    return None


def _wrong(option: str, value: str, takes: str) -> str:
    """A value that an option cannot have, of what it takes: `INT`, `FLOAT` or `{one,of,these}`, quoted or not."""
    if "," in takes:
        choices = sorted(set(re.findall(r"[^\s{},|']+", takes)) - {"None"})
        return f"{option} cannot be {value!r}; it is one of {', '.join(choices)}{nearest(value, choices, n=1) or '.'}"
    plain = value.replace(",", "").replace("_", "")
    such = f", such as {plain}" if plain != value and plain.isdigit() else ""
    return f"{option} cannot be {value!r}; it takes {_KINDS.get(takes, takes)}{such}."
