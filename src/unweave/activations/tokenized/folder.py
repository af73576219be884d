"""Reading a token folder: its shards as memory maps, rows by range or by number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64, Integer
from numpy.typing import NDArray

from unweave._errors import UnweaveError
from unweave.activations.tokenized.format import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    MANIFEST,
    SIDES,
    VERSION,
    Side,
    checksum,
    find_token_folder,
    read_npy_header,
)
from unweave.activations.tokenized.vocabulary import check_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class TokenFolder:
    """A finished token folder; see `open_token_folder`."""

    path: Path
    manifest: dict[str, Any] = field(repr=False)
    """What `manifest.json` holds."""

    @property
    def context(self) -> int:
        """Tokens in a row."""
        return self.manifest["context"]

    @property
    def begin(self) -> int | None:
        """Id of the token in front of each document; None if there is none."""
        return self.manifest.get("begin")

    @property
    def separator(self) -> int | None:
        """Id of the token between documents; None if there is none."""
        return self.manifest.get("separator")

    @property
    def skipped(self) -> list[str]:
        """What was left out because it could not be read, with the reason."""
        return self.manifest.get("skipped", [])

    @property
    def fingerprint(self) -> str:
        """The checksums of all files in one."""
        return hashlib.blake2b(json.dumps(self.manifest["sides"]).encode(), digest_size=CHECKSUM_BYTES).hexdigest()

    def n_rows(self, side: Side = "train") -> int:
        """Number of rows of a side."""
        return self.manifest["sides"][side]["rows"]

    def rows(
        self, side: Side, start: int, stop: int
    ) -> tuple[Int64[np.ndarray, "n context"], Int64[np.ndarray, "n context"]]:
        """Rows `start` to `stop` of a side: token ids, and their documents (-1 on padding)."""
        return self.take(side, np.arange(*slice(start, stop).indices(self.n_rows(side))))

    def take(
        self, side: Side, rows: Integer[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, "n context"], Int64[np.ndarray, "n context"]]:
        """Rows of a side by their numbers, in the order asked for: token ids, and their documents (-1 on padding)."""
        ids = np.empty((len(rows), self.context), dtype=np.int64)
        documents = np.empty_like(ids)
        starts, shards = self._shards[side]
        homes = np.searchsorted(starts, rows, side="right") - 1
        for home in np.unique(homes):
            here = np.flatnonzero(homes == home)
            within = rows[here] - starts[home]
            ids[here], documents[here] = (array[within] for array in shards[home])
        return ids, documents

    def verify(self) -> None:
        """Compare every file with its checksum, which reads all of them.

        Raises:
            UnweaveError: Some differ; all of them are named.
        """
        if wrong := self.changed():
            raise UnweaveError(f"in {self.path}, {', '.join(wrong)} changed after being written: make the folder anew.")

    def changed(self) -> list[str]:
        """The files that differ from their checksums; all of them are read."""
        return [name for name, _, blake2b in _files(self.manifest) if checksum(self.path / name) != blake2b]

    def check_split(self, held_out: float) -> None:
        """Refuse another share of held-out documents than the folder keeps, whose sides cannot be drawn anew.

        0 will do where no held-out row is.

        Raises:
            UnweaveError: It is another one: what is held out elsewhere would be trained on here, or the reverse.
        """
        made = self.manifest.get("config", {}).get("held_out", held_out)
        if made != held_out and (held_out or self.n_rows("held_out")):
            raise UnweaveError(
                f"{self.path} was made with held_out={made}, and held_out={held_out} was asked for: ask for {made}, or "
                "tokenise the text anew."
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer with another vocabulary than the rows were made with.

        Raises:
            UnweaveError: It is another one.
        """
        check_vocabulary(str(self.path), self.manifest.get("tokenizer"), tokenizer)

    @cached_property
    def _shards(self) -> dict[Side, tuple[NDArray[np.int64], list[tuple[NDArray[Any], NDArray[Any]]]]]:
        """Of each side: the row that each shard starts at, and its two maps."""
        result: dict[Side, tuple[NDArray[np.int64], list[tuple[NDArray[Any], NDArray[Any]]]]] = {}
        for side in SIDES:
            shards = self.manifest["sides"][side]["shards"]
            starts = np.array([0, *accumulate(shard["rows"] for shard in shards)][:-1], dtype=np.int64)
            result[side] = starts, [
                (_map(self.path / shard["tokens"]["file"]), _map(self.path / shard["documents"]["file"]))
                for shard in shards
            ]
        return result


def open_token_folder(path: str | Path, *, verify: bool = False) -> TokenFolder:
    """Open a finished token folder, or the `tokens` of a cache, and check that every file is there in its full size.

    Args:
        path: The folder.
        verify: Also compare the checksums, which reads every file.

    Raises:
        UnweaveError: It is none, it is unfinished, or files are missing or damaged; all of those are named.
    """
    path = Path(path).expanduser()
    folder = find_token_folder(path)
    if folder is None:
        raise UnweaveError(f"{path} is no token folder: it has no {MANIFEST} that says so.")
    manifest = _read_manifest(folder)
    if bad := _problems(folder, manifest):
        raise UnweaveError(f"the token folder {folder} is damaged: {'; '.join(bad)}.")
    opened = TokenFolder(folder, manifest)
    if verify:
        opened.verify()
    return opened


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        version, context = manifest["version"], manifest["context"]
        for side in SIDES:
            shards = manifest["sides"][side]["shards"]
            if manifest["sides"][side]["rows"] != sum(shard["rows"] for shard in shards):
                raise ValueError(f"the rows of the {side} shards do not add up")
        list(_files(manifest))
        if not (isinstance(context, int) and context > 0 and manifest["complete"] is True):
            raise ValueError("it is not complete")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnweaveError(f"{folder / MANIFEST} is no manifest of a token folder: {error!r}.") from error
    if version != VERSION:
        raise UnweaveError(f"the token folder {folder} has version {version!r}; this unweave reads {VERSION}.")
    return manifest


def _files(manifest: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    """Name, bytes and checksum of every file."""
    for side in SIDES:
        for shard in manifest["sides"][side]["shards"]:
            for kind in ("tokens", "documents"):
                yield shard[kind]["file"], shard[kind]["bytes"], shard[kind]["blake2b"]


def _problems(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with the files, as far as it can be seen without reading them."""
    problems = []
    for side in SIDES:
        for shard in manifest["sides"][side]["shards"]:
            for kind, dtypes in (("tokens", (manifest["dtype"],)), ("documents", ("int32", "int64"))):
                name, wanted = shard[kind]["file"], (shard["rows"], manifest["context"])
                path = folder / name
                if Path(name).name != name or not path.is_file():
                    problems.append(f"{name} is missing")
                    continue
                try:
                    dtype, shape = read_npy_header(path)
                except (OSError, ValueError) as error:
                    problems.append(f"{name} cannot be read ({error})")
                    continue
                size = path.stat().st_size
                if dtype.name not in dtypes or shape != wanted:
                    problems.append(f"{name} holds {dtype.name} {shape}, not {' or '.join(dtypes)} {wanted}")
                elif size != HEADER_BYTES + wanted[0] * wanted[1] * dtype.itemsize or size != shard[kind]["bytes"]:
                    problems.append(f"{name} has {size:,} bytes, not {shard[kind]['bytes']:,}")
    return problems


def _map(path: Path) -> NDArray[Any]:
    return np.load(path, mmap_mode="r", allow_pickle=False)
