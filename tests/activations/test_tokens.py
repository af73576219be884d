from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from unweave._errors import UnweaveError
from unweave.activations import tokens as tokens_module
from unweave.activations.config import DataConfig
from unweave.activations.tokens import TokenBatch, TokenRows

BOS, EOS, PAD = 256, 257, 258
TEXTS = [f"<{i}>" + "word " * (i % 7) for i in range(60)]


def rows_of(data: Any, tokenizer: Any, *, repeat: bool = False, **config: Any) -> TokenRows:
    settings = DataConfig(**{"context": 8, "held_out": 0.0, **config})
    return TokenRows(data, tokenizer, settings, held_out=False, repeat=repeat)


def everything(rows: TokenRows, n: int = 4) -> TokenBatch:
    batches = list(rows.batches(n))
    return TokenBatch(*(torch.cat([getattr(b, name) for b in batches]) for name in ("ids", "real", "documents")))


def texts_in(batch: TokenBatch, tokenizer: Any) -> list[str]:
    """The documents as the rows show them, without the special tokens."""
    ids, numbers = batch.ids.flatten(), batch.documents.flatten()
    return [
        tokenizer.decode([t for t in ids[numbers == i].tolist() if t < BOS]) for i in numbers[numbers >= 0].unique()
    ]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_CHUNK_DOCUMENTS", 3)


@pytest.mark.usefixtures("small_chunks")
def test_pitfall_205_206_no_token_is_lost_and_documents_are_marked(tokenizer: Any) -> None:
    total = sum(len(text) + 1 for text in TEXTS)
    assert everything(rows_of(TEXTS, tokenizer, context=7)).ids.numel() == total // 7 * 7 < total
    batch = everything(rows_of(TEXTS, tokenizer))
    assert batch.ids.numel() == total
    assert batch.real.all()
    assert sorted(texts_in(batch, tokenizer)) == sorted(TEXTS)
    starts = batch.documents.flatten().diff(prepend=torch.tensor([-1])) == 1
    assert batch.ids.flatten()[starts].eq(BOS).all()
    assert batch.ids.flatten()[~starts].ne(BOS).all()


def test_a_document_goes_on_in_the_next_row_without_another_bos(tokenizer: Any) -> None:
    batch = everything(rows_of(["abcdefghijklmnopqrstuvw"], tokenizer))
    assert batch.ids[:, 0].tolist() == [BOS, *tokenizer("hp")["input_ids"]]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("sizes", [(1,), (2, 5), (100,)])
def test_rows_do_not_depend_on_how_they_are_asked_for(tokenizer: Any, sizes: tuple[int, ...]) -> None:
    rows = rows_of(TEXTS, tokenizer, separator="eos")
    got = []
    while len(batch := rows.next_rows(sizes[len(got) % len(sizes)])):
        got.append(batch.ids)
    assert torch.equal(torch.cat(got), everything(rows_of(TEXTS, tokenizer, separator="eos")).ids)


def test_separators_and_no_bos(tokenizer: Any) -> None:
    batch = everything(rows_of(TEXTS, tokenizer, separator="</s>", bos=False))
    ids = batch.ids.flatten()
    assert ids[0] != EOS
    assert (ids == EOS).sum() == batch.documents.max()
    assert not (ids == BOS).any()


def test_without_a_bos_token_the_end_token_begins_documents(make_tokenizer: Any) -> None:
    rows = rows_of(TEXTS, make_tokenizer(eos_token="</s>"))
    assert rows.begin == EOS
    assert rows.next_rows(1).ids[0, 0] == EOS


def test_without_packing_each_document_has_its_row(tokenizer: Any) -> None:
    batch = everything(rows_of(TEXTS, tokenizer, pack=False))
    assert len(batch) == 60
    assert batch.ids[:, 0].eq(BOS).all()
    assert torch.equal(batch.real, batch.ids != PAD)
    assert torch.equal(batch.documents, torch.arange(60)[:, None].expand(60, 8).where(batch.real, -1))
    assert sorted(texts_in(batch, tokenizer)) == sorted(text[:7] for text in TEXTS)


def test_empty_documents_leave_no_trace(tokenizer: Any) -> None:
    batch = everything(rows_of(["", "abcdefg", "", "hijklmn"], tokenizer))
    assert sorted(texts_in(batch, tokenizer)) == ["abcdefg", "hijklmn"]
    assert batch.documents.unique().tolist() == [0, 1]


def test_chat_templates(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tokenizer, "chat_template", "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    )
    chats = [[{"role": "user", "content": f"q{i}"}, {"role": "bot", "content": f"a{i}"}] for i in range(9)]
    batch = everything(rows_of(chats, tokenizer, chat=True, context=6))
    assert "[user]q3[bot]a3" in texts_in(batch, tokenizer)
    assert (batch.ids == BOS).sum() == 9


def test_a_conversation_that_the_template_refuses(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UnweaveError, match="cannot lay out a conversation of the data: roles must alternate"):
        rows_of([[{"role": "user", "content": "q"}]], tokenizer, chat=True).next_rows(1)


def test_a_missing_chat_template_is_said(tokenizer: Any) -> None:
    with pytest.raises(UnweaveError, match="no chat template"):
        rows_of([[{"role": "user", "content": "q"}]], tokenizer, chat=True)


def test_rows_of_token_ids_are_left_as_they_are() -> None:
    data = np.arange(100, 180).reshape(10, 8)
    batch = everything(rows_of(data, None))
    assert sorted(batch.ids.tolist()) == data.tolist()
    assert batch.documents[:, 0].tolist() == list(range(10))


def test_long_rows_of_token_ids_are_cut(tokenizer: Any) -> None:
    data = np.arange(200).reshape(10, 20)
    batch = everything(rows_of(data, tokenizer))
    assert sorted(batch.ids.tolist()) == sorted(data[:, :16].reshape(20, 8).tolist())


def test_ragged_token_ids_are_packed_and_not_changed_in_place(tokenizer: Any) -> None:
    data = [np.arange(1, 5), np.arange(10, 21), np.array([BOS, 30, 31])]
    batch = everything(rows_of(data, tokenizer, context=4))
    assert batch.ids.flatten().eq(BOS).sum() == 3
    assert data[0].tolist() == [1, 2, 3, 4]


def test_pitfall_211_a_batch_is_no_view_of_the_buffer(tokenizer: Any) -> None:
    rows = rows_of(TEXTS, tokenizer)
    peeked = rows.peek(2)
    before = peeked.ids.clone()
    peeked.ids.zero_()
    assert torch.equal(rows.next_rows(2).ids, before)


def test_peeking_moves_nothing(tokenizer: Any) -> None:
    plain, peeking = rows_of(TEXTS, tokenizer), rows_of(TEXTS, tokenizer)
    for n in (3, 1, 5):
        peeking.peek(20)
        assert torch.equal(plain.next_rows(n).ids, peeking.next_rows(n).ids)


@pytest.mark.usefixtures("small_chunks")
def test_pitfall_202_data_end_unless_repetition_is_asked_for(tokenizer: Any) -> None:
    once = rows_of(TEXTS, tokenizer)
    n = len(everything(once))
    assert len(once.next_rows(1)) == 0
    assert once.epoch == 0

    again = rows_of(TEXTS, tokenizer, repeat=True)
    batch = again.next_rows(2 * n + 1)
    assert len(batch) == 2 * n + 1
    assert again.epoch == 2
    *both, _ = texts_in(batch, tokenizer)
    assert both[:60] != both[60:120]
    assert sorted(both[:60]) == sorted(both[60:120]) == sorted(TEXTS)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("config", [{}, {"pack": False}, {"separator": "eos", "seed": 3}, {"held_out": 0.4}])
@pytest.mark.parametrize("consumed", [0, 1, 17, 33, 100])
def test_a_resumed_run_serves_the_same_rows(tokenizer: Any, config: dict[str, Any], consumed: int) -> None:
    rows = rows_of(TEXTS, tokenizer, repeat=True, **config)
    rows.next_rows(consumed)
    rows.peek(9)
    saved = rows.state_dict()
    state = json.loads(json.dumps({k: v for k, v in saved.items() if not isinstance(v, torch.Tensor)})) | {
        k: v for k, v in saved.items() if isinstance(v, torch.Tensor)
    }
    expected = rows.next_rows(60)
    resumed = rows_of(TEXTS, tokenizer, repeat=True, **config)
    resumed.load_state_dict(state)
    got = resumed.next_rows(60)
    assert torch.equal(got.ids, expected.ids)
    assert torch.equal(got.documents, expected.documents)
    assert resumed.epoch == rows.epoch


def test_an_exhausted_state_stays_exhausted(tokenizer: Any) -> None:
    rows = rows_of(TEXTS, tokenizer)
    everything(rows)
    resumed = rows_of(TEXTS, tokenizer)
    resumed.load_state_dict(rows.state_dict())
    assert len(resumed.next_rows(1)) == 0


class Counting:
    """A tokenizer that remembers the batches of texts it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.batches = tokenizer, list[list[str]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: list[str], **how: Any) -> Any:
        self.batches.append(texts)
        return self.tokenizer(texts, **how)


@pytest.mark.usefixtures("small_chunks")
def test_pitfall_180_resuming_tokenises_nothing_twice(tokenizer: Any) -> None:
    counting = Counting(tokenizer)
    rows = rows_of(TEXTS, counting)
    rows.next_rows(40)
    resumed = rows_of(TEXTS, counting)
    resumed.load_state_dict(rows.state_dict())
    everything(resumed)
    assert sorted(text for batch in counting.batches for text in batch) == sorted(TEXTS)


def test_pitfall_232_documents_are_tokenised_in_bulk(tokenizer: Any) -> None:
    counting = Counting(tokenizer)
    everything(rows_of(TEXTS * 10, counting), n=1)
    assert [len(batch) for batch in counting.batches] == [256, 256, 88]


def test_a_state_of_other_data_or_settings_is_refused(tokenizer: Any) -> None:
    state = rows_of(TEXTS, tokenizer).state_dict()
    with pytest.raises(UnweaveError, match="seed was 0 and is now 1"):
        rows_of(TEXTS, tokenizer, seed=1).load_state_dict(state)
    with pytest.raises(UnweaveError, match="fingerprint was"):
        rows_of(TEXTS[:9], tokenizer).load_state_dict(state)


def test_training_and_held_out_rows_share_no_document(tokenizer: Any) -> None:
    config = DataConfig(context=64, pack=False, held_out=0.3)
    train, held_out = (
        texts_in(everything(TokenRows(TEXTS, tokenizer, config, held_out=side)), tokenizer) for side in (False, True)
    )
    assert min(len(train), len(held_out)) > 8
    assert sorted(train + held_out) == sorted(TEXTS)


@pytest.mark.parametrize(
    ("texts", "held_out", "message"),
    [
        (["short"], False, "the training part of the list of documents holds 6 tokens, less than one row of context=8"),
        (["a long enough document"], True, "the held-out part of the list of documents holds no text"),
        (["a long enough document", "b"], True, "less than one row"),
    ],
)
@pytest.mark.parametrize("repeat", [False, True])
def test_too_little_text(tokenizer: Any, texts: list[str], held_out: bool, message: str, repeat: bool) -> None:
    config = DataConfig(context=8, held_out=0.01)
    rows = TokenRows(texts, tokenizer, config, held_out=held_out, repeat=repeat)
    with pytest.raises(UnweaveError, match=message):
        rows.next_rows(1)


def test_data_that_cannot_be_read_twice_are_noticed(tokenizer: Any) -> None:
    class Once:
        def __init__(self) -> None:
            self.left = 2  # once to look at it, once to read it

        def __iter__(self) -> Any:
            self.left -= 1
            return iter(TEXTS if self.left >= 0 else [])

    rows = rows_of(Once(), tokenizer, repeat=True)
    with pytest.raises(UnweaveError, match="gave nothing in epoch 1: it cannot be read twice"):
        rows.next_rows(10_000)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"context": 1}, "context=1"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"seed": -1}, "seed=-1"),
        ({"separator": "eos", "pack": False}, "separator='eos' stands between packed documents"),
    ],
)
def test_impossible_settings(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnweaveError, match=message):
        DataConfig(**config)


def test_what_needs_a_tokenizer(tokenizer: Any) -> None:
    with pytest.raises(UnweaveError, match="needs a tokenizer, to begin"):
        rows_of(TEXTS, None)
    with pytest.raises(UnweaveError, match="there is no tokenizer to read it with"):
        rows_of(TEXTS, None, bos=False).next_rows(1)
    with pytest.raises(UnweaveError, match="held_out=0 keeps none"):
        TokenRows(TEXTS, tokenizer, DataConfig(held_out=0), held_out=True)
