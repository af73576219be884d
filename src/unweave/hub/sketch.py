"""The shapes in a file on the Hub, without its matrices.

A file is sketched: one of its size, empty but for its headers and its vectors, which range requests fetch in a few
kilobytes. The format's own reader then reads the sketch as it reads any file, for shapes alone.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from unweave._errors import UnweaveError
from unweave.hub.explained import explained
from unweave.hub.repo import Repo

_BLOCK = 1 << 16
_SMALL = 1 << 21
"""Bytes up to which an entry of an archive is fetched whole."""


class RemoteFile(io.BufferedReader):
    """A file on the Hub that is read where it is, by range requests of at least 64 KiB."""

    def __init__(self, repo: Repo, name: str) -> None:
        self.ranges = _Ranges(repo, name)
        super().__init__(self.ranges, _BLOCK)

    @property
    def size(self) -> int:
        return self.ranges.size


class _Ranges(io.RawIOBase):
    """The same without a buffer."""

    def __init__(self, repo: Repo, name: str) -> None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        self._repo, self._name, self._position = repo, name, 0
        self._url = hf_hub_url(repo.id, name, revision=repo.at, repo_type=repo.kind)
        with explained(repo, name):
            found = get_hf_file_metadata(self._url, token=repo.token)
        if found.size is None:
            raise UnweaveError(f"the Hub does not say how large {name!r} of the repository {repo} is.")
        self.size = found.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        wanted = min(len(buffer), self.size - self._position)
        if wanted <= 0:
            return 0
        bounds = f"bytes={self._position}-{self._position + wanted - 1}"
        headers = build_hf_headers(token=self._repo.token) | {"Range": bounds, "Accept-Encoding": "identity"}
        with explained(self._repo, self._name):
            response = get_session().get(self._url, headers=headers, follow_redirects=True)
            hf_raise_for_status(response)
        if response.status_code != 206 or len(response.content) != wanted:
            raise UnweaveError(
                f"the Hub gave no part of {self._name!r} of the repository {self._repo}, only the whole."
            )
        buffer[:wanted] = response.content
        self._position += wanted
        return wanted


def sketch(remote: RemoteFile, path: Path) -> None:
    """Write a file that has the size, the headers and the vectors of another, and holes in place of its matrices.

    Raises:
        UnweaveError: If it is no safetensors file and no zip archive (npz, PyTorch), whose headers can be found.
    """
    with path.open("wb") as file:
        file.truncate(remote.size)
        if path.suffix == ".safetensors":
            _sketch_safetensors(remote, file)
        else:
            _sketch_zip(remote, file, path.name)


def _copy(remote: RemoteFile, file: BinaryIO, start: int, size: int) -> None:
    remote.seek(start)
    file.seek(start)
    file.write(remote.read(size))


def _sketch_safetensors(remote: RemoteFile, file: BinaryIO) -> None:
    try:
        (length,) = struct.unpack("<Q", remote.read(8))
        header = json.loads(remote.read(min(length, remote.size)))
        vectors = [e["data_offsets"] for n, e in header.items() if n != "__metadata__" and len(e["shape"]) < 2]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        length, vectors = remote.size - 8, []  # the reader says what is wrong with it
    _copy(remote, file, 0, min(8 + length, _SMALL))
    for start, end in vectors:
        _copy(remote, file, 8 + length + start, end - start)


def _sketch_zip(remote: RemoteFile, file: BinaryIO, name: str) -> None:
    try:
        entries = zipfile.ZipFile(remote).infolist()
    except zipfile.BadZipFile as error:
        raise UnweaveError(
            f"{name!r} is a file without headers (or damaged): what is in it is known once it is downloaded."
        ) from error
    starts = [entry.header_offset for entry in entries]
    _copy(remote, file, 0, min([*starts, _SMALL]))  # what may come before the archive: saev has a line there
    directory = max((e.header_offset + e.compress_size for e in entries), default=0)
    for start, entry in zip(starts, entries, strict=True):
        _copy(remote, file, start, (entry.compress_size if entry.compress_size <= _SMALL else 0) + _BLOCK)
    _copy(remote, file, directory, remote.size - directory)
