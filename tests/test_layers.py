"""The house rules that a program can check: which layer imports which, and how a file looks."""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import unweave
from unweave.activations import DataConfig, ImageConfig, MaskConfig
from unweave.objectives import EndToEnd
from unweave.training import SAEConfig, TrainConfig

SOURCE = Path(unweave.__file__).parent
MAX_LINES = 320

# What each layer may import beside itself. Lower layers come first, and nothing but `python -m unweave` imports `cli`.
BASE = {"_errors", "_files", "_hub"}
BELOW = {
    "_errors": set(),
    "_late": set(),
    "_files": {"_errors", "_mapped"},
    "_hub": set(),
    "_mapped": {"_errors", "kernels"},
    "kernels": {"_errors"},
    "sae": BASE | {"_late", "_mapped", "kernels"},
    "objectives": BASE | {"kernels", "sae"},
    "models": BASE | {"kernels"},
    "activations": BASE | {"kernels", "models"},
    "training": BASE | {"kernels", "sae", "objectives", "models", "activations"},
    "evaluation": BASE | {"sae", "models", "activations"},
    "dashboard": BASE | {"sae", "models", "activations", "evaluation"},
    "synthetic": BASE | {"_late", "kernels", "sae", "objectives", "activations", "training", "evaluation"},
    "hub": BASE | {"_mapped", "sae", "evaluation", "synthetic"},
}
BELOW["__init__"] = set(BELOW)
BELOW["cli"] = set(BELOW)
BELOW["__main__"] = {"cli"}
OUTSIDE_OF_KERNELS = {"torch", "jaxtyping"}
TRITON = "unweave.kernels.triton"

# Dotted name to text; a package's own file is `unweave.sae.__init__`.
MODULES = {
    ".".join(["unweave", *path.relative_to(SOURCE).with_suffix("").parts]): path.read_text(encoding="utf-8")
    for path in sorted(SOURCE.rglob("*.py"))
}


def layer_of(module: str) -> str:
    return module.split(".")[1]


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """The dotted name of everything that `module` imports, also inside functions and for type checking."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the module's own package; of `unweave.sae.__init__` as of `unweave.sae.codes`: `unweave.sae`.
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            if base == "unweave":
                yield from (f"unweave.{alias.name}" for alias in node.names)
            else:
                yield base


def upward_imports(source: str, module: str) -> list[str]:
    """The imports of a module, given as text, that its layer must not make."""
    layer, wrong = layer_of(module), []
    for name in imports(ast.parse(source), module):
        package, *rest = name.split(".")
        if package == "unweave" and name != "unweave.__version__":
            target = rest[0] if rest else "the face of the package"
            if target not in {layer} | BELOW[layer]:
                wrong.append(f"{module} imports {name}")
        elif package == "triton":  # where there is no GPU it may be missing
            if not module.startswith(TRITON + "."):
                wrong.append(f"{module} imports {name}")
        elif layer == "kernels" and package not in OUTSIDE_OF_KERNELS | sys.stdlib_module_names:
            wrong.append(f"{module} imports {name}")
    return wrong


def test_every_layer_has_its_place() -> None:
    assert {layer_of(module) for module in MODULES} == set(BELOW)


def test_imports_go_down() -> None:
    assert [wrong for module, source in MODULES.items() for wrong in upward_imports(source, module)] == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("unweave.kernels.select", "from unweave.sae.codes import SparseCodes"),
        ("unweave.kernels.select", "import numpy as np"),
        ("unweave.kernels.select", "import triton"),
        ("unweave.kernels.triton_like", "import triton.language as tl"),
        ("unweave.kernels.triton.select", "import numpy as np"),
        ("unweave.training.trainer", "from triton import jit"),
        ("unweave.kernels.select", "from unweave._files import write_json"),
        ("unweave.sae.sae", "from unweave.objectives import AuxK"),
        ("unweave.sae.sae", "from ..training import train"),
        ("unweave.sae.__init__", "from ..training.trainer import train"),
        ("unweave.models.hooks", "from unweave.activations import DataConfig"),
        ("unweave.models.hooks", "import unweave"),
        ("unweave.activations.live", "if True:\n    from unweave.sae import SAE"),
        ("unweave.training.trainer", "def run():\n    from unweave.evaluation import evaluate"),
        ("unweave.evaluation.report", "from unweave import dashboard"),
        ("unweave.evaluation.report", "from unweave import SAE"),
        ("unweave.dashboard.page", "import unweave.cli.main"),
        ("unweave.__init__", "from unweave.cli import main"),
    ],
)
def test_an_upward_import_is_found(module: str, line: str) -> None:
    assert len(upward_imports(line, module)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("unweave.sae.sae", "from unweave.sae.codes import SparseCodes"),
        ("unweave.sae.sae", "from .codes import SparseCodes"),
        ("unweave.sae.sae", "from unweave import __version__"),
        ("unweave.kernels.select", "import math\nimport torch\nfrom unweave._errors import UnweaveError"),
        ("unweave.kernels.triton.select", "import triton.language as tl\nimport math"),
        ("unweave.cli.train", "from unweave.training import train"),
    ],
)
def test_a_downward_import_is_fine(module: str, line: str) -> None:
    assert upward_imports(line, module) == []


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def dangers(source: str, layer: str) -> list[str]:
    """What no module may do: unpickle (directly or through torch and numpy), or print outside the command line.

    Of the pickling modules only exceptions may be named: `torch.load` raises them also with weights_only=True.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {a.name} as {a.asname}" for a in node.names if a.name in PICKLES and a.asname]
        elif isinstance(node, ast.ImportFrom) and node.module in PICKLES:
            found += [f"{node.module}.{a.name}" for a in node.names if not a.name.endswith("Error")]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in PICKLES and not node.attr.endswith("Error"):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            call, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if call == "print" and layer != "cli":
                found.append("print(")
            if call == "torch.load" and keywords.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if keywords.get("allow_pickle", "False") != "False":
                found.append("allow_pickle")
            if call == "breakpoint" or call.endswith(".set_trace"):
                found.append("a breakpoint")
            if call == "NotImplementedError":
                found.append("something that is not there")
            if keywords.get("verify") == "False":
                found.append("TLS that is not verified")
    return found


def test_nothing_is_unpickled_or_printed() -> None:
    """pitfall_238, 257, 341: nor is TLS left unverified, a debugger called, or an option there that is not."""
    found = {module: dangers(source, layer_of(module)) for module, source in MODULES.items()}
    assert {module: what for module, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "line",
    [
        "pickle.loads(b)",
        "import pickle as p",
        "from dill import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "print(1)",
        "breakpoint()",
        "pdb.set_trace()",
        "httpx.get(url, verify=False)",
        "raise NotImplementedError('later')",
    ],
)
def test_a_danger_is_found(line: str) -> None:
    assert len(dangers(line, "sae")) == 1


def test_one_place_edits_models() -> None:
    """pitfall_261: whoever changes what a model computes goes through `models.hooks`; other hooks only look."""
    hooked = {module for module, source in MODULES.items() if ".register_forward" in source}
    looking = {"unweave.activations.background", "unweave.evaluation.replay", "unweave.models.precision"}
    assert hooked == looking | {"unweave.models.hooks"}


@pytest.mark.parametrize(
    "kind", [TrainConfig, SAEConfig, EndToEnd, DataConfig, ImageConfig, MaskConfig], ids=lambda kind: kind.__name__
)
def test_every_setting_is_read(kind: type) -> None:
    """pitfall_354: few settings in each class, and each is looked up somewhere."""
    looked_up = {
        node.attr
        for source in MODULES.values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    settings = {field.name for field in dataclasses.fields(kind)}
    assert settings - looked_up == set()
    assert len(settings) <= 36


def test_devices_are_named_in_one_place() -> None:
    """pitfall_359: of all settings of a run only `TrainConfig` has devices, and none has a dtype beside a precision."""
    parts = (SAEConfig, EndToEnd, DataConfig, ImageConfig, MaskConfig)
    assert [f.name for kind in parts for f in dataclasses.fields(kind) if "device" in f.name or "dtype" in f.name] == []
    assert [f.name for f in dataclasses.fields(TrainConfig) if "device" in f.name] == ["device", "model_device"]
    assert [f.name for f in dataclasses.fields(TrainConfig) if "dtype" in f.name] == []


def test_files_open_with_a_docstring_and_stay_short() -> None:
    assert [module for module, source in MODULES.items() if not ast.get_docstring(ast.parse(source))] == []
    assert {module: n for module, source in MODULES.items() if (n := len(source.splitlines())) > MAX_LINES} == {}
