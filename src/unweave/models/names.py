"""From the names that people write to hooks: module paths, globs, suffixes and aliases.

A name is looked up as a whole module path first, then as an alias, then as the end of a path, so that `h.3` finds
`transformer.h.3`, and `h.*.mlp` the MLP of every block. In a glob, `*`, `?` and `[...]` match within one component.
What follows a `#` says which part of the activation counts: one head, or a range of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal, cast

from torch import nn

from unweave._errors import UnweaveError, nearest
from unweave.models.aliases import FAMILIES, aliases, is_alias, tl_name
from unweave.models.hooks import Hook


def resolve_hooks(module: nn.Module, names: Sequence[str]) -> list[Hook]:
    """The hooks that `names` stand for.

    Args:
        module: The model.
        names: Module paths (`transformer.h.3`), their ends (`h.3`), globs (`h.*.mlp`), each with `:in` or `:out`
            (the default) behind it, or aliases (`resid_post.3`, `blocks.3.hook_resid_post`, `resid_post.*`). Behind a
            name, `#2` takes the third head of what attention mixes (`hook_z`), `#64:96` columns of any activation.

    Returns:
        Each hook once, in the order of the modules, a module's input before and its output after all that is in it;
        the order of `names` plays no part.

    Raises:
        UnweaveError: A name matches nothing, or, without a glob, the ends of several paths.
    """
    paths = [path for path, _ in module.named_modules(remove_duplicate=False) if path]
    known = aliases(module)
    hooks = {
        replace(hook, columns=_columns(module, hook, part) if sign else None)
        for place, sign, part in (name.partition("#") for name in names)
        for hook in _lookup(module, place, paths, known)
    }

    enter = {path: index for index, path in enumerate(["", *paths])}
    leave = dict(enter)
    for path in reversed(paths):
        parent = path.rpartition(".")[0]
        leave[parent] = max(leave[parent], leave[path])

    def order(hook: Hook) -> tuple[int, int, int, tuple[int, int]]:
        columns = hook.columns or (0, 0)
        at_input = hook.side == "in"
        return (enter[hook.path], 0, 0, columns) if at_input else (leave[hook.path], 1, -enter[hook.path], columns)

    return sorted(hooks, key=order)


def _lookup(module: nn.Module, name: str, paths: list[str], known: dict[str, str]) -> list[Hook]:
    pattern, colon, side = name.partition(":")
    if colon and side not in ("in", "out"):
        raise UnweaveError(f"hook {name!r} ends in {':' + side!r}, where only ':in' and ':out' exist")
    if whole := [path for path in paths if fits(path, pattern)]:
        return [_hook(path, side) for path in whole]
    if not colon and (named := [place for alias, place in known.items() if fits(alias, pattern)]):
        return [_hook(*place.split(":")) for place in named]
    ends = [path for path in paths if fits(end_of(path, pattern), pattern)]
    if not ends:
        hint = _hint(module, pattern, paths, known)
        raise UnweaveError(f"hook {name!r} matches nothing in {type(module).__name__}{hint}")
    if len(ends) > 1 and not any(sign in pattern for sign in "*?["):
        raise UnweaveError(f"hook {name!r} could be any of {len(ends)} modules, such as {ends[0]!r} and {ends[1]!r}")
    return [_hook(path, side) for path in ends]


def _columns(module: nn.Module, hook: Hook, part: str) -> tuple[int, int]:
    """The columns that `part` stands for: `64:96`, or the number of a head."""
    first, colon, end = part.partition(":")
    if colon and first.isdigit() and end.isdigit() and int(first) < int(end):
        return int(first), int(end)
    if colon or not part.isdigit():
        raise UnweaveError(f"'#{part}' behind {str(hook)!r} is neither a head, such as #2, nor columns, such as #64:96")
    width, n_heads = head_shape(module, hook)
    if int(part) >= n_heads:
        raise UnweaveError(f"{str(hook)!r} has the heads 0 to {n_heads - 1}, and no head {part}")
    return int(part) * width, (int(part) + 1) * width


def head_shape(module: nn.Module, hook: Hook) -> tuple[int, int]:
    """Width and number of the heads that lie side by side at a hook.

    Raises:
        UnweaveError: If it is not what attention mixes (`hook_z`), or the model does not say.
    """
    places = {place for alias, place in aliases(module).items() if alias.endswith("hook_z")}
    config = getattr(module, "config", None)
    n_heads, d_model = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    if str(hook) not in places or n_heads is None or d_model is None:
        raise UnweaveError(f"{str(hook)!r} has no heads that are known; name columns instead, such as #64:96")
    return getattr(config, "head_dim", None) or d_model // n_heads, n_heads


def _hook(path: str, side: str = "") -> Hook:
    return Hook(path, cast('Literal["in", "out"]', side or "out"))


def end_of(path: str, pattern: str) -> str:
    """As many of the last components of `path` as `pattern` has."""
    return ".".join(path.split(".")[-len(pattern.split(".")) :])


def fits(path: str, pattern: str) -> bool:
    """Whether a path has as many components as a pattern, and each is what the pattern says of it."""
    parts, patterns = path.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _hint(module: nn.Module, pattern: str, paths: list[str], known: dict[str, str]) -> str:
    """What there is instead, as the end of a sentence."""
    if pattern in known:
        return f", for the alias {pattern!r} stands for one side already"
    if is_alias(pattern) and not known:
        families = ", ".join(FAMILIES)
        return f", for aliases need one stack of blocks of a known class ({families}); name the module's path instead"
    names = list(dict.fromkeys([*known, *paths, *(end_of(path, pattern) for path in paths)]))
    numbered = ".".join("*" if part.isdigit() else part for part in pattern.split("."))
    if numbered != pattern and (siblings := [name for name in names if fits(name, numbered)]):
        return f"; there are {siblings[0]!r} to {siblings[-1]!r}"
    children = ", ".join(repr(name) for name, _ in module.named_children())
    return nearest(pattern, names) or f"; its modules are {children} and what is in them"


def head_index(module: nn.Module, hook: Hook) -> int | None:
    """The number of the head that a hook reads, if it reads one head of what attention mixes (`hook_z`)."""
    whole = replace(hook, columns=None)
    if hook.columns is None or not str(tl_name(module, whole)).endswith("hook_z"):
        return None
    width, _ = head_shape(module, whole)
    head, rest = divmod(hook.columns[0], width)
    return head if rest == 0 and hook.columns[1] - hook.columns[0] == width else None
