"""Data sets built locally; the hub is never asked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unweave._errors import UnweaveError
from unweave.activations import hf_datasets
from unweave.activations.config import DataConfig
from unweave.activations.documents import open_documents
from unweave.activations.images import ImageConfig, open_images
from unweave.activations.reader import DocumentReader

TEXTS = [f"document number {i}" for i in range(40)]
EVERYTHING = DataConfig(held_out=0)


def dataset() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"id": list(range(40)), "text": TEXTS})


def reader(data: Any, config: DataConfig = EVERYTHING) -> DocumentReader:
    return DocumentReader(open_documents(data, config), config, held_out=False)


@pytest.mark.parametrize("streamed", [False, True])
def test_objects_of_the_library(streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_datasets, "PART_ROWS", 7)
    data = dataset().to_iterable_dataset(num_shards=3) if streamed else dataset()
    source = open_documents(data, EVERYTHING)
    assert len(source.parts) == (3 if streamed else 6)
    documents = list(reader(source))
    assert sorted(documents) == sorted(TEXTS)
    assert documents != TEXTS
    skipped = [document for part in source.parts for document in part.read(4)]
    assert len(skipped) == 40 - 4 * len(source.parts)


@pytest.mark.parametrize("streamed", [False, True])
def test_resuming(streamed: bool) -> None:
    def make() -> DocumentReader:
        return reader(dataset().to_iterable_dataset(num_shards=3) if streamed else dataset())

    first, second = make(), make()
    for _ in range(17):
        next(first)
    second.load_state_dict(first.state_dict())
    assert list(first) == list(second)


def test_token_ids_in_torch_format() -> None:
    from datasets import Dataset

    data = Dataset.from_dict({"input_ids": [[i, i, i] for i in range(9)]}).with_format("torch")
    config = DataConfig(context=3, held_out=0)
    source = open_documents(data, config)
    assert source.rows
    assert sorted(d.tolist() for d in reader(source, config)) == [[i] * 3 for i in range(9)]  # type: ignore[union-attr]


def test_a_saved_dataset(tmp_path: Path) -> None:
    from datasets import DatasetDict

    dataset().save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=dataset(), test=dataset().select([0])).save_to_disk(str(tmp_path / "two"))
    assert sorted(reader(tmp_path / "one")) == sorted(TEXTS)
    assert list(reader(tmp_path / "two", DataConfig(split="test", held_out=0))) == TEXTS[:1]
    with pytest.raises(UnweaveError, match="no split 'tset'; did you mean 'test'"):
        open_documents(tmp_path / "two", DataConfig(split="tset"))


def test_a_name_reaches_the_library_with_all_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = {}

    def load(name: str, subset: str | None, **settings: Any) -> Any:
        asked.update({"name": name, "subset": subset}, **settings)
        return dataset().to_iterable_dataset(2)

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = DataConfig(subset="raw", split="validation", streaming=True, held_out=0)
    assert sorted(reader("someone/some-text", config)) == sorted(TEXTS)
    assert asked == {"name": "someone/some-text", "subset": "raw", "split": "validation", "streaming": True}


def test_what_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'nobody/nothing'\ncannot be accessed")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UnweaveError, match=r"'nobody/nothing' is no local .* cannot be reached .*OFFLINE is set"):
        open_documents("nobody/nothing", EVERYTHING)
    monkeypatch.setattr(hf_datasets, "unreachable", lambda: None)
    with pytest.raises(UnweaveError, match=r"no local file or folder, .* Dataset 'nobody/nothing' cannot be accessed"):
        open_documents("nobody/nothing", EVERYTHING)


def test_the_hub_says_whether_a_name_is_misspelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset of the hub may be called nearly as something here; where there is none, that is what was meant."""
    import datasets

    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "owner" / "pile-2").mkdir(parents=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset())
    for name in ("wikitext", "owner/pile"):
        assert sorted(reader(name)) == sorted(TEXTS)

    def missing(name: str, *_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    monkeypatch.setattr(hf_datasets, "unreachable", lambda: None)
    for name, meant in (("wikitxt", "wikitext-2"), ("owner/pyle", "owner/pile-2"), ("stdlb", "stdlib")):
        with pytest.raises(UnweaveError, match=f"'{name}' is no local file .* on the Hub; did you mean '{meant}'"):
            open_documents(name, EVERYTHING)
    with pytest.raises(UnweaveError, match="did you mean 'digits'"):
        open_images("digit", ImageConfig())


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnweaveError, match=r"'someone/text' is no local file .* pip install 'unweave\[data\]'"):
        open_documents("someone/text", EVERYTHING)


def test_without_pyarrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UnweaveError, match=r"pip install 'unweave\[data\]'"):
        open_documents(tmp_path / "a.parquet", EVERYTHING)


class Flaky:
    """A shard that fails after every third record, `failures` times in all."""

    def __init__(self, failures: int, start: int = 0) -> None:
        self.failures, self.start = [failures], start

    def skip(self, n: int) -> Flaky:
        other = Flaky(0, n)
        other.failures = self.failures
        return other

    def __iter__(self) -> Iterator[dict[str, str]]:
        for i, text in enumerate(TEXTS[self.start :], 1):
            yield {"text": text}
            if i % 3 == 0 and self.failures[0]:
                self.failures[0] -= 1
                raise ConnectionError("the line is dead")


def test_pitfall_237_a_stream_that_fails_is_resumed_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_datasets, "FIRST_WAIT", 0.0)
    assert list(hf_datasets._read_shard(Flaky(10), "flaky", EVERYTHING, 5)) == TEXTS[5:]


def test_pitfall_237_a_stream_that_only_fails_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_datasets, "FIRST_WAIT", 0.0)

    class Dead(Flaky):
        def __iter__(self) -> Iterator[dict[str, str]]:
            raise ConnectionError("the line is dead")
            yield

    with pytest.raises(ConnectionError):
        list(hf_datasets._read_shard(Dead(1), "flaky", EVERYTHING, 0))
