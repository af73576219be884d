"""The token folder: packed rows of token ids and their documents, in files that `numpy.load` maps.

    manifest.json                 written last; a folder without it is unfinished
    train_00000.npy               (rows, context) token ids, uint16 or uint32, little-endian, C order
    train_00000.documents.npy     (rows, context) the document of each token, int32 or int64, -1 on padding
    held_out_00000.npy, ...       the rows of the held-out documents

Every shard of a side has `shard_rows` rows, except the last one. Each file begins with the 128 bytes of a version 1.0
`.npy` header. While a folder is being written, `progress.json` says how much of it counts.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from unweave._errors import UnweaveError
from unweave._files import atomic_path

FORMAT = "unweave-tokens"
VERSION = 1
MANIFEST, PROGRESS = "manifest.json", "progress.json"
HEADER_BYTES = 128
CHECKSUM_BYTES = 16
INT32, INT64 = np.dtype("<i4"), np.dtype("<i8")
_CACHE_FORMAT = "unweave-cache"

Side: TypeAlias = Literal["train", "held_out"]
SIDES: tuple[Side, ...] = ("train", "held_out")
OURS = re.compile(r"(train|held_out)_\d{5,}(\.documents)?\.npy|(manifest|progress)\.json|\..+\.(npy|json)\.\d+\.tmp")
"""Names of the files that a token folder consists of, also while it is being written."""


def shard_name(side: Side, number: int) -> str:
    """Name of a shard's tokens."""
    return f"{side}_{number:05d}.npy"


def documents_name(side: Side, number: int) -> str:
    """Name of a shard's documents."""
    return f"{side}_{number:05d}.documents.npy"


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The first 128 bytes of a `.npy` file; they are as many whatever the number of rows, so they can be rewritten."""
    file = io.BytesIO()
    settings = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, settings)
    header = file.getvalue()
    assert len(header) == HEADER_BYTES
    return header


def read_npy_header(path: Path) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Dtype and shape that a `.npy` file of ours begins with.

    Raises:
        ValueError: It begins otherwise.
    """
    with path.open("rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not version 1.0 of the format")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran_order or file.tell() != HEADER_BYTES:
            raise ValueError("not in C order behind 128 bytes")
    return dtype, shape


def widen_documents(path: Path) -> None:
    """Make the documents of a shard int64."""
    _, shape = read_npy_header(path)
    documents = np.fromfile(path, dtype=INT32, offset=HEADER_BYTES).astype(INT64)
    with atomic_path(path) as temporary:
        temporary.write_bytes(npy_header(INT64, shape) + documents.tobytes())


def checksum(path: Path) -> str:
    """BLAKE2b of a file, 128 bits, in hexadecimal: what `b2sum -l 128` prints."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=CHECKSUM_BYTES)).hexdigest()


def find_token_folder(path: Path) -> Path | None:
    """The token folder at `path`: the folder itself, or the `tokens` folder of a cache. None for anything else.

    Raises:
        UnweaveError: A token folder or cache that is unfinished.
    """
    if read_format(path / MANIFEST) == FORMAT:
        return path
    if read_format(path / MANIFEST) == _CACHE_FORMAT:
        return path / "tokens"
    if read_format(path / PROGRESS) == FORMAT:
        raise UnweaveError(f"the token folder {path} is unfinished: go on with `unweave tokenize ... --resume`.")
    return None


def read_format(path: Path) -> str | None:
    """The "format" of a JSON file; None if there is no such file, or it says nothing."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value.get("format") if isinstance(value, dict) else None


def cut_file(path: Path, n: int, shape: tuple[int, int]) -> bool:
    """Cut a file behind its first `n` numbers and give it the header for `shape`. False: it does not hold as many."""
    try:
        dtype, _ = read_npy_header(path)
    except (OSError, ValueError):
        return False
    size = HEADER_BYTES + n * dtype.itemsize
    if path.stat().st_size < size:
        return False
    with path.open("r+b") as file:
        file.truncate(size)
        file.write(npy_header(dtype, shape))
        file.flush()
        os.fsync(file.fileno())
    return True
