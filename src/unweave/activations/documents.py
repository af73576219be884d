"""From whatever holds documents to a list of parts that can be read again and again, in any order."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from unweave._errors import UnweaveError, nearest_beside
from unweave.activations.config import DataConfig
from unweave.activations.hf_datasets import (
    dataset_parts,
    is_hf_dataset,
    is_saved_dataset,
    is_written_as_path,
    load_by_name,
    load_saved,
)
from unweave.activations.records import Document, Unreadable
from unweave.activations.sources import (
    PART_ROWS,
    Part,
    array_parts,
    iterable_part,
    jsonl_parts,
    load_npy,
    parquet_parts,
    sequence_parts,
    text_parts,
)
from unweave.activations.stdlib_text import standard_library_text
from unweave.activations.tokenized.folder import TokenFolder, open_token_folder
from unweave.activations.tokenized.format import SIDES, find_token_folder
from unweave.activations.tokenized.vocabulary import SAELENS_FILE, tokenizer_of_folder, tokenizer_of_hub

_PEEKED = 64
_SUFFIXES = (".txt", ".jsonl", ".parquet", ".npy")

Data: TypeAlias = "str | Path | Iterable[Any] | Tensor | Documents"
"""What can be opened: see `open_documents`."""
_ABOUT_DATA = {SAELENS_FILE, "README.md", "LICENSE", "dataset_infos.json"}
"""Files that lie beside data, and that nobody would miss among what is read."""


@dataclass(frozen=True)
class Documents:
    """A source of documents that can be read any number of times, in any order of its parts."""

    name: str
    parts: list[Part] = field(repr=False)
    rows: bool
    """The documents are rows of token ids of equal width, at least `context`: they are used as they stand."""
    folder: TokenFolder | None = None
    """The token folder that the rows lie in, if it is one: they keep its documents and its held-out side."""
    made_with: dict[str, Any] | None = None
    """The "name" and the "fingerprint" of the tokenizer that made the token ids, as far as that was recorded."""

    @property
    def fingerprint(self) -> str:
        """Hash of the names and extents of all parts, to notice that the data changed between two runs."""
        return hashlib.blake2b("\n".join(part.key for part in self.parts).encode(), digest_size=16).hexdigest()


def open_documents(data: Data, config: DataConfig) -> Documents:
    """Open any kind of data and look at its first documents.

    Args:
        data: One of

            - a path to a `.txt`, `.jsonl`, `.parquet` or `.npy` file, or to a folder of them (sub-folders included;
              of other files a warning gives the number), or to a folder written by `Dataset.save_to_disk`;
            - a path to a token folder (`unweave tokenize`), or to a cache, which holds one;
            - a list of such paths, as `Path` objects, of text or of arrays;
            - `"stdlib"`: the text that every Python carries; any other name: a dataset of the Hugging Face hub;
            - a 2-D integer array or tensor of token ids `(rows, width)`, or a 1-D one, which is cut into rows;
            - a `datasets` object;
            - a list or any other iterable of documents (str, chat messages, token ids) or of records (dicts). A
              one-shot iterator is remembered as it is read; open it once and share the `Documents`.

            A `.txt` file is cut at blank lines into documents of at least 2000 characters; in a folder of several
            files, each one of up to 1 MB is one document. Token ids in a column are used as rows if they are all of
            one width and at least `context` long, and are packed like text otherwise.
        config: Column, subset, split, streaming, chat and context; and `max_bad`: unless it is 0, documents that cannot
            be read are no matter yet, except where none of the first ones can.

    Raises:
        UnweaveError: Nothing there, nothing in it, or not what `config` says.
    """
    if isinstance(data, Documents):
        return data
    found = _find(data, config)
    if found.folder is not None:
        return found
    first = list(islice(chain.from_iterable(part.read(0) for part in found.parts), _PEEKED))
    reasons = [document.reason for document in first if isinstance(document, Unreadable)]
    if reasons and (len(reasons) == len(first) or not config.max_bad):
        raise UnweaveError(reasons[0])
    documents = [document for document in first if not isinstance(document, Unreadable)]
    if len(first) < _PEEKED and not any(map(len, documents)):
        raise UnweaveError(f"{found.name} holds no text.")
    widths = {len(document) if isinstance(document, np.ndarray) else 0 for document in documents}
    return replace(found, rows=found.rows or (len(widths) == 1 and widths.pop() >= config.context))


def _find(data: Any, config: DataConfig) -> Documents:
    """The data unread; `rows` if they are arrays."""
    if isinstance(data, Tensor):
        data = data.detach().cpu().numpy()
    if isinstance(data, np.ndarray):
        return Documents("the array", array_parts(data, "the array", config), rows=True)
    if isinstance(data, str) and data == "stdlib":
        return Documents(data, [iterable_part(_StandardLibrary(), config)], rows=False)
    if isinstance(data, str | Path):
        path = Path(data).expanduser()
        if path.is_dir() and (folder := find_token_folder(path)):
            return _rows_of(open_token_folder(folder), config)
        if path.is_dir() and is_saved_dataset(path):
            parts = dataset_parts(load_saved(path), str(data), config)
            return Documents(str(data), parts, rows=False, made_with=tokenizer_of_folder(path))
        if path.exists():
            return _files(path, config)
        _refuse_missing_path(data, path)
        name = str(data)
        parts = dataset_parts(load_by_name(name, config), name, config)
        return Documents(name, parts, rows=False, made_with=tokenizer_of_hub(name))
    if is_hf_dataset(data):
        return Documents("the dataset", dataset_parts(data, "the dataset", config), rows=False)
    if isinstance(data, Sequence) and len(data) and all(isinstance(path, Path) for path in data):
        return _together([_find(path, config) for path in data])
    if isinstance(data, Sequence):
        return Documents("the list of documents", sequence_parts(data, config), rows=False)
    if isinstance(data, Iterable):
        return Documents("the iterable of documents", [iterable_part(data, config)], rows=False)
    raise UnweaveError(f"data of type {type(data).__name__} is no path, name, array or iterable of documents.")


def _rows_of(folder: TokenFolder, config: DataConfig) -> Documents:
    if folder.context < config.context:
        raise UnweaveError(f"{folder.path} has rows of {folder.context} tokens, shorter than context={config.context}.")
    parts = [Part(f"token folder {folder.fingerprint}", partial(_read_folder, folder))]
    return Documents(str(folder.path), parts, True, folder, folder.manifest.get("tokenizer"))


def _read_folder(folder: TokenFolder, skip: int) -> Iterator[Document]:
    """All rows, the training ones first."""
    for side in SIDES:
        for start in range(skip, folder.n_rows(side), PART_ROWS):
            yield from folder.rows(side, start, start + PART_ROWS)[0]
        skip = max(skip - folder.n_rows(side), 0)


def _together(found: list[Documents]) -> Documents:
    """Several data sets as one, in the order given."""
    if len(found) == 1:
        return found[0]
    name = ", ".join(each.name for each in found)
    if any(each.folder for each in found):
        raise UnweaveError(f"of {name}, a token folder or cache cannot be read together with other data.")
    if len({each.rows for each in found}) > 1:
        raise UnweaveError(f"{name} mix .npy rows of tokens with text: give one kind of data.")
    if any(each.made_with != found[0].made_with for each in found):
        raise UnweaveError(f"{name} hold token ids of several tokenizers, or of unknown ones.")
    parts = [Part(f"{i}: {part.key}", part.read) for i, each in enumerate(found) for part in each.parts]
    return Documents(name, parts, found[0].rows, None, found[0].made_with)


class _StandardLibrary:
    def __iter__(self) -> Iterator[str]:
        return standard_library_text()


def _files(path: Path, config: DataConfig) -> Documents:
    files = [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in _ABOUT_DATA)
        found = [file for file in found if not any(p.startswith(".") for p in file.relative_to(path).parts)]
        files = [file for file in found if file.suffix.lower() in _SUFFIXES]
        if not files:
            raise UnweaveError(f"the folder {path} holds no {', '.join(_SUFFIXES)} file.")
        if len(found) > len(files):
            others = sorted({file.suffix or file.name for file in found} - {file.suffix for file in files})
            kinds = ", ".join([*others[:5], *["..."] * (len(others) > 5)])
            counts = f"{len(files):,} of {len(found):,} files are read"
            warnings.warn(f"in the folder {path}, {counts}; others are of no such kind ({kinds}).", stacklevel=2)
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
    made_with = tokenizer_of_folder(path) if path.is_dir() else None
    return Documents(str(path), parts, arrays.pop(), made_with=made_with)


def _refuse_missing_path(data: str | Path, path: Path) -> None:
    """A name on the hub is `name` or `owner/name`, without a suffix of ours; anything else was meant as a path."""
    written = str(data)
    if path.suffix.lower() in _SUFFIXES or is_written_as_path(data):
        raise UnweaveError(f"there is no file or folder {written}{nearest_beside(path) or '.'}")
