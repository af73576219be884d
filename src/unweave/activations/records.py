"""From a record of a data set to a document: which column it is in, and what its value may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unweave._errors import UnweaveError, nearest
from unweave.activations.config import DataConfig

TokenIds: TypeAlias = NDArray[np.int64]
Document: TypeAlias = str | list[dict[str, Any]] | TokenIds
"""Text, a list of chat messages, or token ids."""


@dataclass(frozen=True)
class Unreadable:
    """Stands where a document should be, and says in a sentence where that is and why there is none."""

    reason: str


_TOKENS = ("tokens", "input_ids")
_MESSAGES = ("messages", "conversation", "conversations")
_TEXT = ("text", "content", "problem", "document", "article", "sentence", "code")


def choose_column(names: Iterable[str], config: DataConfig, where: str) -> str:
    """The column that holds the documents: `config.column`, else the first usual name (token ids before text).

    Raises:
        UnweaveError: There is no such column.
    """
    names = list(names)
    if config.column is not None:
        if config.column in names:
            return config.column
        hint = nearest(config.column, names) or f"; there are {', '.join(map(repr, names))}."
        raise UnweaveError(f"{where} has no column {config.column!r}{hint}")
    for name in _MESSAGES if config.chat else (*_TOKENS, *_TEXT, *_MESSAGES):
        if name in names:
            return name
    kind, there = "chat messages" if config.chat else "text", ", ".join(map(repr, names))
    raise UnweaveError(f"{where} has no column known to hold {kind}; set column to one of {there}.")


def as_document(value: Any, config: DataConfig, where: Callable[[], str]) -> Document:
    """Check one value and bring token ids into a one-dimensional int64 array.

    Raises:
        UnweaveError: It is no document, or chat messages and plain text are confused.
    """
    if isinstance(value, str):
        if config.chat:
            raise UnweaveError(f"{where()} is plain text, but chat is set, which takes lists of messages.")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise UnweaveError(f"{where()} holds half of a surrogate pair (character {error.start}).") from None
        return value
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        if not config.chat:
            raise UnweaveError(f"{where()} is a list of chat messages: set chat to lay it out by the chat template.")
        return value
    try:
        ids = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # ragged lists, tensors on another device
        ids = np.empty((), dtype=object)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UnweaveError(f"{where()} holds {_kind(value)}, but a document is text, chat messages or token ids.")
    if config.chat:
        raise UnweaveError(f"{where()} holds token ids, but chat is set, which takes lists of messages.")
    return ids.astype(np.int64, copy=False)


def document_or_reason(value: Any, config: DataConfig, where: Callable[[], str]) -> Document | Unreadable:
    """Like `as_document`, but what is no document is returned as `Unreadable`."""
    try:
        return as_document(value, config, where)
    except UnweaveError as error:
        return Unreadable(str(error))


def size_of(document: Document) -> int:
    """Characters of a text, bytes of token ids: what a document weighs in memory, roughly."""
    if isinstance(document, np.ndarray):
        return document.nbytes
    return len(document) if isinstance(document, str) else len(str(document))


def content_of(document: Document) -> str:
    """What decides on which side of the held-out split a document falls: its text, or its token ids as int64 bytes."""
    if isinstance(document, np.ndarray):
        return document.tobytes().decode("latin-1")
    return document if isinstance(document, str) else repr([sorted(message.items()) for message in document])


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"
