from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unweave._errors import UnweaveError
from unweave.activations.packing import begin_token, keep_rows, pack, pad, separator_token

BOS, EOS, PAD = 256, 257, 258


def laid_out(documents: list[list[int]], **how: Any) -> tuple[list[int], list[int]]:
    ids, numbers = pack([np.array(d) for d in documents], **{"begin": None, "separator": None, "last": None, **how})
    return ids.tolist(), numbers.tolist()


def test_documents_are_laid_end_to_end() -> None:
    assert laid_out([[1, 2], [3]]) == ([1, 2, 3], [0, 0, 1])


def test_special_tokens_count_to_the_document_that_they_precede() -> None:
    ids, numbers = laid_out([[1, 2], [3]], begin=BOS, separator=EOS)
    assert ids == [BOS, 1, 2, EOS, BOS, 3]
    assert numbers == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("documents", "how", "expected"),
    [
        ([[BOS, 1], [BOS, 2]], {"begin": BOS}, [BOS, 1, BOS, 2]),
        ([[1, BOS], [2]], {"begin": BOS}, [BOS, 1, BOS, 2]),
        ([[1], [2]], {"begin": BOS, "separator": BOS}, [BOS, 1, BOS, 2]),
        ([[1, EOS], [2]], {"separator": EOS}, [1, EOS, 2]),
        ([[1], [EOS, 2]], {"separator": EOS}, [1, EOS, 2]),
        ([[1], [2]], {"separator": EOS, "last": 0}, [EOS, 1, EOS, 2]),
        ([[1], [2]], {"separator": EOS, "last": EOS}, [1, EOS, 2]),
    ],
)
def test_equal_special_tokens_never_stand_side_by_side(
    documents: list[list[int]], how: dict[str, int], expected: list[int]
) -> None:
    assert laid_out(documents, **how)[0] == expected


@given(
    st.lists(st.lists(st.sampled_from([1, 2, BOS, EOS]), min_size=1, max_size=6), min_size=1, max_size=8),
    st.sampled_from([None, BOS, EOS]),
    st.sampled_from([None, BOS, EOS]),
    st.integers(1, 8),
)
def test_packing_in_parts_equals_packing_at_once(
    documents: list[list[int]], begin: int | None, separator: int | None, cut: int
) -> None:
    whole, _ = laid_out(documents, begin=begin, separator=separator)
    first, _ = laid_out(documents[:cut], begin=begin, separator=separator)
    if rest := documents[cut:]:
        first += laid_out(rest, begin=begin, separator=separator, last=first[-1])[0]
    assert first == whole
    texts = [t for t in whole if t not in (begin, separator)]
    assert texts == [t for d in documents for t in d if t not in (begin, separator)]


def test_padding_on_the_right() -> None:
    documents = [np.array(d) for d in ([1, 2], [3, 4, 5, 6], [BOS, 7])]
    ids, numbers = pad(documents, begin=BOS, context=4, padding=PAD)
    assert ids.reshape(3, 4).tolist() == [[BOS, 1, 2, PAD], [BOS, 3, 4, 5], [BOS, 7, PAD, PAD]]
    assert numbers.reshape(3, 4).tolist() == [[0, 0, 0, -1], [1, 1, 1, 1], [2, 2, -1, -1]]
    ids, _ = pad(documents, begin=None, context=4, padding=PAD)
    assert ids.reshape(3, 4).tolist() == [[1, 2, PAD, PAD], [3, 4, 5, 6], [BOS, 7, PAD, PAD]]


def test_rows_are_cut_into_rows() -> None:
    ids, numbers = keep_rows([np.arange(7), np.arange(10, 17)], 3)
    assert ids.tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]
    assert numbers.tolist() == [0] * 6 + [1] * 6
    with pytest.raises(UnweaveError, match="one of 2 tokens, less than context=3"):
        keep_rows([np.arange(3), np.arange(2)], 3)


@pytest.mark.parametrize(
    ("roles", "token"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, BOS),
        ({"cls_token": "<pad>", "eos_token": "</s>"}, PAD),
        ({"eos_token": "</s>"}, EOS),
    ],
)
def test_what_begins_a_document(make_tokenizer: Any, roles: dict[str, str], token: int) -> None:
    assert begin_token(make_tokenizer(**roles)) == token


def test_nothing_begins_a_document(make_tokenizer: Any) -> None:
    with pytest.raises(UnweaveError, match="no BOS, CLS or EOS"):
        begin_token(make_tokenizer())


def test_separators(tokenizer: Any) -> None:
    assert [separator_token(tokenizer, s) for s in ("bos", "eos", "</s>", 7)] == [BOS, EOS, EOS, 7]
    assert separator_token(None, 7) == 7
    with pytest.raises(UnweaveError, match="no token 'sep'"):
        separator_token(tokenizer, "sep")
    with pytest.raises(UnweaveError, match="no token '</t>'; did you mean '</s>'"):
        separator_token(tokenizer, "</t>")
    with pytest.raises(UnweaveError, match="give the token's id"):
        separator_token(None, "eos")
