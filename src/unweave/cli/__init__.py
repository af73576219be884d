"""The command line: `unweave train` and its siblings. One file per command, thin over the library.

Exit status: 0 when it worked, 2 when the input was wrong (one sentence says what), 130 after Ctrl-C, 141 when
whatever read the output stopped reading (`| head`), 1 for a bug, and for output that cannot be written (one sentence
again), such as to a disk that is full.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from unweave._errors import UnweaveError, nearest

COMMANDS = {
    "demo": ("DemoArgs", "Train and evaluate an SAE of a model that ships with unweave."),
    "plan": ("PlanArgs", "Tokens, steps, memory, disk and time of a run of train."),
    "train": ("TrainArgs", "Train SAEs on the activations of a model."),
    "finetune": ("FinetuneArgs", "Train any SAE further: its decoder, or all of it end to end."),
    "eval": ("EvalArgs", "Evaluate a saved SAE on held-out text."),
    "dashboard": ("DashboardArgs", "Write an HTML page of a saved SAE's features."),
    "info": ("InfoArgs", "List published SAEs, or say what a saved or published one is."),
    "push": ("PushArgs", "Share SAEs, worlds or activations on the Hugging Face Hub."),
    "tokenize": ("TokenizeArgs", "Tokenise text into a folder that train and cache read."),
    "cache": ("CacheArgs", "Store a model's activations in a folder that train reads."),
    "synth": ("SynthArgs", "Train SAEs on a world of known features, and score them."),
    "convert": ("ConvertArgs", "Write an SAE in another library's format."),
}
"""Of each command: the class of its arguments, in the file of its name, and what it does, in one line."""
FILES = {"eval": "evaluate"}
"""Files whose name is not the command's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, where a reader that has gone can still be told from a bug
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return 141  # as a shell says of a program that SIGPIPE ended
    except OSError as error:
        if not _output_fails():
            raise
        return _fail_output(error)


def _reader_has_gone() -> bool:
    """Whether nobody reads standard output any more; what is still to be written is then dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are reported whatever is asked for
    if not poll.poll(0):
        return False
    _drop_output()
    return True


def _output_fails() -> bool:
    """Whether standard output takes nothing, such as on a full disk; what is still to be written is then dropped."""
    try:
        if getattr(sys.stdout, "write_through", False):  # nothing waits to be written
            sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        _drop_output()
        return True
    return False


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str] | None) -> int:
    # On a busy machine OpenMP's threads would burn their time spinning while they wait for each other. Read when
    # torch is imported, which is after this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or [""]
    if command in ("", "-h", "--help", "help"):
        print(help_text(), file=sys.stdout if command else sys.stderr)
        return 0 if command else 2
    if command == "--version":
        from unweave import __version__

        print(f"unweave {__version__}")
        return 0
    try:
        with _plain_warnings():
            _parsed(command, rest).run()
    except UnweaveError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "stopped.", 130)
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR
        ):  # fmt: skip
            raise
        if error.filename is None and _output_fails():
            return _fail_output(error)
        where = f" at {error.filename!r}" if error.filename else ""
        return _fail(f"{error.strerror}{where}; files that were being written have been removed.", 2)
    return 0


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Within the block, the library's own warnings are a sentence, without the place in the source they come from."""
    usual, own = warnings.formatwarning, str(Path(__file__).parents[1])

    def plain(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if filename.startswith(own):
            return f"unweave: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


def help_text() -> str:
    """One line for each command."""
    lines = [f"  {name:<10} {does}" for name, (_, does) in COMMANDS.items()]
    return "\n".join((
        "usage: unweave COMMAND [OPTIONS]",
        "",
        "Take a neural network's activations apart into the features they are made of.",
        "",
        *lines,
        "",
        "example:  unweave train --model gpt2 --data my.txt --hooks resid_post.6",
        "",
        "`unweave COMMAND --help` shows the options of a command.",
    ))  # fmt: skip


def _parsed(command: str, rest: Sequence[str]) -> Any:
    """The arguments of a command, which know how to run it. Only its own file is imported."""
    from unweave.cli.parsing import parse_arguments

    if command not in COMMANDS:
        if command.startswith("-"):
            raise UnweaveError(f"the first word is a command, not {command!r}; see `unweave --help`.")
        hint = nearest(command, COMMANDS, n=1) or "; see `unweave --help`."
        raise UnweaveError(f"there is no command {command!r}{hint}")
    module = import_module(f"unweave.cli.{FILES.get(command, command)}")
    return parse_arguments(command, getattr(module, COMMANDS[command][0]), rest)


def _fail(message: str, status: int) -> int:
    print(f"unweave: {message}", file=sys.stderr)
    return status


def _fail_output(error: OSError) -> int:
    return _fail(f"the output cannot be written: {error.strerror}.", 1)
