"""The few functions of higher layers that lower ones offer as methods, such as `SAE.load`, which reads every format.

The face of the package says where they are when it is imported, which is always; they are imported when first called.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

_HOMES: dict[str, str] = {}


def register(name: str, home: str) -> None:
    """Say that the function `name` is in the module `home`."""
    _HOMES[name] = home


def late(name: str) -> Callable[..., Any]:
    """A function that was registered."""
    found: Callable[..., Any] = getattr(import_module(_HOMES[name]), name)
    return found
