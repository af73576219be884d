"""`--hint KEY=VALUE`: what the files of some formats do not say, given on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unweave._errors import UnweaveError, nearest

_ARRAYS = ("mean",)


def parse(texts: Sequence[str]) -> dict[str, Any]:
    """Hints as `read_sae` takes them; numbers, lists and true or false as in JSON, and anything else as text.

    A `mean` may be the name of an npy file.

    Raises:
        UnweaveError: If a text has no "=", a key is unknown or occurs twice, or the file of a mean cannot be read.
    """
    from unweave.hub.reader import EVERYWHERE, formats

    known = sorted({*EVERYWHERE, *(name for made in formats().values() for name in made.hints)})
    hints: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UnweaveError(f"a hint has the form KEY=VALUE, and {text!r} has not.")
        if key in hints:
            raise UnweaveError(f"the hint {key!r} is given twice.")
        if key not in known:
            meant = nearest(key, known) or f"; there are {', '.join(known)}."
            raise UnweaveError(f"there is no hint {key!r}{meant}")
        hints[key] = _array(value) if key in _ARRAYS and value.endswith(".npy") else _value(value)
    return hints


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _array(path: str) -> Any:
    import numpy as np

    try:
        return np.load(Path(path), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UnweaveError(f"{path!r} cannot be read as an array: {error}.") from error
