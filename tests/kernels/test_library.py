"""Finding, checking and loading the compiled kernels, also where something is missing or doesn't fit."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import unweave.kernels
from unweave import UnweaveError
from unweave.kernels import library

SOURCE = Path(library.__file__)
CSRC = Path(__file__).parents[2] / "csrc"
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="compiles a library")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="shares one OpenMP runtime on Linux only")
load = library.load.__wrapped__  # without the cache


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done


def build(folder: Path, code: str) -> Path:
    """A shared library with the name that the loader looks for."""
    path = folder / library.FILE
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=code, text=True, check=True)
    return path


@needs_gcc
def test_the_best_instruction_set_comes_first_and_generic_is_always_there() -> None:
    loaded = library.load()
    assert loaded is not None
    found = library.targets(loaded)
    assert found == [target for target in ("avx512", "avx2", "generic") if target in found]
    assert found[-1] == "generic"
    cpu = Path("/proc/cpuinfo")
    flags = set(cpu.read_text(encoding="utf-8").split()) if cpu.exists() else set()
    if {"avx2", "fma", "bmi2"} <= flags:
        assert "avx2" in found
        needed = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}
        assert ("avx512" in found) == (needed <= flags)


def test_python_and_cpp_agree_on_the_version() -> None:
    code = (CSRC / "targets.cpp").read_text(encoding="utf-8")
    assert re.findall(r"uw_abi_version\(\) \{ return (\d+); \}", code) == [str(library.ABI_VERSION)]


SHARED = """
import re
{first}
{second}
counts = []
for n in (1, 3, 2):
    torch.set_num_threads(n)
    torch.ones(1 << 20).mul(2)
    counts.append(load().uw_threads())
mapped = {{line.split()[-1] for line in open("/proc/self/maps") if re.search(r"/lib(gomp|omp|iomp5)[-.]", line)}}
print(counts, len(mapped))
"""
IMPORTS = ["import torch", "from unweave.kernels.library import load; load()"]


@needs_gcc
@linux_only
@pytest.mark.parametrize("order", [1, -1])
def test_kernels_run_on_the_threads_of_pytorch(order: int) -> None:
    first, second = IMPORTS[::order]
    assert run(SHARED.format(first=first, second=second)).stdout.split("\n")[-2] == "[1, 3, 2] 1"


@needs_gcc
@linux_only
def test_the_library_is_linked_with_no_openmp_runtime() -> None:
    loaded = library.load()
    assert loaded is not None
    contents = Path(loaded._name).read_bytes()
    assert b"GOMP_parallel" in contents
    assert b"libgomp" not in contents


FAKE_TORCH = """
import sys, types, importlib.util
for name in ("torch", "unweave.kernels"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["unweave.kernels"].__path__ = sys.argv[2:]
import unweave
unweave.kernels = sys.modules["unweave.kernels"]
spec = importlib.util.spec_from_file_location("library", sys.argv[1])
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
"""


@needs_gcc
@linux_only
@pytest.mark.skipif(ctypes.util.find_library("gomp") is None, reason="the system has no libgomp")
def test_where_pytorch_brings_no_openmp_the_systems_is_loaded() -> None:
    program = FAKE_TORCH + "import ctypes\nbefore = hasattr(ctypes.CDLL(None), 'GOMP_parallel')\n"
    program += "print(before, library.load().uw_threads())"
    folders = [str(folder) for folder in unweave.kernels.__path__]
    assert run(program, str(SOURCE), *folders, OMP_NUM_THREADS="3").stdout == "False 3\n"


@needs_gcc
@linux_only
def test_without_any_openmp_pytorch_does_the_work_and_a_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_find_openmp", lambda: False)
    with pytest.warns(RuntimeWarning, match=r"there is no OpenMP runtime \(libgomp\)"):
        assert load() is None


MISSING = """
import sys, unweave.kernels
from unweave.kernels import library
unweave.kernels.__path__ = [sys.argv[1]]
print(library.load(), library.load())
"""


def test_a_missing_library_is_said_once(tmp_path: Path) -> None:
    done = run(MISSING, str(tmp_path), **{library.VARIABLE: "", "PYTHONWARNINGS": "always"})
    assert done.stdout == "None None\n"
    assert done.stderr.count("RuntimeWarning") == 1
    assert f"<string>:5: RuntimeWarning: unweave runs without its compiled kernels, and so more slowly: " \
           f"{library.FILE} is not installed" in done.stderr  # fmt: skip


def test_the_variable_must_name_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(library.VARIABLE, str(tmp_path / "nowhere.so"))
    with pytest.raises(UnweaveError, match=r"^UNWEAVE_KERNELS_LIBRARY names '.*nowhere\.so', which is no file\.$"):
        load()


def test_a_file_that_is_no_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    path.write_text("text", encoding="utf-8")
    monkeypatch.setenv(library.VARIABLE, str(path))
    with pytest.raises(UnweaveError, match=r"^The compiled kernels cannot be loaded: .*text\.so.*; build it again\.$"):
        load()


@needs_gcc
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "The compiled kernels cannot be loaded: .*uw_abi_version"),
        ("int missing(); extern \"C\" int uw_abi_version() { return missing(); }", "cannot be loaded: .*missing"),
        ("extern \"C\" int uw_abi_version() { return 999; }", "has version 999 of the kernels, this unweave needs"),
    ],
    ids=["something else", "not whole", "another version"],
)  # fmt: skip
def test_a_library_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, message: str
) -> None:
    path = build(tmp_path, code)
    monkeypatch.setenv(library.VARIABLE, str(path))
    with pytest.raises(UnweaveError, match=rf"{message}.*; build it again\.$"):
        load()
    monkeypatch.delenv(library.VARIABLE)
    monkeypatch.setattr(unweave.kernels, "__path__", [str(tmp_path / "empty"), str(tmp_path)])
    with pytest.raises(UnweaveError, match=rf"{message}.*; reinstall unweave\.$"):
        load()
