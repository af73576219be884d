"""Laying tokenised documents into rows, and the special tokens that go between them.

Packed: `[separator] [BOS] document [separator] [BOS] document ...`, cut into rows of equal length wherever a row is
full; a document goes on in the next row without another BOS. Equal special tokens never stand side by side: a BOS or
separator is left out where the token before or after it already is that token. Attention is not masked at document
borders, as in the training of most language models.

A tokenizer without a BOS token gives its CLS token instead, and without either its end-of-sequence token (Qwen): the
models concerned saw that token between documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from unweave._errors import UnweaveError, nearest
from unweave.activations.records import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED = ("bos", "eos", "sep", "cls", "pad")


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to put in front of a document.

    Raises:
        UnweaveError: The tokenizer has neither BOS, CLS nor EOS.
    """
    for token in (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UnweaveError("the tokenizer has no BOS, CLS or EOS token to begin a document with: set bos to False.")


def separator_token(tokenizer: PreTrainedTokenizerBase | None, separator: str | int) -> int:
    """The id of a separator given as an id, as "bos", "eos", ..., or as a token of the vocabulary.

    Raises:
        UnweaveError: There is no such token.
    """
    if isinstance(separator, int):
        return separator
    if tokenizer is None:
        raise UnweaveError(f"separator={separator!r} needs a tokenizer; without one, give the token's id.")
    vocabulary = tokenizer.get_vocab()
    token = getattr(tokenizer, f"{separator}_token_id") if separator in _NAMED else vocabulary.get(separator)
    if token is None:
        raise UnweaveError(f"the tokenizer has no token {separator!r}{nearest(separator, vocabulary) or '.'}")
    return token


def pack(
    documents: Sequence[TokenIds], *, begin: int | None, separator: int | None, last: int | None
) -> tuple[TokenIds, TokenIds]:
    """Lay documents end to end.

    Args:
        documents: Token ids of each document, none of them empty.
        begin: Token in front of each document, if any.
        separator: Token between documents, if any.
        last: The token after which the first of them follows; None at the very beginning.

    Returns:
        The ids in one vector, and for each the number of its document, counted from 0. Special tokens count to the
        document that they precede.
    """
    pieces, lengths = list[TokenIds](), list[int]()
    for ids in documents:
        first, prefix = ids[0], list[int]()
        following = first if begin is None else begin
        if separator is not None and last is not None and separator not in (last, following):
            prefix.append(separator)
            last = separator
        if begin is not None and begin not in (last, first):
            prefix.append(begin)
        if prefix:
            pieces.append(np.array(prefix, dtype=np.int64))
        pieces.append(ids)
        lengths.append(len(prefix) + len(ids))
        last = ids[-1]
    return np.concatenate(pieces), np.repeat(np.arange(len(lengths)), lengths)


def pad(documents: Sequence[TokenIds], *, begin: int | None, context: int, padding: int) -> tuple[TokenIds, TokenIds]:
    """One document a row: cut to `context`, padded on the right; laid out like `pack`, with document -1 on padding."""
    ids = np.full((len(documents), context), padding, dtype=np.int64)
    numbers = np.full((len(documents), context), -1, dtype=np.int64)
    for i, document in enumerate(documents):
        start = 0
        if begin is not None and document[0] != begin:
            ids[i, 0], start = begin, 1
        end = min(start + len(document), context)
        ids[i, start:end] = document[: end - start]
        numbers[i, :end] = i
    return ids.ravel(), numbers.ravel()


def keep_rows(rows: Sequence[TokenIds], context: int) -> tuple[TokenIds, TokenIds]:
    """Rows of one width that are laid out already: each is cut into whole rows of `context`, the remainder dropped.

    Raises:
        UnweaveError: A row is shorter than the context.
    """
    shortest = min(map(len, rows))
    if shortest < context:
        raise UnweaveError(f"after longer rows the data has one of {shortest} tokens, less than context={context}.")
    pieces = [row[: len(row) // context * context] for row in rows]
    return np.concatenate(pieces), np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
