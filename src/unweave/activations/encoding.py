"""Turning documents into token ids, for live rows and for token folders alike.

Special tokens are left to the packing. Tokenizers of the `tokenizers` library are called directly: transformers'
wrapper makes them track offsets too, and converts more than the ids, which takes a fifth longer.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from unweave._errors import UnweaveError
from unweave.activations.config import DataConfig
from unweave.activations.records import Document, TokenIds, Unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_SETTING_UP = threading.Lock()
"""One thread at a time sets a tokenizer up; whoever comes later finds it so, and changes nothing that is in use."""


class Encoder:
    """Token ids of documents: texts, or chats if `config.chat` is set. Token ids are left as they are.

    Args:
        tokenizer: Needed for text and chats.
        config: `chat` is read.
        name: Name of the data, for errors.

    Raises:
        UnweaveError: `chat` is set and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, config: DataConfig, name: str) -> None:
        if config.chat and tokenizer is None:
            raise UnweaveError(f"{name} needs a tokenizer, to lay out chats with its chat template.")
        if config.chat and tokenizer is not None and not tokenizer.chat_template:
            raise UnweaveError("chat is set, but the tokenizer has no chat template.")
        self._tokenizer, self._chat, self._name = tokenizer, config.chat, name
        self._direct = _is_plain(tokenizer)

    def __call__(self, documents: Sequence[Document]) -> list[TokenIds]:
        """The ids of each document, without special tokens in front or behind.

        Raises:
            UnweaveError: Text without a tokenizer, or a conversation that the chat template refuses.
        """
        texts: list[Any] = [document for document in documents if not isinstance(document, np.ndarray)]
        encoded = iter(self._encode(self._lay_out(texts) if self._chat else texts) if texts else ())
        return [document if isinstance(document, np.ndarray) else next(encoded) for document in documents]

    def one_by_one(self, documents: Sequence[Document]) -> list[TokenIds | Unreadable]:
        """Like calling it, but a conversation that cannot be laid out gives the reason in its place."""
        if not self._chat:
            return [*self(documents)]
        try:
            return [*self(documents)]
        except UnweaveError as error:
            if len(documents) == 1:
                return [Unreadable(str(error))]
        return [result for document in documents for result in self.one_by_one([document])]

    def _encode(self, texts: list[str]) -> list[TokenIds]:
        if self._tokenizer is None:
            raise UnweaveError(f"{self._name} holds text, and there is no tokenizer to read it with.")
        if self._direct:
            with _SETTING_UP:
                self._tokenizer([""], add_special_tokens=False)  # sets no truncation, no padding, and what is special
            backend: Any = self._tokenizer.backend_tokenizer
            # Several threads at once: its own threads go on with one chunk while the ids of another are unpacked.
            fast = backend.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.int64) for encoding in fast]
        with _SETTING_UP:
            encoded = self._tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
                verbose=False,
            )  # fmt: skip
        return [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]

    def _lay_out(self, chats: list[Any]) -> list[str]:
        from jinja2 import TemplateError

        assert self._tokenizer is not None
        try:
            return list(map(str, self._tokenizer.apply_chat_template(chats, tokenize=False)))
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise UnweaveError(f"the chat template cannot lay out a conversation of the data: {error}.") from error


def _is_plain(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether transformers adds nothing to a fast tokenizer that would change token ids."""
    if tokenizer is None:
        return False
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind: Any = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    )
