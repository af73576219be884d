"""`tokenize`: the rows are those that live text gives, in the order of the data, and nothing is lost on the way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import unweave as uw
from unweave._errors import UnweaveError
from unweave.activations import DataConfig, TokenRows
from unweave.activations import reader as reader_module
from unweave.activations.tokenized import TokenFolder
from unweave.activations.tokenized import tokenize as tokenize_module
from unweave.activations.tokenized.tokenize import TokenizeProgress, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, PAD = 256, 258
TEXTS = [f"document {i} " + "says so much " * (i % 9) for i in range(120)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_module, "CHUNK_DOCUMENTS", 7)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tokens_of(folder: TokenFolder, side: Any = "train") -> tuple[list[int], list[int]]:
    ids, documents = folder.rows(side, 0, folder.n_rows(side))
    return ids.ravel().tolist(), documents.ravel().tolist()


def texts_of(folder: TokenFolder, tokenizer: PreTrainedTokenizerFast, side: Any) -> dict[int, str]:
    """Text by document number."""
    found: dict[int, list[int]] = {}
    for token, document in zip(*tokens_of(folder, side), strict=True):
        found.setdefault(document, []).append(token)
    return {number: tokenizer.decode(ids[1:]) for number, ids in found.items() if ids[0] == BOS}


def test_rows_hold_the_data_in_their_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tokenize(TEXTS, tmp_path / "t", tokenizer=tokenizer, config=DataConfig(context=16, held_out=0))
    expected = [token for text in TEXTS for token in (BOS, *tokenizer(text)["input_ids"])]
    numbers = [i for i, text in enumerate(TEXTS) for _ in range(1 + len(tokenizer(text)["input_ids"]))]
    whole = len(expected) // 16 * 16
    assert tokens_of(folder) == (expected[:whole], numbers[:whole])
    assert folder.begin == BOS
    assert folder.manifest["documents"] == {"train": 120, "held_out": 0}
    assert folder.n_rows("held_out") == 0


@pytest.mark.parametrize("window", [1000, 50])
@pytest.mark.parametrize("fraction", [0.3, 0.002])
def test_the_split_is_that_of_live_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, window: int, fraction: float
) -> None:
    """Also where so little is held out that the limit has to move, and where the data do not fit into a window."""
    monkeypatch.setattr(reader_module, "WINDOW_DOCUMENTS", window)
    config = DataConfig(context=64, pack=False, held_out=fraction)  # a row is a document, so that rows can be compared
    folder = tokenize(TEXTS, tmp_path / "t", tokenizer=tokenizer, config=config)
    for held_out, side in ((False, "train"), (True, "held_out")):
        rows = folder.rows(side, 0, 999)[0].tolist()  # type: ignore[arg-type]
        if not rows:
            assert (window, fraction, side) == (50, 0.002, "held_out")
            with pytest.raises(UnweaveError, match=r"the held-out part of .* holds no text"):
                TokenRows(TEXTS, tokenizer, config, held_out=held_out).next_rows(1)
        else:
            live = TokenRows(TEXTS, tokenizer, config, held_out=held_out).next_rows(999)
            assert sorted(live.ids.tolist()) == sorted(rows)


def test_large_documents_are_split_as_live_text_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cutoff is chosen before the first chunk comes back, wherever chunks end: here one is full of documents, one
    of characters, and one of a single document."""
    monkeypatch.setattr(tokenize_module, "CHUNK_CHARS", 400)
    texts = [*(f"short {i}" for i in range(7)), "long " * 80, "longer " * 200, *TEXTS]
    folder = tokenize(texts, tmp_path / "t", tokenizer=tokenizer, config=DataConfig(context=16, held_out=0.3))
    assert sum(folder.manifest["documents"].values()) == len(texts)


def test_layouts_match_live_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """With one document in all, live rows have the same order, so they must agree token for token."""
    text = "one long document " * 40
    for name, options in {
        "packed": {}, "bare": {"bos": False}, "padded": {"pack": False}, "separated": {"separator": "eos"},
    }.items():  # fmt: skip
        config = DataConfig(context=50, held_out=0, **options)  # type: ignore[arg-type]
        live = TokenRows([text], tokenizer, config, held_out=False).next_rows(999)
        ids, documents = tokenize([text], tmp_path / name, tokenizer=tokenizer, config=config).rows("train", 0, 999)
        assert (ids.tolist(), documents.tolist()) == (live.ids.tolist(), live.documents.tolist())


def test_padding_is_no_document(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(context=6, pack=False, held_out=0)
    folder = tokenize(["abc", "abcdefghi", ""], tmp_path / "t", tokenizer=tokenizer, config=config)
    assert folder.rows("train", 0, 9)[0][0].tolist()[4:] == [PAD, PAD]
    assert folder.rows("train", 0, 9)[1].tolist() == [[0, 0, 0, 0, -1, -1], [1] * 6]
    batch = TokenRows(tmp_path / "t", tokenizer, config, held_out=False).next_rows(2)
    assert sorted(batch.real.sum(1).tolist()) == [4, 6]


def test_chats(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation that the template refuses is skipped and named."""
    template = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chats = [[{"role": "user", "content": f"number {i}"}] for i in range(9)]
    chats[4] = [{"role": "user", "content": [1]}]  # type: ignore[dict-item]
    config = DataConfig(context=4, chat=True, held_out=0)
    folder = tokenize(chats, tmp_path / "t", tokenizer=tokenizer, config=config)
    texts = texts_of(folder, tokenizer, "train")
    assert texts[3] == "[user]number 3"
    assert sorted(texts) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert len(folder.skipped) == 1
    assert "document 4: the chat template cannot lay out" in folder.skipped[0]


def test_several_processes_give_the_same_bytes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for n in (1, 2):
        uw.tokenize(TEXTS, tmp_path / str(n), tokenizer=tokenizer, config=DataConfig(context=16), processes=n)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("pack", [True, False])
def test_resuming_ends_in_the_same_bytes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, pack: bool
) -> None:
    """Stopped after every chunk, committed or not, over several files, with lines that cannot be read."""
    monkeypatch.setattr("os.fsync", lambda file: None)
    config = DataConfig(context=16, held_out=0.3, pack=pack)
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        lines = [json.dumps({"text": text}) for text in TEXTS[i * 30 : i * 30 + 30]]
        lines[3 * i + 2] = "{"
        (data / f"{i}.jsonl").write_text("\n".join(lines))
    whole = tokenize(data, tmp_path / "whole", tokenizer=tokenizer, config=config, shard_rows=20)
    assert [reason.partition(" is not")[0].rpartition("/")[2] for reason in whole.skipped] == [
        "0.jsonl, line 3,", "1.jsonl, line 6,", "2.jsonl, line 9,", "3.jsonl, line 12,",
    ]  # fmt: skip
    commits, runs = 0, 0

    def stop(progress: TokenizeProgress) -> None:
        nonlocal commits
        commits += 1
        if commits % 3 == 2:
            raise Killed

    while not (tmp_path / "t" / "manifest.json").exists():
        runs += 1
        monkeypatch.setattr(tokenize_module, "COMMIT_SECONDS", 0.0 if runs % 2 else 1e9)
        try:
            resume = runs > 1
            tokenize(
                data, tmp_path / "t", tokenizer=tokenizer, config=config, shard_rows=20, resume=resume, progress=stop
            )
        except Killed:
            pass
        assert runs < 60
    assert runs > 5
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def test_progress_counts_parts_documents_and_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[TokenizeProgress] = []
    config = DataConfig(context=16, held_out=0)
    folder = tokenize([*TEXTS, None], tmp_path / "t", tokenizer=tokenizer, config=config, progress=seen.append)
    last = seen[-1]
    assert (last.part, last.parts, last.documents, last.skipped) == (1, 1, 121, 1)
    assert 0 <= last.tokens - folder.n_rows() * 16 < 16
    assert [each.documents for each in seen] == sorted(each.documents for each in seen)


# --- what data there are ---------------------------------------------------------------------------------------------


def test_rows_of_token_ids_are_cut_and_keep_their_numbers(tmp_path: Path) -> None:
    rows = np.arange(70).reshape(10, 7)
    folder = tokenize(rows, tmp_path / "t", model=None, config=DataConfig(context=3, held_out=0))
    assert folder.rows("train", 0, 99)[0].tolist() == rows[:, :6].reshape(20, 3).tolist()
    assert folder.rows("train", 0, 99)[1][:, 0].tolist() == np.repeat(np.arange(10), 2).tolist()
    assert np.load(tmp_path / "t" / "train_00000.npy").dtype == np.uint32


def test_token_ids_outside_of_the_vocabulary_are_skipped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = [[1, 2, 3], [1, 300], [-1, 2], [4, 5, 6]]
    folder = tokenize(data, tmp_path / "t", tokenizer=tokenizer, config=DataConfig(context=4, held_out=0))
    assert tokens_of(folder) == ([BOS, 1, 2, 3, BOS, 4, 5, 6], [0] * 4 + [3] * 4)
    assert [reason.partition(",")[0] for reason in folder.skipped] == [
        "document 1: it holds token ids from 1 to 300", "document 2: it holds token ids from -1 to 2",
    ]  # fmt: skip


def test_several_paths(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    paths = []
    for i, half in enumerate((TEXTS[:60], TEXTS[60:])):
        paths.append(tmp_path / f"{i}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in half))
    config = DataConfig(context=16)
    tokenize(paths, tmp_path / "t", tokenizer=tokenizer, config=config)
    tokenize(TEXTS, tmp_path / "u", tokenizer=tokenizer, config=config)
    for name in ("train_00000.npy", "train_00000.documents.npy", "held_out_00000.npy"):
        assert (tmp_path / "t" / name).read_bytes() == (tmp_path / "u" / name).read_bytes()


def test_unreadable_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Each is skipped and named, and what is around it is kept."""
    data, config = tmp_path / "data", DataConfig(context=2, held_out=0)
    data.mkdir()
    (data / "a.jsonl").write_bytes(
        b'{"text": "first"}\n{"text": "\xff"}\n{"text": 3}\n["a", "b"]\n{"other": "x"}\n' + b"[" * 100_000 + b'\n'
        b'{"text": "\\ud800"}\n{"text": "last"}\n'
    )  # fmt: skip
    (data / "b.txt").write_bytes(b"good line\nbad \xff line\nanother good line\n")
    folder = tokenize(data, tmp_path / "t", tokenizer=tokenizer, config=config, max_bad=7)
    assert [reason[len(str(data)) + 1 :].split(" (")[0].split(", but")[0] for reason in folder.skipped] == [
        "a.jsonl, line 2, is not valid JSON", "a.jsonl, line 3, holds a value of type int",
        "a.jsonl, line 4, holds a value of type list", "a.jsonl, line 5, has no column known to hold text; set column "
        "to one of 'other'.", "a.jsonl, line 6, is not valid JSON", "a.jsonl, line 7, holds half of a surrogate pair",
        "b.txt, line 2, is not UTF-8 text",
    ]  # fmt: skip
    assert texts_of(folder, tokenizer, "train") == {0: "first", 7: "last", 9: "good line\nanother good line\n"}
    with pytest.raises(UnweaveError, match=r"more documents cannot be read than max_bad=6 allows, the last: .*b.txt"):
        tokenize(data, tmp_path / "u", tokenizer=tokenizer, config=config, max_bad=6)
    with pytest.raises(UnweaveError, match=r"a.jsonl, line 2, is not valid JSON"):
        tokenize(data, tmp_path / "v", tokenizer=tokenizer, config=config, max_bad=0)
    with pytest.raises(UnweaveError, match=r"t lies in the data .*data: choose another folder"):
        tokenize(data, data / "t", tokenizer=tokenizer, config=config)


def test_a_larger_limit_goes_on_where_a_smaller_one_stopped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = [*TEXTS, *[None] * 5, *TEXTS]
    options: dict[str, Any] = {"tokenizer": tokenizer, "config": DataConfig(context=16)}
    with pytest.raises(UnweaveError, match="max_bad=4"):
        tokenize(data, tmp_path / "t", max_bad=4, **options)
    tokenize(data, tmp_path / "t", max_bad=5, resume=True, **options)
    tokenize(data, tmp_path / "whole", **options)
    assert contents(tmp_path / "t") == contents(tmp_path / "whole")


def nothing() -> Iterator[str]:
    yield from ()


@pytest.mark.parametrize(
    ("data", "options", "config", "message"),
    [
        ([], {}, {}, "holds no text"),
        (nothing(), {}, {}, "holds no text"),
        (["a"], {}, {}, "the training part of the list of documents holds 2 tokens, less than one row of context=16"),
        (TEXTS, {}, {"context": 1_000_000_000}, "less than one row of context=1000000000"),
        ([{"text": "x"}], {}, {"column": "txet"}, "no column 'txet'; did you mean 'text'"),
        (TEXTS, {"processes": 0}, {}, "processes=0"),
        (TEXTS, {"max_bad": -1}, {}, "max_bad=-1"),
        (TEXTS, {"model": None, "tokenizer": None}, {}, "needs a tokenizer"),
        (TEXTS, {"model": None, "tokenizer": None}, {"bos": False}, "holds text, and there is no tokenizer"),
        (TEXTS, {"model": "demmo", "tokenizer": None}, {}, "demmo"),
        (TEXTS, {}, {"chat": True}, "chat"),
    ],
)
def test_refusals(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, data: Any, options: dict[str, Any], config: dict[str, Any],
    message: str,
) -> None:  # fmt: skip
    """Nothing is left behind that would be in the way of the next try."""
    options = {"tokenizer": tokenizer} | options
    with pytest.raises(UnweaveError, match=message):
        tokenize(data, tmp_path / "t", config=DataConfig(**{"context": 16} | config), **options)
    assert not (tmp_path / "t").exists()


def test_one_row_is_enough(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tokenize(["a"], tmp_path / "t", tokenizer=tokenizer, config=DataConfig(context=2))
    assert tokens_of(folder) == ([BOS, *tokenizer("a")["input_ids"]], [0, 0])


def test_a_token_folder_is_not_tokenised_again(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenize(TEXTS, tmp_path / "t", tokenizer=tokenizer, config=DataConfig(context=16))
    with pytest.raises(UnweaveError, match="is tokenised already"):
        tokenize(tmp_path / "t", tmp_path / "u", tokenizer=tokenizer, config=DataConfig(context=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": DataConfig(context=16, bos=False)}, "bos was True and is now False"),
        ({"data": TEXTS[:-1]}, "data was '.*' and is now"),
        ({"shard_rows": 3}, "shard_rows was"),
    ],
)
def test_resuming_with_other_settings(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, change: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "config": DataConfig(context=16), "data": TEXTS}

    def stop(progress: TokenizeProgress) -> None:
        raise Killed

    with pytest.raises(Killed):
        tokenize(out=tmp_path / "t", progress=stop, **options)
    with pytest.raises(UnweaveError, match=message):
        tokenize(out=tmp_path / "t", resume=True, **options | change)
    assert tokenize(out=tmp_path / "t", resume=True, **options).n_rows() > 0


def test_uw_tokenize_is_the_function() -> None:
    assert uw.tokenize is tokenize
