"""The same forward pass with less work: no cache of keys and values, and a tanh GELU that is one pass over its input.

For models of transformers, whose GPT-2 spends a tenth of its time, and most of its memory, in the eight passes of its
GELU, and which keep all keys and values for a generation that does not follow when activations are read.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

from torch import Tensor, nn

from unweave.models.load import LoadedModel


class _TanhGELU(nn.Module):
    """The tanh form of GELU in one pass over its input."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")


def lean(model: LoadedModel) -> LoadedModel:
    """A twin of a model of transformers that shares its weights and buffers, or the model itself.

    Models of other kinds, and those that somebody has put hooks on or given another `forward`, are not touched: their
    code may refer to the very modules it was given.

    Returns:
        What computes the same up to the rounding of one operation; `model` is not changed.
    """
    if not _of_transformers(model.module) or any(_altered(m) for m in model.module.modules()):
        return model
    shared = [*model.module.parameters(), *model.module.buffers()]
    try:
        module = copy.deepcopy(model.module, {id(tensor): tensor for tensor in shared})
    except (TypeError, RuntimeError, NotImplementedError):
        return model
    make_lean(module)
    return replace(model, module=module)


def make_lean(module: nn.Module) -> None:
    """Do in place what `lean` does to a twin."""
    if not _of_transformers(module):
        return
    from transformers.activations import NewGELUActivation

    if getattr(module.config, "use_cache", False):
        module.config.use_cache = False  # type: ignore[union-attr]
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is NewGELUActivation:
                setattr(parent, name, _TanhGELU())


def _of_transformers(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def _altered(module: nn.Module) -> bool:
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)
