"""The face of unweave: `import unweave as uw`, and everything that most people need is one name away.

Names are loaded when they are first used, so `import unweave` costs next to nothing and a script that only loads an
SAE never pays for what trains one.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from unweave import _late

__version__ = "0.1.0"

_HOMES = {
    "unweave.sae": (
        "SAE", "SparseCodes", "Activation", "register_activation", "ReLU", "TanhReLU", "TopK", "AbsTopK", "RawTopK",
        "GroupMax", "BatchTopK", "JumpReLU", "Gated", "MatchingPursuit", "OrthogonalMatchingPursuit", "TiedDictionary",
        "ArchetypalDictionary", "Temporal", "TemporalSAE", "Transcoder", "Crosscoder", "CrossLayerTranscoder",
        "Normalization", "fold_normalization",
    ),
    "unweave.objectives": (
        "Penalty", "register_penalty", "L1", "Lp", "PAnneal", "Tanh", "Frequency", "L0", "QuadraticL0", "TargetL0",
        "Contrastive", "AuxK", "PreActivation", "GhostGradients", "Reanimation", "Matryoshka", "RandomMatryoshka",
        "MultiTopK", "Schedule", "KSchedule", "EndToEnd",
    ),
    "unweave.training": (
        "SAEConfig", "TrainConfig", "L0Controller", "Resampling", "train", "train_on", "Start", "finetune",
        "recipes", "Plan", "plan",
    ),
    "unweave.activations": ("DataConfig", "ImageConfig", "ImageRows", "MaskConfig"),
    "unweave.activations.cache": (
        "cache", "open_cache", "OrderedBatches", "Selection", "Store", "StoreBatches", "shuffle_quality",
    ),
    "unweave.activations.tokenized.tokenize": ("tokenize",),
    "unweave.models": ("load_model", "capture", "splice", "resolve_hooks", "VisionLayout"),
    "unweave.evaluation": ("evaluate", "Report"),
    "unweave.dashboard": ("dashboard", "image_dashboard"),
    "unweave.hub": ("releases", "sae_info"),
    "unweave._errors": ("UnweaveError",),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

# Type checkers, editors and `import *` read these two lists; a test holds them equal to the table above.
__all__ = [
    "L0", "L1", "SAE", "AbsTopK", "Activation", "ArchetypalDictionary", "AuxK", "BatchTopK", "Contrastive",
    "CrossLayerTranscoder", "Crosscoder", "DataConfig", "EndToEnd", "Frequency", "Gated", "GhostGradients", "GroupMax",
    "ImageConfig", "ImageRows", "JumpReLU", "KSchedule", "L0Controller", "Lp", "MaskConfig", "MatchingPursuit",
    "Matryoshka", "MultiTopK", "Normalization", "OrderedBatches", "OrthogonalMatchingPursuit", "PAnneal", "Penalty",
    "Plan", "PreActivation", "QuadraticL0", "RandomMatryoshka", "RawTopK", "ReLU", "Reanimation", "Report",
    "Resampling",
    "SAEConfig", "Schedule", "Selection", "SparseCodes", "Start", "Store", "StoreBatches", "Tanh", "TanhReLU",
    "TargetL0",
    "Temporal", "TemporalSAE", "TiedDictionary", "TopK", "TrainConfig", "Transcoder", "UnweaveError", "VisionLayout",
    "cache", "capture", "dashboard", "evaluate", "finetune", "fold_normalization", "image_dashboard", "load_model",
    "open_cache", "plan", "recipes", "register_activation", "register_penalty", "releases", "resolve_hooks",
    "sae_info", "shuffle_quality", "splice", "tokenize", "train", "train_on",
]  # fmt: skip

if TYPE_CHECKING:
    from unweave._errors import UnweaveError
    from unweave.activations import DataConfig, ImageConfig, ImageRows, MaskConfig
    from unweave.activations.cache import (
        OrderedBatches,
        Selection,
        Store,
        StoreBatches,
        cache,
        open_cache,
        shuffle_quality,
    )
    from unweave.activations.tokenized.tokenize import tokenize
    from unweave.dashboard import dashboard, image_dashboard
    from unweave.evaluation import Report
    from unweave.evaluation.evaluate import evaluate
    from unweave.hub import releases, sae_info
    from unweave.models import VisionLayout, capture, load_model, resolve_hooks, splice
    from unweave.objectives import (
        L0,
        L1,
        AuxK,
        Contrastive,
        EndToEnd,
        Frequency,
        GhostGradients,
        KSchedule,
        Lp,
        Matryoshka,
        MultiTopK,
        PAnneal,
        Penalty,
        PreActivation,
        QuadraticL0,
        RandomMatryoshka,
        Reanimation,
        Schedule,
        Tanh,
        TargetL0,
        register_penalty,
    )
    from unweave.sae import (
        SAE,
        AbsTopK,
        Activation,
        ArchetypalDictionary,
        BatchTopK,
        Crosscoder,
        CrossLayerTranscoder,
        Gated,
        GroupMax,
        JumpReLU,
        MatchingPursuit,
        Normalization,
        OrthogonalMatchingPursuit,
        RawTopK,
        ReLU,
        SparseCodes,
        TanhReLU,
        Temporal,
        TemporalSAE,
        TiedDictionary,
        TopK,
        Transcoder,
        fold_normalization,
        register_activation,
    )
    from unweave.training import L0Controller, Plan, Resampling, SAEConfig, Start, TrainConfig, recipes
    from unweave.training.finetune import finetune
    from unweave.training.plan import plan
    from unweave.training.train import train
    from unweave.training.train_on import train_on


for _name in ("read_sae", "from_pretrained", "push_to_hub", "pull"):
    _late.register(_name, "unweave.hub")


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
