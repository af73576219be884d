"""The command line as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", [["--help"], ["synth", "--help"]], ids=["short", "long"])
def test_a_reader_that_stops_reading_is_no_traceback(arguments: list[str], unbuffered: str) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "unweave", *arguments], stdout=write, stderr=subprocess.PIPE, text=True, check=False,
            env=environment,
        )  # fmt: skip
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", [["--version"], ["synth", "--help"]], ids=["short", "long"])
def test_output_that_cannot_be_written_is_one_sentence(arguments: list[str], unbuffered: str, tmp_path: Path) -> None:
    """A file that may not grow stands for a disk that is full."""
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered, "PYTHONDONTWRITEBYTECODE": "1"}
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0));"
        "from unweave.cli import main; sys.exit(main())"
    )
    with (tmp_path / "out").open("w", encoding="utf-8") as out:
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], stdout=out, stderr=subprocess.PIPE, text=True, check=False,
            env=environment,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "unweave: the output cannot be written: File too large.\n")
