"""The same forward pass with less work: no cache of keys and values, a tanh GELU that is one pass over its input or
none, and on a CPU linear layers as oneDNN computes them.

For models of transformers, whose GPT-2 spends a tenth of its time, and most of its memory, in the eight passes of its
GELU, and which keep all keys and values for a generation that does not follow when activations are read.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from unweave.models import attention, onednn
from unweave.models.load import LoadedModel


class _TanhGELU(nn.Module):
    """The tanh form of GELU in one pass over its input."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")


@functools.cache
def _mlp() -> type[Any]:
    """GPT-2's MLP whose first product goes through the GELU before it is written, where nobody looks in between."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    class MLP(GPT2MLP):
        def forward(self, hidden_states: Any) -> Any:
            inner, act = self.c_fc, self.act
            watched = _altered(inner) or _altered(act)
            if watched or not hasattr(inner, "with_gelu") or not onednn.runs_here(inner, hidden_states):
                return super().forward(hidden_states)
            return self.dropout(self.c_proj(cast(Any, inner).with_gelu(hidden_states)))

    return MLP


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
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    if getattr(module.config, "use_cache", False):
        module.config.use_cache = False  # type: ignore[union-attr]
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is NewGELUActivation:
                setattr(parent, name, _TanhGELU())
        if type(parent) is GPT2MLP and type(parent.act) is _TanhGELU:
            parent.__class__ = _mlp()
    onednn.use(module)


def quicken(module: nn.Module, keep: set[int]) -> bool:
    """Let a model of transformers in bf16 on a CPU, which nobody else holds, run with packed weights and our attention.

    What it computes changes by rounding alone, which whoever calls this has to check: layers may be used in other ways
    than by calling them.

    Args:
        module: The model; changed in place.
        keep: `id` of the parameters that are others' too.

    Returns:
        Whether there was anything to change.
    """
    if not _of_transformers(module) or any(_altered(m) for m in module.modules()):
        return False
    changed = [onednn.pack(module, keep), attention.use(module)]
    return any(changed)


def _of_transformers(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def sees_nothing(hook: Callable[..., None]) -> Callable[..., None]:
    """Mark a hook that looks at no activation: it need not run where a module's work is done by its parent."""
    hook.sees_nothing = True  # type: ignore[attr-defined]
    return hook


def _altered(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return "forward" in vars(module) or not all(getattr(hook, "sees_nothing", False) for hook in hooks)
