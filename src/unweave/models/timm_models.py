"""timm's models by name, where timm is installed. It is imported only here, and only when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from unweave._errors import UnweaveError
from unweave._hub import asked_once
from unweave.models.processors import Processor

PREFIX = "timm:"
"""What stands in front of a name that timm knows: `timm:vit_small_patch16_224.augreg_in1k`."""


def load_timm(name: str) -> tuple[nn.Module, Processor]:
    """A pretrained model of timm, and the transform that it was evaluated with.

    Args:
        name: With the prefix `timm:`.

    Raises:
        UnweaveError: timm is not installed or cannot be imported, or it does not know the model or cannot get it.
    """
    try:
        timm: Any = import_module("timm")
        data: Any = import_module("timm.data")
    except (ImportError, RuntimeError) as error:  # torchvision's operators do not fit every build of torch
        raise UnweaveError(f"{name!r} needs timm, which could not be imported: {error}.") from error
    try:
        with asked_once():
            module = timm.create_model(name.removeprefix(PREFIX), pretrained=True)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise UnweaveError(f"{name!r} could not be loaded by timm: {error}.") from error
    return module, data.create_transform(**data.resolve_model_data_config(module), is_training=False)
