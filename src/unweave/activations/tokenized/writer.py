"""Writing a token folder: tokens are appended to files, and a commit says how many of them count.

Whatever kills the process, the files hold at least what the last commit said, and resuming cuts off the rest. The
folder's bytes are a function of the tokens appended and of the settings, not of when commits were made.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Integer

from unweave._errors import UnweaveError, nearest
from unweave._files import write_json
from unweave.activations.tokenized.format import (
    FORMAT,
    INT32,
    MANIFEST,
    OURS,
    PROGRESS,
    SIDES,
    VERSION,
    Side,
    checksum,
    cut_file,
    documents_name,
    npy_header,
    read_npy_header,
    shard_name,
    widen_documents,
)

DEFAULT_SHARD_TOKENS = 1 << 25


class TokenWriter:
    """Appends tokens to a folder, which can be read once `finish` has been called.

    Used with `with`, it closes its files at the end; a folder that was not finished can be resumed.

    Args:
        folder: Where to write. Made if it is missing.
        context: Tokens in a row.
        vocab_size: One more than the largest token id, which decides between uint16 and uint32. None: uint32.
        about: What the manifest says besides (plain JSON values): tokenizer, settings, data. Resuming needs the same.
        shard_rows: Rows in a shard. By default 2**25 tokens' worth.
        resume: Go on from the last commit of an unfinished folder; from the beginning if there is none yet.

    Attributes:
        state: What the last commit was given; None at the beginning.
        tokens: Tokens appended so far, by side, an unfinished row included.
        finished: `resume` found the folder finished, with the same settings; nothing can be appended.

    Raises:
        UnweaveError: The folder holds something already, or other settings than it was begun with, or cannot be
            written; from `append`, `commit` and `finish`: the disk is full.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        context: int,
        vocab_size: int | None = None,
        about: Mapping[str, Any] | None = None,
        shard_rows: int | None = None,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.context = context
        self.dtype = np.dtype("<u2" if vocab_size is not None and vocab_size <= 1 << 16 else "<u4")
        self.shard_rows = shard_rows or max(1, DEFAULT_SHARD_TOKENS // context)
        self._limit = vocab_size if vocab_size is not None else 1 << 32
        self._settings = json.loads(json.dumps(
            {"format": FORMAT, "version": VERSION, "context": context, "dtype": self.dtype.name,
             "shard_rows": self.shard_rows} | dict(about or {}), allow_nan=False,
        ))  # fmt: skip
        self.state: dict[str, Any] | None = None
        self.tokens: dict[Side, int] = dict.fromkeys(SIDES, 0)
        self._files: dict[Side, tuple[BinaryIO, BinaryIO]] = {}
        self._documents_dtype: dict[Side, np.dtype[Any]] = {}
        self.finished = False
        with self._on_disk():
            self._open_folder(resume)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def rows(self) -> dict[Side, int]:
        """Whole rows appended so far, by side."""
        return {side: n // self.context for side, n in self.tokens.items()}

    def append(self, side: Side, ids: Integer[np.ndarray, "..."], documents: Integer[np.ndarray, "..."]) -> None:
        """Append tokens to a side: rows of any number, or a flat run of any length, whose rows go on where they ended.

        Args:
            side: "train" or "held_out".
            ids: Token ids `(n, context)`, or `(n,)`.
            documents: The document of each of them, -1 on padding; the same shape.
        """
        if side not in SIDES:
            raise UnweaveError(f"there is no side {side!r}{nearest(side, SIDES)}")
        if ids.shape != documents.shape:
            raise UnweaveError(f"token ids of shape {ids.shape} with documents of shape {documents.shape}.")
        ids, documents = ids.ravel(), documents.ravel()
        if len(ids) and (ids.min() < 0 or ids.max() >= self._limit):
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise UnweaveError(f"the token id {wrong} is not in the vocabulary of {self._limit:,} tokens.")
        if self.finished:
            raise UnweaveError(f"the token folder {self.folder} is finished: nothing can be appended.")
        with self._on_disk():
            start, shard_tokens = 0, self.shard_rows * self.context
            while start < len(ids):
                stop = min(len(ids), start + shard_tokens - self.tokens[side] % shard_tokens)
                files, dtype = self._shard(side, documents[start:stop])
                files[0].write(ids[start:stop].astype(self.dtype).data)
                files[1].write(documents[start:stop].astype(dtype).data)
                self.tokens[side] += stop - start
                start = stop
                if self.tokens[side] % shard_tokens == 0:
                    self._close_shard(side)

    def commit(self, state: Mapping[str, Any] | None = None) -> None:
        """Make everything appended so far last: a resumed writer goes on from here, with `state` (JSON values)."""
        with self._on_disk():
            for files in self._files.values():
                for file in files:
                    _flush(file)
            self.state = None if state is None else dict(state)
            write_json(self.folder / PROGRESS, self._settings | {"tokens": self.tokens, "state": self.state})

    def rewind(self, rows: Mapping[Side, int]) -> None:
        """Drop all but the first `rows` rows of each side, for good: for what is kept in step with the tokens."""
        for side, n in rows.items():
            if not 0 <= n <= self.rows[side]:
                raise UnweaveError(f"{self.folder} cannot go back to {n} {side} rows: it has {self.rows[side]}.")
        self.close()
        self.tokens |= {side: n * self.context for side, n in rows.items()}
        self.commit(self.state)  # first, since files that hold more than was committed can be resumed, and less cannot
        with self._on_disk():
            self._cut_files()

    def finish(self, extra: Mapping[str, Any] | None = None) -> None:
        """Drop unfinished rows, close the folder and write its manifest, with `extra` (JSON values) in it."""
        if self.finished:
            return
        self.rewind(self.rows)
        with self._on_disk():
            self._cut_files(final=True)
            sides = {side: self._describe(side) for side in SIDES}
            write_json(self.folder / MANIFEST, self._settings | dict(extra or {}) | {"sides": sides, "complete": True})
            (self.folder / PROGRESS).unlink()
        self.finished = True

    def discard(self) -> None:
        """Delete what was written, and the folder."""
        self.close()
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()

    def close(self) -> None:
        """Close the files, without finishing the folder."""
        files, self._files = self._files, {}
        for pair in files.values():
            for file in pair:
                file.close()

    # --- the folder --------------------------------------------------------------------------------------------------

    def _open_folder(self, resume: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in self.folder.iterdir()}
        if foreign := sorted(name for name in names if not OURS.fullmatch(name)):
            raise UnweaveError(f"the folder {self.folder} holds something else already, such as {foreign[0]!r}.")
        if names and not resume:
            if MANIFEST in names:
                raise UnweaveError(f"{self.folder} holds finished tokens already: choose another folder.")
            raise UnweaveError(f"{self.folder} holds unfinished tokens: go on with --resume, or choose another folder.")
        for name in names:
            if name.endswith(".tmp"):
                (self.folder / name).unlink()
        if MANIFEST in names:
            self._check_settings(_read(self.folder / MANIFEST))
            (self.folder / PROGRESS).unlink(missing_ok=True)
            self.finished = True
            return
        if PROGRESS in names:
            saved = _read(self.folder / PROGRESS)
            self._check_settings(saved)
            self.tokens = {side: int(saved["tokens"][side]) for side in SIDES}
            self.state = saved["state"]
        self._cut_files()
        if PROGRESS not in names:
            self.commit()

    def _check_settings(self, saved: Mapping[str, Any]) -> None:
        for name, value in self._settings.items():
            if saved.get(name) != value:
                raise UnweaveError(f"{self.folder} was begun with other settings: {difference(name, saved, value)}.")

    def _cut_files(self, *, final: bool = False) -> None:
        """Make the files hold `self.tokens` and nothing after them; `final`: with headers that say so."""
        shard_tokens = self.shard_rows * self.context
        lost = []
        for side in SIDES:
            full, rest = divmod(self.tokens[side], shard_tokens)
            sizes = [shard_tokens] * full + [rest] * (rest > 0)
            wanted = {name(side, i): n for i, n in enumerate(sizes) for name in (shard_name, documents_name)}
            for path in self.folder.glob(f"{side}_*.npy"):
                if path.name not in wanted:
                    path.unlink()
            for name, n in wanted.items():
                rows = n // self.context if final else self.shard_rows
                if not cut_file(self.folder / name, n, (rows, self.context)):
                    lost.append(name)
        if lost:
            raise UnweaveError(f"in {self.folder}, {', '.join(lost)} lost what had been written: it cannot be resumed.")

    def _describe(self, side: Side) -> dict[str, Any]:
        shards, rows = [], self.rows[side]
        for i, start in enumerate(range(0, rows, self.shard_rows)):
            entry: dict[str, Any] = {"rows": min(self.shard_rows, rows - start)}
            for key, name in (("tokens", shard_name(side, i)), ("documents", documents_name(side, i))):
                path = self.folder / name
                entry[key] = {"file": name, "bytes": path.stat().st_size, "blake2b": checksum(path)}
            shards.append(entry)
        return {"rows": rows, "shards": shards}

    # --- one shard ---------------------------------------------------------------------------------------------------

    def _shard(
        self, side: Side, documents: Integer[np.ndarray, " n"]
    ) -> tuple[tuple[BinaryIO, BinaryIO], np.dtype[Any]]:
        """The open files of the shard that tokens of these documents go into, and the dtype of its documents."""
        number, there = divmod(self.tokens[side], self.shard_rows * self.context)
        paths = self.folder / shard_name(side, number), self.folder / documents_name(side, number)
        if not there:
            for path, dtype in zip(paths, (self.dtype, INT32), strict=True):
                path.write_bytes(npy_header(dtype, (self.shard_rows, self.context)))
        if side not in self._files:
            self._files[side] = paths[0].open("ab"), paths[1].open("ab")
            self._documents_dtype[side] = read_npy_header(paths[1])[0]
        if self._documents_dtype[side] == INT32 and documents.max() > np.iinfo(INT32).max:
            self._close_shard(side)
            widen_documents(paths[1])
            return self._shard(side, documents)
        return self._files[side], self._documents_dtype[side]

    def _close_shard(self, side: Side) -> None:
        for file in self._files.pop(side):
            _flush(file)
            file.close()

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UnweaveError(
                    f"the disk of {self.folder} is full; what was committed is not lost: free some space and resume."
                ) from error
            raise UnweaveError(f"the folder {self.folder} cannot be written: {error.strerror or error}.") from error


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
        assert isinstance(value, dict)
    except (ValueError, AssertionError) as error:
        raise UnweaveError(f"{path} is damaged: {error or 'it holds no object'}.") from error
    return value


def difference(name: str, saved: Mapping[str, Any], value: Any) -> str:
    """Which setting differs, down to the innermost."""
    was = saved.get(name)
    if isinstance(was, dict) and isinstance(value, dict):
        key = next(key for key in [*value, *was] if was.get(key) != value.get(key))
        return difference(key, was, value.get(key))
    return f"{name} was {was!r} and is now {value!r}"
