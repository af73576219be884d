"""What the documents are, whatever holds them; and their order."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unweave._errors import UnweaveError
from unweave.activations import reader as reader_module
from unweave.activations import sources
from unweave.activations.config import DataConfig
from unweave.activations.documents import open_documents
from unweave.activations.reader import DocumentReader
from unweave.activations.records import Document
from unweave.activations.sources import cut_text
from unweave.activations.split import is_held_out

TEXTS = [f"document number {i}" for i in range(40)]
EVERYTHING = DataConfig(held_out=0)


def read(data: Any, config: DataConfig = EVERYTHING, *, epoch: int = 0, held_out: bool = False) -> list[Any]:
    reader = DocumentReader(open_documents(data, config), config, held_out=held_out)
    reader.start_epoch(epoch)
    return [d.tolist() if isinstance(d, np.ndarray) else d for d in reader]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path: Path, row_group_size: int = 7, **columns: list[Any]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


# --- what is read ----------------------------------------------------------------------------------------------------


def test_lists_tuples_and_iterables() -> None:
    class Again:
        def __iter__(self) -> Iterator[str]:
            return iter(TEXTS)

    for data in (TEXTS, tuple(TEXTS), Again()):
        assert sorted(read(data)) == sorted(TEXTS)


def test_a_generator_can_be_read_for_every_epoch_and_side() -> None:
    source = open_documents((text for text in TEXTS), EVERYTHING)
    assert sorted(read(source)) == sorted(read(source, epoch=1)) == sorted(TEXTS)


def test_jsonl_of_records_and_of_strings(tmp_path: Path) -> None:
    records = [{"id": 1, "text": text} for text in TEXTS]
    assert sorted(read(write_jsonl(tmp_path / "a.jsonl", records))) == sorted(TEXTS)
    assert sorted(read(write_jsonl(tmp_path / "b.jsonl", [*TEXTS]))) == sorted(TEXTS)


def test_jsonl_without_a_last_newline_with_blank_lines_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "zw\xc3\xb6lf"}')
    assert sorted(read(path)) == ["one", "zwölf"]


@pytest.mark.parametrize("part_bytes", [1, 16, 33, 100, 10_000])
def test_byte_ranges_neither_lose_nor_repeat_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    monkeypatch.setattr(sources, "PART_BYTES", part_bytes)
    texts = [f"{i} " + "é" * (i % 13) for i in range(50)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts), encoding="utf-8")
    assert sorted(read(path)) == sorted(texts)


def test_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", n=list(range(40)), content=TEXTS)
    assert sorted(read(path)) == sorted(TEXTS)


def test_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paragraphs = [f"paragraph {i}: " + "word " * (i % 90) for i in range(400)]
    text = "\n\n".join(paragraphs)
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    assert sources.LEAST_CHARS == 2000
    documents = cut_text(text)
    assert "".join(documents) == text
    assert min(map(len, documents)) >= 2000
    assert all(d.endswith("\n\n") for d in documents[:-1])
    assert sorted(read(path)) == sorted(documents)
    monkeypatch.setattr(sources, "PART_BYTES", 9_000)
    assert len("".join(read(path))) == len(text)


def test_text_without_blank_lines_is_cut_at_line_ends() -> None:
    text = "a line of some words\n" * 10_000
    documents = cut_text(text)
    assert "".join(documents) == text
    assert max(map(len, documents)) < 45_000
    assert all(d.endswith("\n") for d in documents)
    assert cut_text("x" * 100_000) == ["x" * 100_000]


def test_a_small_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One.\n\nTwo.\r\n\r\nThree.")
    assert read(path) == ["One.\n\nTwo.\n\nThree."]


def test_the_files_of_a_folder_are_documents(tmp_path: Path) -> None:
    folder = tmp_path / "with spaces"
    (folder / "deeper" / ".hidden").mkdir(parents=True)
    long = "some words\n\n" * 1000
    (folder / "a.txt").write_text(long)
    (folder / "deeper" / "b.TXT").write_text("b")
    (folder / "deeper" / ".hidden" / "c.txt").write_text("c")
    (folder / "README.md").write_text("ignored")  # nobody takes it for data
    (folder / "notes.md").write_text("ignored")
    write_jsonl(folder / "d.jsonl", [{"text": "d"}])
    with pytest.warns(UserWarning, match=r"with spaces, 3 of 4 files are read; others are of no such kind \(\.md\)\.$"):
        assert sorted(read(folder)) == sorted([long, "b", "d"])


def test_the_only_file_of_a_folder_is_cut_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\n\n" * 1000)
    assert len(read(tmp_path)) > 1


def test_a_large_file_of_a_folder_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "WHOLE_FILE_BYTES", 5000)
    (tmp_path / "a.txt").write_text("some words\n\n" * 1000)
    (tmp_path / "b.txt").write_text("b")
    assert len(read(tmp_path)) > 2


def test_the_standard_library_by_name() -> None:
    source = open_documents("stdlib", EVERYTHING)
    assert len(next(iter(DocumentReader(source, EVERYTHING, held_out=False)))) >= 200


ROWS = np.arange(60).reshape(12, 5)
FIVE = DataConfig(context=5, held_out=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda _: ROWS,
        lambda _: ROWS.astype(np.uint16),
        lambda _: torch.from_numpy(ROWS).int(),
        lambda _: ROWS.ravel(),
        lambda _: np.concatenate([ROWS.ravel(), [7, 7]]),
        lambda _: [row.tolist() for row in ROWS],
        lambda _: [torch.from_numpy(row) for row in ROWS],
        lambda _: [{"input_ids": row.tolist(), "text": "..."} for row in ROWS],
        lambda folder: write_jsonl(folder / "a.jsonl", [{"tokens": row.tolist()} for row in ROWS]),
        lambda folder: write_parquet(folder / "a.parquet", input_ids=ROWS.tolist()),
        lambda folder: (np.save(folder / "a.npy", ROWS), folder / "a.npy")[1],
        lambda folder: (np.save(folder / "a.npy", ROWS[:9]), np.save(folder / "b.npy", ROWS[9:]), folder)[2],
    ],
)
def test_rows_of_token_ids(make: Callable[[Path], Any], tmp_path: Path) -> None:
    source = open_documents(make(tmp_path), FIVE)
    assert source.rows
    assert sorted(read(source, FIVE)) == ROWS.tolist()


def test_token_ids_become_int64() -> None:
    data = [np.array([1, 2], dtype=np.uint16), torch.tensor([3], dtype=torch.int32), [4]]
    assert [d.dtype for d in DocumentReader(open_documents(data, FIVE), FIVE, held_out=False)] == [np.int64] * 3  # type: ignore[union-attr]


def test_token_ids_of_different_lengths_are_documents_to_pack() -> None:
    source = open_documents([[1, 2], [3, 4, 5, 6, 7, 8]], FIVE)
    assert not source.rows
    assert sorted(read(source, FIVE)) == [[1, 2], [3, 4, 5, 6, 7, 8]]


def test_chat_messages(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}] for i in range(5)]
    config = DataConfig(chat=True, held_out=0)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": m, "text": "not this"} for m in messages])
    for data in (messages, path, write_parquet(tmp_path / "a.parquet", messages=messages)):
        assert sorted(read(data, config), key=str) == messages


@pytest.mark.parametrize(
    "make",
    [
        lambda _: TEXTS,
        lambda _: iter(TEXTS),
        lambda _: ROWS,
        lambda folder: write_parquet(folder / "a.parquet", text=TEXTS),
        lambda folder: write_parquet(folder / "a.parquet", row_group_size=40, text=TEXTS),
        lambda folder: write_jsonl(folder / "a.jsonl", [{"text": text} for text in TEXTS]),
        lambda folder: (folder / "a.txt", (folder / "a.txt").write_text("some words\n\n" * 1000))[0],
        lambda folder: (folder, (folder / "a.txt").write_text("a"), (folder / "b.txt").write_text("b"))[0],
    ],
)
def test_a_part_can_be_read_from_any_document_on(
    make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PART_ROWS", 8)
    for part in open_documents(make(tmp_path), FIVE).parts:
        whole = [str(document) for document in part.read(0)]
        for n in range(len(whole) + 1):
            assert [str(document) for document in part.read(n)] == whole[n:]


def test_the_column_can_be_chosen(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["no"] * 3, answer=["a", "b", "c"])
    assert sorted(read(path, DataConfig(column="answer", held_out=0))) == ["a", "b", "c"]


# --- what is refused -------------------------------------------------------------------------------------------------


def a_jsonl(folder: Path, *records: Any) -> Path:
    return write_jsonl(folder / "a.jsonl", list(records))


def bad_jsonl(folder: Path) -> Path:
    path = folder / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "fine"}\n{"text": oops}\n')
    return path


def binary(folder: Path, name: str) -> Path:
    (folder / name).write_bytes(b"abc\n\xff\xfe")
    return folder / name


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (lambda f: f / "wikki.txt", {}, r"there is no file or folder .*wikki.txt; did you mean '.*wiki.txt'"),
        (lambda f: "./missing", {}, "there is no file or folder ./missing"),
        (lambda f: f, {"column": "x"}, "holds no text"),
        (lambda f: (f / "wiki.txt").rename(f / "wiki.doc").parent, {}, "holds no .txt, .jsonl, .parquet, .npy file"),
        (lambda f: (f / "wiki.txt").rename(f / "wiki.doc"), {}, "none of the kinds of files"),
        (bad_jsonl, {"max_bad": 0}, "bad.jsonl, line 3, is not valid JSON"),
        (lambda f: a_jsonl(f, {"text": "x"}, {"text": 3}), {"max_bad": 0}, "a.jsonl, line 2, holds a value of type"),
        (lambda f: a_jsonl(f, {"text": None}), {}, "a.jsonl, line 1, holds nothing"),
        (lambda f: a_jsonl(f, {"txt": "x"}), {}, "no column known to hold text; set column to one of 'txt'"),
        (lambda f: a_jsonl(f, {"text": "x"}), {"column": "txet"}, "no column 'txet'; did you mean 'text'"),
        (lambda f: a_jsonl(f, {"text": "x"}), {"column": "q"}, "no column 'q'; there are 'text'"),
        (lambda f: binary(f, "b.txt"), {"max_bad": 0}, r"b.txt, line 2, is not UTF-8 text \(byte 4\)"),
        (lambda f: binary(f, "b.parquet"), {}, "b.parquet is no readable Parquet file"),
        (lambda f: binary(f, "b.npy"), {}, "b.npy is no readable .npy file"),
        (lambda f: [], {}, "holds no text"),
        (lambda f: ["", ""], {}, "holds no text"),
        (lambda f: iter([]), {}, "holds no text"),
        (lambda f: [["a", "b"]], {}, "document 0 of the data holds a value of type list"),
        (lambda f: 3, {}, "data of type int"),
        (lambda f: np.ones((3, 200)), {}, "2-D array of float64"),
        (lambda f: np.ones((3, 20), dtype=int), {}, "rows of 20 tokens, shorter than context=128"),
        (lambda f: np.ones(20, dtype=int), {}, "fewer token ids than one row"),
        (lambda f: [[1] * 128], {"chat": True}, "holds token ids, but chat is set"),
        (lambda f: np.ones((3, 200), dtype=int), {"chat": True}, "holds token ids, but chat is set"),
        (lambda f: ["text"], {"chat": True}, "plain text, but chat is set"),
        (lambda f: [[{"role": "user", "content": "x"}]], {}, "chat messages: set chat"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, make: Callable[[Path], Any], config: dict[str, Any], message: str) -> None:
    (tmp_path / "wiki.txt").write_text("")
    with pytest.raises(UnweaveError, match=message):
        open_documents(make(tmp_path), DataConfig(**config))


def test_arrays_and_text_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    np.save(tmp_path / "a.npy", ROWS)
    with pytest.raises(UnweaveError, match=r"mixes \.npy rows of tokens with text"):
        open_documents(tmp_path, FIVE)


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "WINDOW_DOCUMENTS", 10)
    monkeypatch.setattr(sources, "PART_ROWS", 3)


@pytest.mark.usefixtures("small_windows")
def test_pitfall_201_220_the_order_is_a_function_of_seed_and_epoch() -> None:
    first = read(TEXTS)
    assert first == read(TEXTS)
    assert first != TEXTS
    others = [read(TEXTS, epoch=1), read(TEXTS, DataConfig(held_out=0, seed=1))]
    assert all(sorted(other) == sorted(TEXTS) and other != first for other in others)
    assert others[0] != others[1]


@pytest.mark.usefixtures("small_windows")
def test_documents_travel_far() -> None:
    texts = [str(i) for i in range(300)]
    places = np.array([int(text) for text in read(texts)])
    assert np.abs(places - np.arange(300)).mean() > 60  # 100 for a uniform permutation


def test_the_window_is_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "WINDOW_BYTES", 100)
    taken: list[str] = []

    class Watched:
        def __iter__(self) -> Iterator[str]:
            for i in range(50):
                taken.append(f"{i:02d}" * 10)
                yield taken[-1]

    reader = DocumentReader(open_documents(Watched(), EVERYTHING), EVERYTHING, held_out=False)
    taken.clear()
    next(reader)
    assert len(taken) == 5


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("consumed", [0, 1, 9, 10, 11, 25, 39, 40])
@pytest.mark.parametrize("held_out", [0, 0.4])
def test_a_reader_resumes_anywhere(consumed: int, held_out: float) -> None:
    config = DataConfig(held_out=held_out)
    source = open_documents(TEXTS, config)
    reader = DocumentReader(source, config, held_out=False)
    reader.start_epoch(2)
    for _, _ in zip(range(consumed), reader, strict=False):
        pass
    state = json.loads(json.dumps(reader.state_dict()))
    resumed = DocumentReader(open_documents(TEXTS, config), config, held_out=False)
    resumed.load_state_dict(state)
    assert resumed.epoch == 2
    assert list(resumed) == list(reader)


def test_pitfall_180_resuming_reads_one_window_and_nothing_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "WINDOW_DOCUMENTS", 10)
    monkeypatch.setattr(sources, "PART_BYTES", 100)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i:04d}"} for i in range(400)])
    source = open_documents(path, EVERYTHING)
    reader = DocumentReader(source, EVERYTHING, held_out=False)
    for _ in range(355):
        next(reader)
    resumed = DocumentReader(source, EVERYTHING, held_out=False)
    lines = []
    monkeypatch.setattr(sources, "document_or_reason", lambda *args: lines.append(args) or args[0])
    resumed.load_state_dict(reader.state_dict())
    assert next(resumed) == next(reader)
    assert len(lines) == 10


# --- the held-out split ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 7, 100])
@pytest.mark.usefixtures("small_windows")
def test_the_sides_are_disjoint_complete_and_never_empty(n: int) -> None:
    config = DataConfig(held_out=0.05 if n < 10 else 0.3)
    texts = [f"text {i}" for i in range(n)]
    train, held_out = (read(texts, config, held_out=side) for side in (False, True))
    assert train
    assert held_out
    assert sorted(train + held_out) == sorted(texts)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_among_many_documents_each_ones_content_alone_decides(seed: int) -> None:
    texts = [str(i) for i in range(400)]
    held_out = read(texts, DataConfig(held_out=0.02, seed=seed), held_out=True)
    assert sorted(held_out) == sorted(text for text in texts if is_held_out(text, 0.02))
    assert held_out


def test_copies_of_a_document_are_on_the_same_side() -> None:
    config = DataConfig(held_out=0.3)
    train, held_out = (set(read(TEXTS * 3, config, held_out=side)) for side in (False, True))
    assert train.isdisjoint(held_out)


def test_the_split_does_not_depend_on_the_seed_or_the_container(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    sides = [
        set(read(data, DataConfig(held_out=0.3, seed=seed), held_out=True)) for data in (TEXTS, path) for seed in (0, 1)
    ]
    assert all(side == sides[0] for side in sides)


def test_token_ids_are_split_alike_whatever_their_type() -> None:
    config = DataConfig(context=5, held_out=0.3)
    rows = np.random.default_rng(0).integers(0, 1000, (50, 5))
    sides = [sorted(read(data, config, held_out=True)) for data in (rows, rows.astype(np.uint16), rows.tolist())]
    assert 0 < len(sides[0]) < 50
    assert sides[0] == sides[1] == sides[2]


def test_messages_are_split_by_their_content() -> None:
    config = DataConfig(chat=True, held_out=0.3)
    messages: list[Document] = [[{"role": "user", "content": text}] for text in TEXTS]
    swapped: list[Document] = [[{"content": text, "role": "user"}] for text in TEXTS]
    assert 0 < len(read(messages, config, held_out=True)) < 40
    assert read(messages, config, held_out=True) == read(swapped, config, held_out=True)


def test_a_changed_data_set_has_another_fingerprint(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    before = open_documents(path, EVERYTHING).fingerprint
    assert before == open_documents(path, EVERYTHING).fingerprint
    write_jsonl(path, [{"text": "one"}, {"text": "two"}])
    assert open_documents(path, EVERYTHING).fingerprint != before


# --- what cannot be read ---------------------------------------------------------------------------------------------


def with_bad_lines(path: Path, *bad: int) -> Path:
    """60 records, and lines that are no JSON at some places."""
    records = [json.dumps({"text": f"record {i}"}) for i in range(60)]
    for i in bad:
        records[i] = "{oops"
    path.write_text("\n".join(records))
    return path


def test_lines_that_cannot_be_read_are_left_out_named_and_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "WINDOW_DOCUMENTS", 10)
    config = DataConfig(held_out=0.0, max_bad=2)
    path = with_bad_lines(tmp_path / "a.jsonl", 17, 41)
    reader = DocumentReader(open_documents(path, config), config, held_out=False)
    with pytest.warns(UserWarning, match=r"left out: .*a\.jsonl, line (18|42), is not valid JSON") as warned:
        first = list(reader)
    assert sorted(first) == sorted(f"record {i}" for i in range(60) if i not in (17, 41))
    assert len(warned) == len(reader.skipped) == 2
    reader.start_epoch(1)
    assert sorted(reader) == sorted(first)  # type: ignore[type-var]
    assert len(reader.skipped) == 2


def test_more_of_them_than_allowed_are_an_error(tmp_path: Path) -> None:
    path = with_bad_lines(tmp_path / "a.jsonl", 3, 5, 59)
    config = DataConfig(held_out=0.0, max_bad=2)
    reader = DocumentReader(open_documents(path, config), config, held_out=False)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(UnweaveError, match=r"line 60, is not valid JSON .*\(max_bad=2 others were left out\)\.$"),
    ):
        list(reader)


def test_what_was_left_out_is_remembered_when_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "WINDOW_DOCUMENTS", 10)
    path = with_bad_lines(tmp_path / "a.jsonl", 2, 33)
    config = DataConfig(held_out=0.0, max_bad=2)
    source = open_documents(path, config)
    reader = DocumentReader(source, config, held_out=False)
    with pytest.warns(UserWarning, match="left out"):
        whole = list(reader)
    for taken in (0, 5, 35, 57):
        half, rest = (DocumentReader(source, config, held_out=False) for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = [next(half) for _ in range(taken)]
            rest.load_state_dict(json.loads(json.dumps(half.state_dict())))
            got += list(rest)
        assert got == whole
        assert sorted(rest.skipped) == sorted(reader.skipped)


@pytest.mark.parametrize("written", ["wikki/", "./wikki/", "wikki//"])
def test_what_ends_with_a_slash_is_a_folder_and_nothing_is_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    from unweave.activations import hf_datasets
    from unweave.activations.images import ImageConfig
    from unweave.activations.images.listing import open_images

    (tmp_path / "wiki").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf_datasets, "_library", None)
    with pytest.raises(UnweaveError, match=r"there is no file or folder .*wikki/+; did you mean 'wiki'\?"):
        open_documents(written, DataConfig())
    with pytest.raises(UnweaveError, match=r"there is no image or folder .*wikki/+; did you mean 'wiki'\?"):
        open_images(written, ImageConfig())
