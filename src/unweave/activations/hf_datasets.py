"""Documents from the `datasets` library: a name on the Hugging Face hub, a saved folder, or an object in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from unweave._errors import UnweaveError, nearest, nearest_beside
from unweave._hub import asked_once, unreachable
from unweave.activations.config import DataConfig
from unweave.activations.records import Document, Unreadable, choose_column, document_or_reason
from unweave.activations.sources import PART_ROWS, Part

RETRIES = 4
FIRST_WAIT = 1.0
"""Seconds before the first retry of a stream that failed; each further wait is four times as long."""


def is_hf_dataset(data: object) -> bool:
    """True for the four dataset classes, recognised without importing the library."""
    return type(data).__module__.partition(".")[0] == "datasets"


def is_saved_dataset(folder: Path) -> bool:
    """True for a folder written by `Dataset.save_to_disk`."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def load_saved(folder: Path) -> Any:
    return _library(f"reading the saved dataset {folder}").load_from_disk(str(folder))


def is_written_as_path(data: str | Path) -> bool:
    """Whether something that is not there can only have been meant as a path: on the hub, names are `name` or
    `owner/name`."""
    written = str(data)
    return (
        isinstance(data, Path)
        or written.startswith((".", "/", "~", "\\"))
        or written.endswith(("/", "\\"))
        or written.count("/") > 1
    )


class Choice(Protocol):
    """Which part of a dataset to read."""

    @property
    def subset(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def streaming(self) -> bool: ...


def load_by_name(name: str, config: Choice) -> Any:
    """A dataset of the hub, streamed or downloaded.

    Raises:
        UnweaveError: The library is not installed, or there is no such dataset, subset or split.
    """
    datasets = _library(f"{name!r} is no local file or folder, and reading it from the Hugging Face hub")
    try:
        with asked_once():
            return datasets.load_dataset(name, config.subset, split=config.split, streaming=config.streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # Only now, since `wikitext` may well be meant where its cache lies here as `wikitext-2`.
        beside = nearest_beside(Path(name), ["stdlib", "digits"]) or "."
        if (away := unreachable()) is not None and isinstance(error, ConnectionError | FileNotFoundError):
            raise UnweaveError(
                f"{name!r} is no local file or folder, it was not downloaded before, and the Hugging Face Hub cannot "
                f"be reached {away}{beside}"
            ) from error
        reason = " ".join(str(error).split()).rstrip(".")
        raise UnweaveError(
            f"{name!r} is no local file or folder, and the Hugging Face hub does not give it either: {reason}{beside}"
        ) from error


def dataset_parts(data: Any, name: str, config: DataConfig) -> list[Part]:
    """Parts of 1024 rows of a map-style dataset, or the shards of a streamed one."""
    if hasattr(data, "keys"):
        if config.split not in data:
            hint = nearest(config.split, data) or f"; there are {', '.join(map(repr, data))}."
            raise UnweaveError(f"{name} has no split {config.split!r}{hint}")
        data = data[config.split]
    if not hasattr(data, "num_shards"):
        return _map_parts(data, name, config)
    n, key = data.num_shards, f"{name}/{config.subset}/{config.split}"
    return [Part(f"{key} {i}/{n}", partial(_read_shard, data.shard(n, i), name, config)) for i in range(n)]


def _map_parts(data: Any, name: str, config: DataConfig) -> list[Part]:
    column = choose_column(data.column_names, config, name)
    rows = data.select_columns([column]).with_format(None)

    def read(start: int, skip: int) -> Iterator[Document | Unreadable]:
        for i, value in enumerate(rows[start + skip : start + PART_ROWS][column], start + skip):
            yield document_or_reason(value, config, partial("{}, row {},".format, name, i))

    return [Part(f"{name}[{start}:{len(rows)}]", partial(read, start)) for start in range(0, len(rows), PART_ROWS)]


def _read_shard(shard: Any, name: str, config: DataConfig, skip: int) -> Iterator[Document | Unreadable]:
    """Networks fail: the stream is opened anew behind the last record it gave, until it fails again and again."""
    column, failures = None, 0
    while True:
        try:
            for record in shard.skip(skip) if skip else shard:
                if column is None:
                    column = choose_column(record, config, name)
                where = partial("{}, streamed row {},".format, name, skip)
                document = document_or_reason(record[column], config, where)
                skip, failures = skip + 1, 0
                yield document
            return
        except UnweaveError:
            raise
        except Exception:  # each transport has errors of its own
            failures += 1
            if failures > RETRIES:
                raise
            time.sleep(FIRST_WAIT * 4 ** (failures - 1))


def _library(purpose: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UnweaveError(f"{purpose} needs the datasets library: pip install 'unweave[data]'.") from None
    return datasets
