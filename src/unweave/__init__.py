"""The face of unweave: `import unweave as uw`, and everything that most people need is one name away.

Names are loaded when they are first used, so `import unweave` costs next to nothing and a script that only loads an
SAE never pays for what trains one.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "unweave.sae": ("SAE", "SparseCodes", "ReLU", "TopK", "BatchTopK", "JumpReLU", "Gated"),
    "unweave.objectives": ("L1", "TargetL0", "AuxK", "Matryoshka", "MultiTopK", "PreActivation", "GhostGradients"),
    "unweave.training": ("SAEConfig", "TrainConfig", "train", "train_on"),
    "unweave.activations": ("DataConfig", "MaskConfig"),
    "unweave.models": ("load_model", "capture", "splice", "resolve_hooks"),
    "unweave.evaluation": ("evaluate", "Report"),
    "unweave.dashboard": ("dashboard",),
    "unweave._errors": ("UnweaveError",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

# Type checkers, editors and `import *` read these two lists; a test holds them equal to the table above.
__all__ = [
    "L1", "SAE", "AuxK", "BatchTopK", "DataConfig", "Gated", "GhostGradients", "JumpReLU", "MaskConfig", "Matryoshka",
    "MultiTopK", "PreActivation", "ReLU", "Report", "SAEConfig", "SparseCodes", "TargetL0", "TopK", "TrainConfig",
    "UnweaveError", "capture", "dashboard", "evaluate", "load_model", "resolve_hooks", "splice", "train", "train_on",
]  # fmt: skip

if TYPE_CHECKING:
    from unweave._errors import UnweaveError
    from unweave.activations import DataConfig, MaskConfig
    from unweave.dashboard import dashboard
    from unweave.evaluation import Report
    from unweave.evaluation.evaluate import evaluate
    from unweave.models import capture, load_model, resolve_hooks, splice
    from unweave.objectives import L1, AuxK, GhostGradients, Matryoshka, MultiTopK, PreActivation, TargetL0
    from unweave.sae import SAE, BatchTopK, Gated, JumpReLU, ReLU, SparseCodes, TopK
    from unweave.training import SAEConfig, TrainConfig
    from unweave.training.train import train
    from unweave.training.train_on import train_on


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    from unweave._errors import nearest

    raise AttributeError(f"module 'unweave' has no attribute {name!r}{nearest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Face(ModuleType):
    """Keeps `unweave.dashboard` the function: importing the subpackage of that name would otherwise take the name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "dashboard" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
