"""Commands in processes of their own that are killed without warning, as often as it takes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

Phase = Literal["before", "during", "after"]
"""When a command was killed: before it wrote anything that lasts, while it wrote, or once all was there."""
PHASES: tuple[Phase, ...] = ("before", "during", "after")

# Everything is imported once, and each command runs in a child that is forked then, which saves it seconds and changes
# nothing else: no thread has been started before. Whatever a command starts for itself, it starts anew.
SERVER = """
import json, os, sys
if __name__ == "__main__":
    import importlib
    import unweave, unweave.cli
    for name in ("activations.cache.write", "activations.tokenized.tokenize", "training.train", "evaluation"):
        importlib.import_module(f"unweave.{name}")
    import transformers.models.gpt2.modeling_gpt2, transformers.models.vit.modeling_vit, sklearn.datasets
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if not (child := os.fork()):
            log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for name, value in asked["settings"].items():
                module, _, attribute = name.rpartition(".")
                setattr(importlib.import_module(module), attribute, value)
            code = unweave.cli.main(asked["arguments"])
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
"""


@dataclass
class Commands:
    """Runs commands of unweave one after the other.

    Attributes:
        server: The process that they are children of.
        log: Where the last one printed.
    """

    server: subprocess.Popen[str]
    log: Path
    child: int = 0

    def start(self, arguments: list[object], settings: dict[str, Any]) -> None:
        asked = {"arguments": [str(each) for each in arguments], "log": str(self.log), "settings": settings}
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        self.child = int(self._line())

    def runs(self) -> bool:
        """Whether the command still runs, or has ended as a zombie that its parent has not seen yet."""
        try:
            os.kill(self.child, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self) -> int:
        """The exit status; -9 for a command that was killed."""
        return os.waitstatus_to_exitcode(int(self._line()))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(self.child, signal.SIGKILL)

    def _line(self) -> str:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, "the server died"
        return line


@pytest.fixture(scope="session")
def bad_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four files of documents, with a line that cannot be read in two of them."""
    from unweave.activations import standard_library_text

    folder = tmp_path_factory.mktemp("text") / "data"
    folder.mkdir()
    texts = [text[:4000] for text, _ in zip(standard_library_text(), range(400), strict=False)]
    for i in range(4):
        lines = [json.dumps({"text": text}) for text in texts[i::4]]
        lines[i * 20 + 1 : i * 20 + 1] = ['{"text": 3}'] if i % 2 else []
        (folder / f"{i}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.py").write_text(SERVER)
    server = subprocess.Popen(
        [sys.executable, "server.py"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield Commands(server, folder / "log")
        assert server.stdin is not None
        server.stdin.close()


@dataclass
class Killer:
    """Kills a command twenty times or more, at moments that cover all of its work, and compares what it ends in.

    Each folder is killed in two to four times, resumed after each, and let come to its end. The moments are drawn from
    the time that the command takes when it is left alone, mostly from that in which it writes and as much of it as is
    left; should the clock have missed a phase all the same, the last kills wait for it.
    """

    commands: Commands
    folder: Path
    most: int = 60
    """Folders, at most, each of which is started up to five times."""
    met: Counter[Phase] = field(default_factory=Counter)
    """Kills in each phase."""

    def __call__(
        self,
        arguments: Callable[[Path], list[object]],
        *,
        phase: Callable[[Path], Phase],
        result: Callable[[Path], object],
        settings: dict[str, Any] | None = None,
        seed: int = 0,
        kills: int = 20,
    ) -> None:
        """Run `arguments(out)`, and with `--resume` once it was killed, until there were enough kills.

        Args:
            arguments: The command that writes the folder `out`.
            phase: What a folder says of the moment at which its command was killed.
            result: What must be equal to that of a command which was left alone.
            settings: Values of modules by their names, for the command.
            seed: Of the moments.
            kills: How many, at least.
        """
        self._settings, self._phase, self._kills, moments = settings or {}, phase, kills, random.Random(seed)
        whole = self.folder / "whole"
        started = time.monotonic()
        self.commands.start(arguments(whole), self._settings)
        self._works(whole)
        began = time.monotonic()
        while self.commands.runs() and phase(whole) == "during":
            time.sleep(0.001)
        written = time.monotonic()
        assert self.commands.wait() == 0, self.commands.log.read_text()
        ended, wanted = time.monotonic(), result(whole)
        for number in range(self.most):
            out, resume, left = self.folder / str(number), list[object](), written - began
            for _ in range(moments.randint(2, 4)):
                of_writing = moments.uniform(0, left)
                wait = self._moment(moments, ended - started, ended - began, of_writing)
                left -= of_writing
                status = self._run([*arguments(out), *resume], out, wait)
                if status == 0:
                    break
                assert status == -signal.SIGKILL, self.commands.log.read_text()
                self.met[phase(out)] += 1
                resume = ["--resume"]
            assert self._run([*arguments(out), "--resume"]) == 0, self.commands.log.read_text()
            assert result(out) == wanted, f"what was killed {dict(self.met)} differs"
            if sum(self.met.values()) >= kills and not self._missing():
                return
        pytest.fail(f"the commands of {self.most} folders were killed only {dict(self.met)}")

    def _missing(self) -> list[Phase]:
        """Phases with too few kills yet: half of all are to be while it works."""
        return [phase for phase in PHASES if self.met[phase] < (self._kills // 2 if phase == "during" else 1)]

    def _moment(self, moments: random.Random, whole: float, work: float, of_writing: float) -> Callable[[Path], None]:
        """Waits for a moment: any at all, any since it works, while it writes, or the beginning of a missing phase."""
        kind, since_start, since_work = moments.random(), moments.uniform(0, whole), moments.uniform(0, work)
        if (missing := self._missing()) and self._kills - sum(self.met.values()) <= 2 * len(missing):
            return lambda out: self._begins(out, missing[0], of_writing / 2)
        after = since_start if kind < 0.15 else since_work if kind < 0.3 else of_writing

        def wait(out: Path) -> None:
            if kind >= 0.15:
                self._works(out)
            end = time.monotonic() + after
            while self.commands.runs() and time.monotonic() < end:
                time.sleep(0.001)

        return wait

    def _begins(self, out: Path, phase: Phase, longest: float) -> None:
        """Wait for a phase, and where that lasts for some time longer."""
        while self.commands.runs() and self._phase(out) != phase:
            time.sleep(0.0005)
        end = time.monotonic() + longest
        while phase == "during" and self.commands.runs() and self._phase(out) == phase and time.monotonic() < end:
            time.sleep(0.0005)

    def _works(self, out: Path) -> None:
        """Wait until it is past the beginning, and writes: what is resumed prepares for that as well."""
        least = _size(out)
        while self.commands.runs():
            if (size := _size(out)) > least and self._phase(out) != "before":
                return
            least = min(least, size)
            time.sleep(0.001)

    def _run(self, arguments: list[object], out: Path | None = None, wait: Callable[[Path], None] | None = None) -> int:
        self.commands.start(arguments, self._settings)
        if wait is not None:
            assert out is not None
            wait(out)
            self.commands.kill()
        return self.commands.wait()


def _size(folder: Path) -> int:
    """Bytes of all files in a folder that may change meanwhile."""
    size = 0
    for place, _, names in os.walk(folder):  # which passes over folders that vanish
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(os.path.join(place, name)).st_size
    return size


@pytest.fixture
def killer(commands: Commands, tmp_path: Path) -> Killer:
    return Killer(commands, tmp_path)
