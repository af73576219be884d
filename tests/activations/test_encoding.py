"""Encoding documents: the ids are those that transformers gives, without its detours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from unweave._errors import UnweaveError
from unweave.activations import DataConfig, standard_library_text
from unweave.activations.encoding import Encoder
from unweave.models.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def test_ids_are_those_of_transformers() -> None:
    tokenizer = load_tokenizer("demo")
    texts = [text[:2000] for text, _ in zip(standard_library_text(), range(40), strict=False)]
    texts += ["", " ", "<|endoftext|> naïve 🙂\r\n\t x"]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [ids.tolist() for ids in Encoder(tokenizer, DataConfig(), "")(texts)] == expected


def test_settings_that_the_tokenizer_carries_do_not_matter(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    """Truncation and padding in a tokenizer's file, and special tokens that it adds, are left out."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(bos_token="<s>", pad_token="<pad>")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    ids = Encoder(tokenizer, DataConfig(), "")(["abcdefgh", "<s>a"])
    assert [len(i) for i in ids] == [8, 2]
    assert ids[1][0] == 256


def test_a_tokenizer_that_changes_the_call_is_called(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    tokenizer = make_tokenizer()

    class Shouting(type(tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, text: list[str], *args: object, **kwargs: object) -> object:
            return super()._encode_plus([each.upper() for each in text], *args, **kwargs)

    plain = Encoder(tokenizer, DataConfig(), "")(["ABC"])[0]
    tokenizer.__class__ = Shouting
    assert np.array_equal(Encoder(tokenizer, DataConfig(), "")(["abc"])[0], plain)


def test_token_ids_pass_through(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = np.array([5, 6])
    encoded = Encoder(tokenizer, DataConfig(), "")(["a", ids, "b"])
    assert encoded[1] is ids
    assert [len(each) for each in encoded] == [1, 2, 1]


def test_refusals(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UnweaveError, match="the data holds text, and there is no tokenizer"):
        Encoder(None, DataConfig(bos=False), "the data")(["text"])
    with pytest.raises(UnweaveError, match="the data needs a tokenizer, to lay out chats"):
        Encoder(None, DataConfig(chat=True), "the data")
    with pytest.raises(UnweaveError, match="the tokenizer has no chat template"):
        Encoder(tokenizer, DataConfig(chat=True), "the data")
