"""Token ids as strings that a person can read.

A vocabulary stores its tokens in an alphabet of its own: byte-level BPE writes a space as `Ġ` and every byte of `é` as
a letter, SentencePiece writes a space as `▁` and a lone byte as `<0xE2>`. Here each token becomes the text it stands
for. Bytes that are no character by themselves (a piece of an emoji) are written `\\xe2`, so that no two tokens look
the same merely because both are undecodable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, every other byte for a letter from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hasattr(tokenizer, "byte_decoder")
    return backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__()


def token_strings(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The text that each token stands for, whitespace and control characters included.

    Args:
        tokenizer: A Hugging Face tokenizer, or None, in which case ids are written as `#17`.
        ids: Token ids.

    Returns:
        One string per id. Special and added tokens appear as written (`<|endoftext|>`), ids outside the vocabulary
        as `#50300`, bytes that are not valid UTF-8 by themselves as `\\xe2`.
    """
    ids = list(ids)
    if tokenizer is None:
        return [f"#{i}" for i in ids]
    byte_level, letters = _is_byte_level(tokenizer), _byte_of_letter()
    verbatim = tokenizer.added_tokens_decoder
    size = len(tokenizer)

    def text(i: int) -> str:
        token = tokenizer.convert_ids_to_tokens(i) if 0 <= i < size else None
        if token is None:
            return f"#{i}"
        if i in verbatim:
            return str(token)
        if byte_level and all(letter in letters for letter in token):
            return bytes(letters[letter] for letter in token).decode("utf-8", "backslashreplace")
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)]).decode("utf-8", "backslashreplace")
        return str(token).replace("▁", " ")

    return [text(i) for i in ids]
