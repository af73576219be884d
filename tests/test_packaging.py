"""What a user's package manager sees."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import distribution, entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import unweave

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "unweave"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(r) for r in lines] for name, lines in PROJECT["optional-dependencies"].items()}
PINS = {
    canonicalize_name(name): pin
    for name, _, pin in (
        line.partition("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
}  # fmt: skip


def test_version_and_command() -> None:
    assert version("unweave") == unweave.__version__
    (command,) = entry_points(group="console_scripts", name="unweave")
    assert callable(command.load())


def test_users_get_ranges_and_torch_is_never_reinstalled_pitfall_360_361() -> None:
    assert not [str(r) for r in CORE for s in r.specifier if s.operator not in (">=", "<", "!=")]
    assert str(next(r for r in CORE if r.name == "torch").specifier) == ">=2.5"


@pytest.mark.parametrize("requirement", [*CORE, *(r for extra in EXTRAS.values() for r in extra)], ids=str)
def test_the_pins_lie_within_the_ranges(requirement: Requirement) -> None:
    if requirement.name != "unweave":
        assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


def test_every_import_is_declared_pitfall_363_364() -> None:
    declared = {r.name for r in [*CORE, *EXTRAS["data"], *EXTRAS["plots"], *EXTRAS["vision"]]} | {"unweave"}
    # The names that they are imported by.
    declared = declared - {"pillow", "scikit-learn", "pyyaml"} | {"PIL", "sklearn", "yaml"}
    declared |= {"tokenizers", "triton"}  # part of transformers, and of PyTorch for CUDA
    used = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used.add(str(node.module).split(".")[0])
    assert used - sys.stdlib_module_names - declared == set()


def test_one_wheel_serves_every_python() -> None:
    tags = re.findall(r"^Tag: (.*)$", str(distribution("unweave").read_text("WHEEL")), re.MULTILINE)
    assert tags
    assert all(tag.startswith("py3-none-") for tag in tags)


def test_the_source_archive_has_what_it_takes_to_build_it() -> None:
    everything, *shipped = PYPROJECT["tool"]["scikit-build"]["sdist"]["exclude"]
    assert everything == "/*"
    assert [name for name in shipped if not (ROOT / name.removeprefix("!/")).exists()] == []
    compiled = re.findall(r"csrc/\w+\.cpp", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    assert {"csrc/kernels.cpp", "csrc/targets.cpp"} == set(compiled)
    needed = {Path(name).parts[0] for name in [*compiled, "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"]}
    assert {f"!/{name}" for name in needed | {"src", "tests"}} <= set(shipped)


def test_one_licence_everywhere_pitfall_371() -> None:
    assert PROJECT["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    assert "MIT" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (SOURCE / "py.typed").exists()
