"""The face: what `import unweave` loads, and that every name is there, also for type checkers."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import unweave
from unweave.sae import ACTIVATIONS, SAE, Crosscoder, CrossLayerTranscoder, ReLU, Transcoder

HEAVY = {"transformers", "datasets", "pyarrow", "pandas", "numba", "matplotlib", "sklearn", "scipy"}


def run(program: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules_after(program: str) -> set[str]:
    return set(run(f"{program}\nimport sys; print(*{{m.split('.')[0] for m in sys.modules}})").split())


def test_import_unweave_loads_nothing_heavy() -> None:
    """pitfall_311: importing takes no seconds, for it pulls in nothing that does."""
    assert modules_after("import unweave") & (HEAVY | {"torch", "numpy", "rich", "tyro", "huggingface_hub"}) == set()


def test_nothing_of_the_core_needs_a_library_of_models() -> None:
    """pitfall_367: an SAE is trained, saved, loaded and spliced into any module without transformers."""
    program = """
import sys
for name in ("transformers", "tokenizers", "transformer_lens", "nnsight", "datasets"):
    sys.modules[name] = None
import tempfile, torch, unweave
from torch import nn
from unweave.models import Hook, capture, splice
batches = [torch.randn(64, 8) for _ in range(4)]
config = unweave.SAEConfig(d_sae=16, activation=unweave.TopK(2))
(sae,) = unweave.train_on(iter(batches), [config], tokens=256, progress=False)
with tempfile.TemporaryDirectory() as folder:
    again = unweave.SAE.load(sae.save(folder + "/sae"))
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
with splice(model, {Hook("0"): again.requires_grad_(False)}):
    seen = capture(model, [Hook("1")], batches[0])["1"]
print(tuple(seen.shape))
"""
    assert run(program) == "(64, 8)"


def test_every_class_has_defaults_that_construct() -> None:
    """pitfall_362: what needs no argument is made without one, and every coder with every activation function."""
    made = 0
    for name in unweave.__all__:
        kind = getattr(unweave, name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and not inspect.isabstract(kind):
            fields = [f for f in dataclasses.fields(kind) if f.init]
            if all(f.default is not f.default_factory for f in fields):  # MISSING is both
                kind()
                made += 1
    assert made > 20
    for activation in ACTIVATIONS.values():
        assert SAE(4, 64, activation()).d_sae == 64
    assert Transcoder(4, 4, 8, ReLU()).b_dec.shape == (4,)
    assert Crosscoder({"a": 4, "b": 4}, 8, ReLU()).d_in == 8
    assert CrossLayerTranscoder({"a": 4, "b": 4}, {"c": 4, "d": 4}, 8, ReLU()).d_out == 8


def test_every_name_together_loads_nothing_heavy() -> None:
    assert modules_after("from unweave import *") & (HEAVY | {"tyro"}) == set()


def test_every_name_resolves_and_is_listed() -> None:
    """pitfall_366: two lists, in two places, so that no name goes by accident."""
    assert all(getattr(unweave, name) is not None for name in unweave.__all__)
    assert set(unweave.__all__) <= set(dir(unweave))


def test_type_checkers_see_what_the_table_says() -> None:
    tree = ast.parse(Path(unweave.__file__).read_text(encoding="utf-8"))
    guarded = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {a.name: str(n.module) for n in guarded.body if isinstance(n, ast.ImportFrom) for a in n.names}
    # A function with the name of its file is imported from the file: of the package, mypy would take the file itself.
    assert seen.keys() == unweave._HOME.keys()
    assert all(module in (home := unweave._HOME[name], f"{home}.{name}") for name, module in seen.items())
    assert set(unweave.__all__) == set(unweave._HOME)


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'BatchTopk'; did you mean 'BatchTopK'"):
        unweave.BatchTopk  # noqa: B018


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import unweave.dashboard",
        "unweave.dashboard; import unweave.dashboard",
        "from unweave.dashboard import dashboard",
        "import importlib; importlib.import_module('unweave.dashboard')",
    ],
)
def test_dashboard_is_the_function_whatever_was_imported_before(before: str) -> None:
    check = "print(unweave.dashboard is sys.modules['unweave.dashboard'].dashboard)"
    assert run(f"import sys, unweave\n{before}\nunweave.dashboard\n{check}") == "True"
