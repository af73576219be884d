"""From the names that people write to hooks: module paths, globs, suffixes and aliases.

A name is looked up as a whole module path first, then as an alias, then as the end of a path, so that `h.3` finds
`transformer.h.3`, and `h.*.mlp` the MLP of every block. In a glob, `*`, `?` and `[...]` match within one component.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, cast

from torch import nn

from unweave._errors import UnweaveError, nearest
from unweave.models.aliases import FAMILIES, aliases, is_alias
from unweave.models.hooks import Hook


def resolve_hooks(module: nn.Module, names: Sequence[str]) -> list[Hook]:
    """The hooks that `names` stand for.

    Args:
        module: The model.
        names: Module paths (`transformer.h.3`), their ends (`h.3`), globs (`h.*.mlp`), each with `:in` or `:out`
            (the default) behind it, or aliases (`resid_post.3`, `blocks.3.hook_resid_post`, `resid_post.*`).

    Returns:
        Each hook once, in the order of the modules, a module's input before and its output after all that is in it;
        the order of `names` plays no part.

    Raises:
        UnweaveError: A name matches nothing, or, without a glob, the ends of several paths.
    """
    paths = [path for path, _ in module.named_modules(remove_duplicate=False) if path]
    known = aliases(module)
    hooks = {hook for name in names for hook in _lookup(module, name, paths, known)}

    enter = {path: index for index, path in enumerate(["", *paths])}
    leave = dict(enter)
    for path in reversed(paths):
        parent = path.rpartition(".")[0]
        leave[parent] = max(leave[parent], leave[path])

    def order(hook: Hook) -> tuple[int, int, int]:
        return (enter[hook.path], 0, 0) if hook.side == "in" else (leave[hook.path], 1, -enter[hook.path])

    return sorted(hooks, key=order)


def _lookup(module: nn.Module, name: str, paths: list[str], known: dict[str, str]) -> list[Hook]:
    pattern, colon, side = name.partition(":")
    if colon and side not in ("in", "out"):
        raise UnweaveError(f"hook {name!r} ends in {':' + side!r}, where only ':in' and ':out' exist")
    if whole := [path for path in paths if _fits(path, pattern)]:
        return [_hook(path, side) for path in whole]
    if not colon and (named := [place for alias, place in known.items() if _fits(alias, pattern)]):
        return [_hook(*place.split(":")) for place in named]
    ends = [path for path in paths if _fits(_end(path, pattern), pattern)]
    if not ends:
        hint = _hint(module, pattern, paths, known)
        raise UnweaveError(f"hook {name!r} matches nothing in {type(module).__name__}{hint}")
    if len(ends) > 1 and not any(sign in pattern for sign in "*?["):
        raise UnweaveError(f"hook {name!r} could be any of {len(ends)} modules, such as {ends[0]!r} and {ends[1]!r}")
    return [_hook(path, side) for path in ends]


def _hook(path: str, side: str = "") -> Hook:
    return Hook(path, cast('Literal["in", "out"]', side or "out"))


def _end(path: str, pattern: str) -> str:
    """As many of the last components of `path` as `pattern` has."""
    return ".".join(path.split(".")[-len(pattern.split(".")) :])


def _fits(path: str, pattern: str) -> bool:
    parts, patterns = path.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _hint(module: nn.Module, pattern: str, paths: list[str], known: dict[str, str]) -> str:
    """What there is instead, as the end of a sentence."""
    if pattern in known:
        return f", for the alias {pattern!r} stands for one side already"
    if is_alias(pattern) and not known:
        families = ", ".join(FAMILIES)
        return f", for aliases need one stack of blocks of a known class ({families}); name the module's path instead"
    names = list(dict.fromkeys([*known, *paths, *(_end(path, pattern) for path in paths)]))
    numbered = ".".join("*" if part.isdigit() else part for part in pattern.split("."))
    if numbered != pattern and (siblings := [name for name in names if _fits(name, numbered)]):
        return f"; there are {siblings[0]!r} to {siblings[-1]!r}"
    children = ", ".join(repr(name) for name, _ in module.named_children())
    return nearest(pattern, names) or f"; its modules are {children} and what is in them"
