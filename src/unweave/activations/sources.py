"""The kinds of data a document can come from, each cut into parts small enough to be shuffled as wholes.

A part reads its documents from the front, or from its n-th document on, and nothing else has to be known about it.
Large `.txt` and `.jsonl` files are cut into byte ranges, Parquet files into row groups, arrays and lists into runs of
rows, so that even a single file is read in a shuffled order without an index and without being held in memory.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unweave._errors import UnweaveError
from unweave.activations.config import DataConfig
from unweave.activations.records import Document, Unreadable, choose_column, document_or_reason

PART_BYTES = 4 << 20
PART_ROWS = 1024
LEAST_CHARS, MOST_CHARS = 2_000, 40_000
WHOLE_FILE_BYTES = 1 << 20
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


@dataclass(frozen=True)
class Part:
    """A stretch of the data."""

    key: str
    """Names the part and its extent, so that a changed data set is noticed on resuming."""
    read: Callable[[int], Iterator[Document | Unreadable]]
    """Its documents, without the first `n`; one that cannot be read gives the reason in its place."""


# --- text ------------------------------------------------------------------------------------------------------------


def text_parts(path: Path, key: str, *, alone: bool) -> list[Part]:
    """A `.txt` file: one document if it is one of several files and at most 1 MB, else cut at blank lines.

    Of a file above 4 MB, each 4 MB (up to the end of a line) are cut by themselves.

    Args:
        path: The file, in UTF-8.
        key: Its name in the data set.
        alone: It is the only file of the data.
    """
    size = path.stat().st_size
    if not alone and size <= WHOLE_FILE_BYTES:
        return [Part(f"{key}:{size}", partial(_read_whole, path, size))]
    return [Part(f"{key}:{a}-{b}", partial(_read_text, path, a, b)) for a, b in _byte_ranges(size)]


def cut_text(text: str) -> list[str]:
    """Cut a long text at blank lines into documents of at least 2000 characters; nothing is lost.

    Where no blank line comes for 40 000 characters, the next line break is taken instead.
    """
    documents, start = [], 0
    while start < len(text):
        blank = _BLANK_LINES.search(text, start + LEAST_CHARS, start + MOST_CHARS)
        end = blank.end() if blank else text.find("\n", start + MOST_CHARS) + 1
        if end == 0 or len(text) - end < LEAST_CHARS:
            end = len(text)
        documents.append(text[start:end])
        start = end
    return documents


def _read_whole(path: Path, size: int, skip: int) -> Iterator[Document | Unreadable]:
    yield from _decode(path, *_read_lines(path, 0, size))[skip:]


def _read_text(path: Path, start: int, end: int, skip: int) -> Iterator[Document | Unreadable]:
    *unreadable, text = _decode(path, *_read_lines(path, start, end))
    yield from [*unreadable, *cut_text(str(text))][skip:]


def _decode(path: Path, begin: int, data: bytes) -> list[Document | Unreadable]:
    """The lines that are not UTF-8, and last, as one text, those that are."""
    unreadable: list[Document | Unreadable] = []
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        lines, position = [], begin
        for line in data.split(b"\n"):
            try:
                lines.append(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                reason = f"{_line_name(path, position)} is not UTF-8 text (byte {position + error.start})."
                unreadable.append(Unreadable(reason))
            position += len(line) + 1
        text = "\n".join(lines)
    return [*unreadable, text.replace("\r\n", "\n")]


# --- lines of JSON ---------------------------------------------------------------------------------------------------


def jsonl_parts(path: Path, key: str, config: DataConfig) -> list[Part]:
    """A `.jsonl` file: one JSON object, or one JSON string, per line."""
    ranges = _byte_ranges(path.stat().st_size)
    return [Part(f"{key}:{a}-{b}", partial(_read_jsonl, path, a, b, config)) for a, b in ranges]


def _read_jsonl(path: Path, start: int, end: int, config: DataConfig, skip: int) -> Iterator[Document | Unreadable]:
    position, data = _read_lines(path, start, end)
    column = None
    for line in data.split(b"\n"):
        here, position = position, position + len(line) + 1
        if not line.strip():
            continue
        if skip:
            skip -= 1
            continue
        where = partial(_line_name, path, here)
        try:
            record = json.loads(line)
            if isinstance(record, Mapping):
                if column not in record:
                    column = choose_column(record, config, where())
                record = record[column]
        except UnweaveError as error:
            yield Unreadable(str(error))
        except (ValueError, RecursionError) as error:
            yield Unreadable(f"{where()} is not valid JSON ({error}).")
        else:
            yield document_or_reason(record, config, where)


def _line_name(path: Path, position: int) -> str:
    """Counts lines only when an error has to name one."""
    number, left = 1, position
    with path.open("rb") as file:
        while left and (chunk := file.read(min(left, PART_BYTES))):
            number, left = number + chunk.count(b"\n"), left - len(chunk)
    return f"{path}, line {number},"


def _byte_ranges(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)]


def _read_lines(path: Path, start: int, end: int) -> tuple[int, bytes]:
    """The lines that begin in `[start, end)`, and where the first of them begins."""
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        begin = file.tell()
        data = file.read(max(end - begin, 0))
        if data and not data.endswith(b"\n"):
            data += file.readline()
    if begin == 0 and data.startswith(codecs.BOM_UTF8):
        begin, data = len(codecs.BOM_UTF8), data.removeprefix(codecs.BOM_UTF8)
    return begin, data


# --- tables and arrays -----------------------------------------------------------------------------------------------


def parquet_parts(path: Path, key: str, config: DataConfig) -> list[Part]:
    """A `.parquet` file, by row groups."""
    file = _open_parquet(path)
    column = choose_column(file.schema_arrow.names, config, str(path))
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    file.close()
    return [Part(f"{key}#{i}:{n}", partial(_read_parquet, path, i, column, config)) for i, n in enumerate(sizes)]


def _open_parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UnweaveError(f"reading {path} needs pyarrow: pip install 'unweave[data]'.") from None
    try:
        return ParquetFile(path)
    except ArrowException as error:
        raise UnweaveError(f"{path} is no readable Parquet file ({error}).") from None


def _read_parquet(
    path: Path, group: int, column: str, config: DataConfig, skip: int
) -> Iterator[Document | Unreadable]:
    row, name = 0, "{1}, row {0} of row group {2},"
    with _open_parquet(path) as file:
        for batch in file.iter_batches(PART_ROWS, row_groups=[group], columns=[column]):
            first, row = row, row + batch.num_rows
            for i, value in enumerate(batch.column(0).to_pylist() if row > skip else (), first):
                if i >= skip:
                    yield document_or_reason(value, config, partial(name.format, i, path, group))


def load_npy(path: Path) -> NDArray[Any]:
    """A `.npy` file by memory map; pickled objects are refused."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UnweaveError(f"{path} is no readable .npy file ({error}).") from None


def array_parts(array: NDArray[Any], key: str, config: DataConfig) -> list[Part]:
    """Token ids as `(rows, width)` with `width >= context`, or as one long vector, which is cut into rows.

    Raises:
        UnweaveError: Not integers, neither 1-D nor 2-D, or rows shorter than the context.
    """
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise UnweaveError(f"{key} is a {array.ndim}-D array of {array.dtype}; token ids are 1-D or 2-D integers.")
    if config.chat:
        raise UnweaveError(f"{key} holds token ids, but chat is set, which takes lists of messages.")
    if array.ndim == 1:
        array = array[: len(array) // config.context * config.context].reshape(-1, config.context)
        if not len(array):
            raise UnweaveError(f"{key} holds fewer token ids than one row of context={config.context}.")
    if array.shape[1] < config.context:
        raise UnweaveError(f"{key} has rows of {array.shape[1]} tokens, shorter than context={config.context}.")

    def read(start: int, skip: int) -> Iterator[Document]:
        yield from np.asarray(array[start + skip : min(start + PART_ROWS, len(array))], dtype=np.int64)

    width = array.shape[1]
    return [Part(f"{key}[{a}:{len(array)},{width}]", partial(read, a)) for a in range(0, len(array), PART_ROWS)]


def sequence_parts(data: Sequence[Any], config: DataConfig) -> list[Part]:
    """A list of documents or of records."""

    def read(start: int, skip: int) -> Iterator[Document | Unreadable]:
        for i in range(start + skip, min(start + PART_ROWS, len(data))):
            yield _element(data[i], i, config)

    return [Part(f"[{a}:{len(data)}]", partial(read, a)) for a in range(0, len(data), PART_ROWS)]


def iterable_part(data: Iterable[Any], config: DataConfig) -> Part:
    """Anything that can be iterated from the start again and again; a one-shot iterator is remembered as it is read."""
    source = Remembered(data) if isinstance(data, Iterator) else data

    def read(skip: int) -> Iterator[Document | Unreadable]:
        for i, value in islice(enumerate(source), skip, None):
            yield _element(value, i, config)

    return Part(f"iterable of {type(data).__name__}", read)


class Remembered:
    """Makes a one-shot iterator readable again, at the price of keeping what it gave."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source, self._seen = source, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        i = 0
        while True:
            if i == len(self._seen):
                try:
                    self._seen.append(next(self._source))
                except StopIteration:
                    return
            yield self._seen[i]
            i += 1


def _element(value: Any, i: int, config: DataConfig) -> Document | Unreadable:
    def where() -> str:
        return f"document {i} of the data"

    if isinstance(value, Mapping):
        try:
            value = value[choose_column(value, config, where())]
        except UnweaveError as error:
            return Unreadable(str(error))
    return document_or_reason(value, config, where)
