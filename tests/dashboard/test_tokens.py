from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from unweave.dashboard import token_strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def test_byte_level_tokens_become_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(" the\n").input_ids
    assert token_strings(tokenizer, ids) == [" the", "\n"]


@pytest.mark.parametrize("text", ["é", "→", "😀", "日本"])
def test_bytes_that_are_no_character_are_written_out(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    strings = token_strings(tokenizer, tokenizer(text).input_ids)
    assert strings == [f"\\x{byte:02x}" for byte in text.encode()]


def test_special_and_added_tokens_are_taken_verbatim(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("</script><script>alert(2)</script>").input_ids
    assert token_strings(tokenizer, [0, *ids]) == ["<s>", "</script><script>alert(2)</script>"]


def test_ids_outside_the_vocabulary_and_no_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    assert token_strings(tokenizer, [len(tokenizer), -1]) == [f"#{len(tokenizer)}", "#-1"]
    assert token_strings(None, [5, 0]) == ["#5", "#0"]


def test_every_byte_has_a_string_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    strings = token_strings(tokenizer, range(1, 257))
    assert len(set(strings)) == 256


def test_sentencepiece_tokens() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁the", "cat", "▁▁", "<0xE2>", "<0x0A>", "Ġ"]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert token_strings(tokenizer, range(7)) == ["<unk>", " the", "cat", "  ", "\\xe2", "\n", "Ġ"]
