"""A copy of a model in another precision, to run beside the model itself, which stays as it is.

Weights are copied once, straight into their new type. What lies behind the last hook is not copied: the forward pass
never gets there. Buffers keep their type (rotary frequencies, say, are not made to be rounded), and so do the
parameters that a model of transformers wants in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unweave._errors import UnweaveError
from unweave.models.hooks import Hook, capture
from unweave.models.lean import make_lean, quicken
from unweave.models.load import LoadedModel

_SMALL = 256
_ROUNDING = 0.05


def dtype_of(module: nn.Module) -> torch.dtype:
    """The type of a model's weights: that of its first floating-point parameter, fp32 if it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def gains_from_bf16(module: nn.Module) -> bool:
    """Whether a model in fp32 is large enough for its products to be faster in bf16, on hardware that is.

    That is where half of its matrices have 256 rows and columns or more; below it, casts and calls cost what the
    products gain.
    """
    narrow = sorted(min(p.shape) for p in module.parameters() if p.ndim == 2)
    return dtype_of(module) == torch.float32 and bool(narrow) and narrow[len(narrow) // 2] >= _SMALL


def copy_in(model: LoadedModel, dtype: torch.dtype, hooks: Sequence[Hook], *args: Any, **inputs: Any) -> LoadedModel:
    """The model in another type, for forward passes up to the last of `hooks`.

    Args:
        model: What to copy; it is not changed, and shares with its copy what lies behind the last hook.
        dtype: Of the copy's parameters.
        hooks: Where the copy will be read.
        *args: Positional inputs of the model, for one pass that shows what lies in front of the hooks.
        **inputs: Its inputs by name.

    Raises:
        UnweaveError: The module cannot be copied.
    """
    module = _copied(model, dtype, hooks, args, inputs)
    make_lean(module)
    if dtype != torch.bfloat16 or model.device.type != "cpu":
        return replace(model, module=module)
    expected = capture(module, hooks, *args, **inputs)
    kept = {id(parameter) for parameter in model.module.parameters()}
    try:
        if not quicken(module, kept) or _close(capture(module, hooks, *args, **inputs), expected):
            return replace(model, module=module)
    except (AttributeError, RuntimeError, TypeError):
        pass  # it does something else with its weights than to multiply with them
    del module
    module = _copied(model, dtype, hooks, args, inputs)
    make_lean(module)
    return replace(model, module=module)


def _close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether activations agree up to the rounding of some layers in bf16."""
    pairs = [(got[name].float(), x.float()) for name, x in expected.items()]
    return all(bool((a - b).norm() <= _ROUNDING * b.norm()) for a, b in pairs)


def _copied(
    model: LoadedModel, dtype: torch.dtype, hooks: Sequence[Hook], args: tuple[Any, ...], inputs: dict[str, Any]
) -> nn.Module:
    memo: dict[int, Any] = {}
    for name, parameter in _in_front_of(model.module, hooks, args, inputs):
        keeps = not parameter.is_floating_point() or _keeps_fp32(model.module, name)
        data = parameter.detach().clone() if keeps else parameter.detach().to(dtype, copy=True)
        memo[id(parameter)] = nn.Parameter(data, requires_grad=False)
    for parameter in model.module.parameters():
        memo.setdefault(id(parameter), parameter)
    try:
        return copy.deepcopy(model.module, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise UnweaveError(
            f"the model {model.name!r} cannot be copied into {str(dtype).removeprefix('torch.')}: {error}."
        ) from error


def copied_bytes(original: nn.Module, copied: nn.Module) -> int:
    """Memory of the parameters that a copy does not share with the original."""
    shared = {id(p) for p in original.parameters()}
    return sum(p.nbytes for p in copied.parameters() if id(p) not in shared)


def _in_front_of(
    module: nn.Module, hooks: Sequence[Hook], args: tuple[Any, ...], inputs: dict[str, Any]
) -> list[tuple[str, nn.Parameter]]:
    """The parameters that a forward pass up to the last hook may use.

    Left out are the modules that did not run and that are registered behind all that is hooked. (An expert that no
    token chose did not run either, but lies in front.)
    """
    ran: set[nn.Module] = set()
    submodules = list(module.named_modules())
    handles = [m.register_forward_pre_hook(lambda m, _: ran.add(m)) for _, m in submodules]
    try:
        capture(module, hooks, *args, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    paths = {hook.path for hook in hooks}
    last = max(i for i, (name, _) in enumerate(submodules) if any(f"{name}.".startswith(f"{p}.") for p in paths))
    used = [(n, m) for i, (n, m) in enumerate(submodules) if i <= last or m in ran]
    return [(f"{n}.{key}", p) for n, m in used for key, p in m.named_parameters(recurse=False)]


def _keeps_fp32(module: nn.Module, name: str) -> bool:
    parts = [*(getattr(module, "_keep_in_fp32_modules", None) or ())]
    parts += getattr(module, "_keep_in_fp32_modules_strict", None) or ()
    return any(part in name.split(".") for part in parts)
