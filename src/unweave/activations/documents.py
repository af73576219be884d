"""Documents in a seeded order, from whatever holds them, without ever holding all of them.

`open_documents` turns files, folders, lists, arrays, iterables and Hugging Face datasets into `Documents`: a list of
parts that can be read again and again. `DocumentReader` reads one epoch: the parts in a random order, and their
documents shuffled within windows of 8192 documents or 64 MB. The order is a function of the seed and the epoch alone.
A reader's position is the place where its window begins and the number of documents taken from it, so resuming
reads one window again, whatever came before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from unweave._errors import UnweaveError, nearest
from unweave.activations.config import DataConfig
from unweave.activations.hf_datasets import dataset_parts, is_hf_dataset, is_saved_dataset, load_by_name, load_saved
from unweave.activations.records import Document, content_of, size_of
from unweave.activations.sources import (
    Part,
    array_parts,
    iterable_part,
    jsonl_parts,
    load_npy,
    parquet_parts,
    sequence_parts,
    text_parts,
)
from unweave.activations.split import held_out_cutoff, held_out_score
from unweave.activations.stdlib_text import standard_library_text

WINDOW_DOCUMENTS = 8192
WINDOW_BYTES = 64 << 20
_PEEKED = 64
_SUFFIXES = (".txt", ".jsonl", ".parquet", ".npy")

Data: TypeAlias = "str | Path | Iterable[Any] | Tensor | Documents"
"""What can be opened: see `open_documents`."""


@dataclass(frozen=True)
class Documents:
    """A source of documents that can be read any number of times, in any order of its parts."""

    name: str
    parts: list[Part] = field(repr=False)
    rows: bool
    """The documents are rows of token ids of equal width, at least `context`: they are used as they stand."""

    @property
    def fingerprint(self) -> str:
        """Hash of the names and extents of all parts, to notice that the data changed between two runs."""
        return hashlib.blake2b("\n".join(part.key for part in self.parts).encode(), digest_size=16).hexdigest()


def open_documents(data: Data, config: DataConfig) -> Documents:
    """Open any kind of data and look at its first documents.

    Args:
        data: One of

            - a path to a `.txt`, `.jsonl`, `.parquet` or `.npy` file, or to a folder of them (sub-folders included,
              other files ignored), or to a folder written by `Dataset.save_to_disk`;
            - `"stdlib"`: the text that every Python carries; any other name: a dataset of the Hugging Face hub;
            - a 2-D integer array or tensor of token ids `(rows, width)`, or a 1-D one, which is cut into rows;
            - a `datasets` object;
            - a list or any other iterable of documents (str, chat messages, token ids) or of records (dicts). A
              one-shot iterator is remembered as it is read; open it once and share the `Documents`.

            A `.txt` file is cut at blank lines into documents of at least 2000 characters; in a folder of several
            files, each one of up to 1 MB is one document. Token ids in a column are used as rows if they are all of
            one width and at least `context` long, and are packed like text otherwise.
        config: Column, subset, split, streaming, chat and context.

    Raises:
        UnweaveError: Nothing there, nothing in it, or not what `config` says.
    """
    if isinstance(data, Documents):
        return data
    name, parts, arrays = _parts(data, config)
    first = list(islice(chain.from_iterable(part.read(0) for part in parts), _PEEKED))
    if len(first) < _PEEKED and not any(len(document) for document in first):
        raise UnweaveError(f"{name} holds no text.")
    widths = {len(document) if isinstance(document, np.ndarray) else 0 for document in first}
    return Documents(name, parts, rows=arrays or (len(widths) == 1 and widths.pop() >= config.context))


def _parts(data: Any, config: DataConfig) -> tuple[str, list[Part], bool]:
    """Name, parts, and whether they are arrays of rows."""
    if isinstance(data, Tensor):
        data = data.detach().cpu().numpy()
    if isinstance(data, np.ndarray):
        return "the array", array_parts(data, "the array", config), True
    if isinstance(data, str) and data == "stdlib":
        return data, [iterable_part(_StandardLibrary(), config)], False
    if isinstance(data, str | Path):
        path = Path(data).expanduser()
        if path.is_dir() and is_saved_dataset(path):
            return str(data), dataset_parts(load_saved(path), str(data), config), False
        if path.exists():
            return _file_parts(path, config)
        _refuse_missing_path(data, path)
        return str(data), dataset_parts(load_by_name(str(data), config), str(data), config), False
    if is_hf_dataset(data):
        return "the dataset", dataset_parts(data, "the dataset", config), False
    if isinstance(data, Sequence):
        return "the list of documents", sequence_parts(data, config), False
    if isinstance(data, Iterable):
        return "the iterable of documents", [iterable_part(data, config)], False
    raise UnweaveError(f"data of type {type(data).__name__} is no path, name, array or iterable of documents.")


class _StandardLibrary:
    def __iter__(self) -> Iterator[str]:
        return standard_library_text()


def _file_parts(path: Path, config: DataConfig) -> tuple[str, list[Part], bool]:
    files = [path]
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
        files = sorted(file for file in found if not any(p.startswith(".") for p in file.relative_to(path).parts))
        if not files:
            raise UnweaveError(f"the folder {path} holds no {', '.join(_SUFFIXES)} file.")
    elif path.suffix.lower() not in _SUFFIXES:
        raise UnweaveError(f"{path} is none of the kinds of files that can be read: {', '.join(_SUFFIXES)}.")
    arrays = {file.suffix.lower() == ".npy" for file in files}
    if len(arrays) > 1:
        raise UnweaveError(f"the folder {path} mixes .npy rows of tokens with text: give it one kind of data.")
    parts: list[Part] = []
    for file in files:
        key = file.relative_to(path).as_posix() if path.is_dir() else file.name
        match file.suffix.lower():
            case ".txt":
                parts += text_parts(file, key, alone=len(files) == 1)
            case ".jsonl":
                parts += jsonl_parts(file, key, config)
            case ".parquet":
                parts += parquet_parts(file, key, config)
            case ".npy":
                parts += array_parts(load_npy(file), key, config)
    return str(path), parts, arrays.pop()


def _refuse_missing_path(data: str | Path, path: Path) -> None:
    """A name on the hub is `name` or `owner/name`, without a suffix of ours; anything else was meant as a path."""
    written = str(data)
    is_path = isinstance(data, Path) or path.suffix.lower() in _SUFFIXES or written.startswith((".", "/", "~", "\\"))
    if is_path or written.count("/") > 1:
        near = nearest(path.name, (file.name for file in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise UnweaveError(f"there is no file or folder {written}{near or '.'}")


class DocumentReader:
    """Iterator over the documents of one side of the held-out split, in the order of one epoch.

    Args:
        documents: What to read.
        config: `seed` decides the order, `held_out` the split.
        held_out: Which side to read.
    """

    epoch: int

    def __init__(self, documents: Documents, config: DataConfig, *, held_out: bool) -> None:
        self._documents, self._seed = documents, config.seed
        self._fraction, self._held_out = config.held_out, held_out
        self._cutoff: float | None = None
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self._seek({"epoch": epoch, "part": 0, "skip": 0, "window": -1, "taken": 0, "cutoff": self._cutoff})
        self._window: list[Document] = []

    def __iter__(self) -> DocumentReader:
        return self

    def __next__(self) -> Document:
        while self._taken >= len(self._window):
            if not self._load_window():
                raise StopIteration
        self._taken += 1
        return self._window[self._taken - 1]

    def state_dict(self) -> dict[str, Any]:
        """Position, as plain numbers."""
        part, skip = self._window_start
        position = {"part": part, "skip": skip, "window": self._window_number, "taken": self._taken}
        return {"epoch": self.epoch, "cutoff": self._cutoff} | position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; reads the window that was open."""
        self._seek(state)
        self._window = []
        if state["window"] >= 0:
            self._window_number -= 1
            self._load_window()
            self._taken = state["taken"]

    def _seek(self, state: dict[str, Any]) -> None:
        self.epoch, self._cutoff = state["epoch"], state["cutoff"]
        self._window_start = self._position = (state["part"], state["skip"])
        self._window_number, self._taken = state["window"], 0
        order = np.random.default_rng([self._seed, self.epoch, 0]).permutation(len(self._documents.parts))
        self._stream = self._read(order.tolist(), *self._position)

    def _read(self, order: list[int], first: int, skip: int) -> Iterator[Document]:
        for i in range(first, len(order)):
            position = skip if i == first else 0
            for document in self._documents.parts[order[i]].read(position):
                position += 1
                self._position = (i, position)
                yield document

    def _load_window(self) -> bool:
        start, window, size, ended = self._position, list[Document](), 0, True
        for document in self._stream:
            window.append(document)
            size += size_of(document)
            if len(window) >= WINDOW_DOCUMENTS or size >= WINDOW_BYTES:
                ended = False
                break
        if not window:
            return False
        self._window_start, self._window_number, self._taken = start, self._window_number + 1, 0
        if self._fraction:
            window = self._on_our_side(window, everything=ended and self._window_number == 0)
        order = np.random.default_rng([self._seed, self.epoch, self._window_number + 1]).permutation(len(window))
        self._window = [window[i] for i in order]
        return True

    def _on_our_side(self, window: list[Document], *, everything: bool) -> list[Document]:
        # The split has a seed of its own, so that runs with other seeds are compared on the same held-out text.
        scores = [held_out_score(content_of(document)) for document in window]
        if self._cutoff is None:
            sizes = map(size_of, window)
            limit = self._fraction * 2**64
            self._cutoff = held_out_cutoff(zip(scores, sizes, strict=True), self._fraction) if everything else limit
        return [d for d, score in zip(window, scores, strict=True) if (score < self._cutoff) == self._held_out]
