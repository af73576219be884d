"""Configurations as plain values, for JSON, TOML and the command line, and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from unweave._errors import UnweaveError, nearest
from unweave.objectives import PENALTIES, Matryoshka, Penalty, RandomMatryoshka
from unweave.sae import ACTIVATIONS, Activation
from unweave.sae.archetypal import DICTIONARIES

_REGISTERS: dict[type[Any], dict[str, type[Any]]] = {Activation: ACTIVATIONS, Penalty: PENALTIES}
"""Parts that come in several kinds, which their base class's register knows by name."""
_TYPES: dict[str, type[Any]] = {"matryoshka": Matryoshka, "random_matryoshka": RandomMatryoshka} | DICTIONARIES
_NAMES = {cls: name for name, cls in _TYPES.items()}


def _kind(part: Any) -> str | None:
    """The name of a part's kind, if it comes in several."""
    if isinstance(part, tuple(_REGISTERS)):
        return str(getattr(part, "name"))  # noqa: B009
    return _NAMES.get(type(part))


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; parts that come in several kinds carry their kind as `type`."""
    kind = _kind(config)
    result: dict[str, Any] = {} if kind is None else {"type": kind}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple | list):
            value = [to_dict(v) if dataclasses.is_dataclass(v) else v for v in value]
        result[f.name] = value
    return result


def from_dict(cls: type[Any], values: dict[str, Any], where: str = "") -> Any:
    """The inverse of `to_dict`; keys left out take their defaults.

    Raises:
        UnweaveError: If a key or a type does not exist (the message names the nearest that does), or a value does not
            fit.
    """
    hints = typing.get_type_hints(cls)
    keys = [f.name for f in dataclasses.fields(cls)]
    arguments = {}
    for key, value in values.items():
        if key not in keys:
            raise UnweaveError(
                f"there is no setting {where + key!r}{nearest(key, keys) or '; there are ' + ', '.join(keys)}"
            )
        arguments[key] = _convert(hints[key], value, where + key)
    return cls(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    classes: list[Any] = [o for o in options if dataclasses.is_dataclass(o) or o in _REGISTERS]
    if classes and isinstance(value, dict):
        if "type" not in value and classes[0] not in _REGISTERS:
            return from_dict(classes[0], value, where + ".")
        kinds = {_NAMES[c]: c for c in classes if c in _NAMES}
        for register in (_REGISTERS[c] for c in classes if c in _REGISTERS):
            kinds |= register
        kind, rest = value.get("type"), {k: v for k, v in value.items() if k != "type"}
        if kind not in kinds:
            raise UnweaveError(f"{where} has no type {kind!r}; it is one of {', '.join(kinds)}.")
        return from_dict(kinds[kind], rest, where + ".")
    tuples = [o for o in options if typing.get_origin(o) is tuple]
    if tuples and isinstance(value, list | tuple):
        return tuple(_convert(typing.get_args(tuples[0])[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if classes and not any(value is None for o in options if o is type(None)):
        raise UnweaveError(f"{where} must be a table of settings, such as {{ type = ... }}, got {value!r}.")
    if typing.get_origin(hint) is tuple and not isinstance(value, list | tuple):
        raise UnweaveError(
            f"{where} must be a list (in TOML, tables in a list are written [[{where}]]), got {value!r}."
        )
    literals = [v for o in options if typing.get_origin(o) is Literal for v in typing.get_args(o)]
    if value is None and type(None) in options:
        return None
    if literals and value not in literals:
        raise UnweaveError(f"{where} is one of {', '.join(map(repr, literals))}, got {value!r}.")
    plain = tuple(o for o in options if isinstance(o, type) and not dataclasses.is_dataclass(o))
    accepted = (*plain, int) if float in plain else plain
    if (
        accepted
        and not literals
        and (not isinstance(value, accepted) or (isinstance(value, bool) and bool not in plain))
    ):
        if isinstance(value, float) and value.is_integer() and int in plain:
            return int(value)
        raise UnweaveError(f"{where} must be {' or '.join(p.__name__ for p in plain)}, got {value!r}.")
    return value
