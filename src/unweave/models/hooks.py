"""Places in a network: read what passes there, or put something else in its place.

A hook is the input or the output of a submodule of any `nn.Module`. Where a module takes or returns several things,
the activation is the first tensor among them. Nothing here wraps or changes the model: PyTorch's own forward hooks are
added for the length of a call or a `with` block, and exactly those are taken away again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unweave._errors import UnweaveError, nearest

Edit = Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d"]]
"""A function of an activation that returns its replacement."""


@dataclass(frozen=True)
class Hook:
    """The input or the output of one submodule.

    Attributes:
        path: Path of the submodule, as in `module.get_submodule(path)`.
        side: `"in"`: its first positional tensor, or else its keyword `hidden_states`. `"out"`: the first tensor of
            what it returns.
        columns: First and end of the columns that count, of an activation whose heads lie side by side; None: all.
    """

    path: str
    side: Literal["in", "out"] = "out"
    columns: tuple[int, int] | None = None

    def __str__(self) -> str:
        place = self.path if self.side == "out" else f"{self.path}:in"
        return place if self.columns is None else f"{place}#{self.columns[0]}:{self.columns[1]}"

    def part_of(self, activation: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What of the activation this hook is about; with columns a view in which heads lie side by side.

        Raises:
            UnweaveError: If it has fewer columns.
        """
        if self.columns is None:
            return activation
        side_by_side = _side_by_side(activation)
        if side_by_side.shape[-1] < self.columns[1]:
            raise UnweaveError(f"{str(self)!r} goes beyond the {side_by_side.shape[-1]} columns that there are")
        return side_by_side[..., slice(*self.columns)]


def capture(
    module: nn.Module, hooks: Sequence[Hook], *args: Any, grad: bool = False, **inputs: Any
) -> dict[str, Float[Tensor, "*shape"]]:
    """Run `module` until every hook has been passed once, and return what passed there.

    The forward pass ends at the last hook: what lies behind it, the head included, is not computed, and a module that
    is hooked at its input does not run. Of a module that runs several times the first run counts.

    Args:
        module: Any module.
        hooks: What to capture, from `resolve_hooks`.
        *args: Positional inputs of the module.
        grad: Keep the graph of the activations; by default they are computed without one.
        **inputs: Keyword inputs of the module, such as `input_ids` and `attention_mask`.

    Returns:
        `str(hook)` to activation, in the order of `hooks`; copies of the shape and dtype that the model computes, which
        nothing that runs later writes to.

    Raises:
        UnweaveError: A hook was not passed, or no tensor was there.
    """
    seen: dict[Hook, Tensor] = {}
    wanted = dict.fromkeys(hooks)

    def keep(hook: Hook, activation: Tensor) -> None:
        if hook not in seen:
            part = hook.part_of(activation)
            seen[hook] = part.clone() if grad else part.detach().clone()
        if len(seen) == len(wanted):
            raise _AllSeen

    with suppress(_AllSeen), _attached(module, wanted, keep), torch.set_grad_enabled(grad):
        module(*args, **inputs)
    if unseen := [str(hook) for hook in hooks if hook not in seen]:
        raise UnweaveError(f"{', '.join(map(repr, unseen))} did not run in the forward pass of {type(module).__name__}")
    return {str(hook): seen[hook] for hook in hooks}


@contextmanager
def splice(module: nn.Module, edits: Mapping[Hook, Edit]) -> Iterator[None]:
    """Within the block, every forward pass of `module` goes on with `edit(activation)` in place of the activation.

    Blocks may be nested: at the same hook the outer edit comes first and the inner one sees its result. Gradients flow
    through the edits, and generation with a cache passes each token through them once.

    Args:
        module: Any module.
        edits: Hook to a function of the activation `(..., d)` that returns a tensor of the same shape; it is cast to
            the activation's dtype. It may be an SAE: a warning says if its metadata name another model or hook.

    Raises:
        UnweaveError: A hook's module does not exist; within the block, a replacement of another shape.
    """

    def replace(hook: Hook, activation: Tensor) -> Tensor:
        part = hook.part_of(activation)
        new = edits[hook](part)
        if new.shape != part.shape:
            raise UnweaveError(
                f"the replacement at {str(hook)!r} has shape {tuple(new.shape)}, not {tuple(part.shape)}"
            )
        new = new.to(activation.dtype)
        if hook.columns is None:
            return new
        rest = _side_by_side(activation)
        first, end = hook.columns
        return torch.cat([rest[..., :first], new, rest[..., end:]], -1).reshape(activation.shape)

    for hook, edit in edits.items():
        _say_if_of_elsewhere(module, hook, edit)
    with _attached(module, edits, replace):
        yield


def _say_if_of_elsewhere(module: nn.Module, hook: Hook, edit: Edit) -> None:
    """Warn if an edit is an SAE (or a method of one) that was trained on another model or at another hook."""
    metadata = getattr(getattr(edit, "__self__", edit), "metadata", None)
    if isinstance(metadata, Mapping):
        from unweave.models.attachment import differences  # which resolves names to hooks

        differences(metadata, module, [hook], stacklevel=5)  # that of the `with`


def _side_by_side(activation: Float[Tensor, "..."]) -> Float[Tensor, "... d"]:
    """An activation whose heads have an axis of their own, with them in one axis."""
    return activation.flatten(2) if activation.ndim > 3 else activation


class _AllSeen(BaseException):
    """Leaves a forward pass whose rest nobody needs; no Exception, so that no model's `except` holds it up."""


@contextmanager
def _attached(
    module: nn.Module, hooks: Iterable[Hook], visit: Callable[[Hook, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `visit` when a hook is passed; a tensor that it returns takes the activation's place."""
    handles: list[RemovableHandle] = []
    try:
        for hook in hooks:
            handles.append(_attach(module, hook, visit))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(module: nn.Module, hook: Hook, visit: Callable[[Hook, Tensor], Tensor | None]) -> RemovableHandle:
    try:
        submodule = module.get_submodule(hook.path)
    except AttributeError:
        paths = [path for path, _ in module.named_modules()]
        raise UnweaveError(f"{type(module).__name__} has no module {hook.path!r}{nearest(hook.path, paths)}") from None

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if (index := _first_tensor(args)) is not None:
            new = visit(hook, args[index])
            return None if new is None else (_replaced(args, index, new), kwargs)
        if isinstance(activation := kwargs.get("hidden_states"), Tensor):
            new = visit(hook, activation)
            return None if new is None else (args, {**kwargs, "hidden_states": new})
        raise UnweaveError(f"{hook.path!r} is given neither a positional tensor nor hidden_states, so it has no input")

    def on_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return visit(hook, output)
        if (key := _first_tensor(output)) is None:
            raise UnweaveError(f"{hook.path!r} returns no tensor but {type(output).__name__}, so it has no output")
        new = visit(hook, output[key])
        return None if new is None else _replaced(output, key, new)

    if hook.side == "in":
        return submodule.register_forward_pre_hook(on_input, with_kwargs=True)
    return submodule.register_forward_hook(on_output)


def _first_tensor(values: Any) -> Any:
    """Index or key of the first tensor, None if there is none."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(values, Mapping):
        items = values.items()
    elif isinstance(values, tuple | list):
        items = enumerate(values)
    return next((key for key, value in items if isinstance(value, Tensor)), None)


def _replaced(values: Any, key: Any, new: Tensor) -> Any:
    """A copy of a tuple, named tuple, list, dict or ModelOutput with another value at `key`."""
    if not isinstance(values, tuple):
        changed = copy.copy(values)
        changed[key] = new
        return changed
    changed = (*values[:key], new, *values[key + 1 :])
    return type(values)(*changed) if hasattr(values, "_fields") else changed
