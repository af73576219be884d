"""Opening a cache: every file is found, checked and mapped, and each side of it is a `Store`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unweave._errors import UnweaveError, nearest
from unweave.activations.cache.format import (
    DTYPES,
    FORMAT,
    HEADER_BYTES,
    IMAGES,
    MADE_FROM,
    MANIFEST,
    NAMED,
    SHARD,
    TOKENS,
    VERSION,
    files_of,
    hash_of,
)
from unweave.activations.cache.side import CacheSide
from unweave.activations.config import DataConfig
from unweave.activations.tokenized.folder import open_token_folder
from unweave.activations.tokenized.format import SIDES, checksum, read_format, read_npy_header
from unweave.models.names import end_of, fits


@dataclass(frozen=True, eq=False)
class Cache:
    """A finished cache; see `open_cache`.

    Attributes:
        path: Its folder.
        manifest: What `manifest.json` holds.
        train: The rows of training documents.
        held_out: The rows of held-out documents; None if there are none.
    """

    path: Path
    manifest: dict[str, Any] = field(repr=False)
    train: CacheSide
    held_out: CacheSide | None

    @property
    def hash(self) -> str:
        """128 bits that stand for all that produced it: model, tokenizer, data, hooks, types and settings."""
        return self.manifest["hash"]

    @property
    def hooks(self) -> tuple[str, ...]:
        return self.train.hooks

    @property
    def tl_names(self) -> dict[str, str]:
        """TransformerLens' name of each hook, or the hook's own."""
        return {hook["name"]: hook["tl_name"] or hook["name"] for hook in self.manifest["hooks"]}

    def head(self, hook: str) -> int | None:
        """The number of the head that a hook reads, if it reads one head of what attention mixes."""
        return next(about["head"] for about in self.manifest["hooks"] if about["name"] == hook)

    def resolve(self, names: str | Sequence[str]) -> list[str]:
        """The hooks that names stand for: paths or their ends, globs, or aliases, as for a model, in the stored order.

        Raises:
            UnweaveError: A name matches none, or, without a glob, the ends of several.
        """
        found: set[str] = set()
        known = {hook["name"]: hook["aliases"] for hook in self.manifest["hooks"]}
        for name in [names] if isinstance(names, str) else names:
            path = name.removesuffix(":out")
            same = [h for h in known if _part_of(h) == _part_of(path)]
            matching = [h for h in same if fits(h, path)] or [
                h for h, own in known.items() if any(fits(alias, path) for alias in own)
            ]
            if not matching:  # the end of a path will do
                matching = [h for h in same if fits(end_of(h, path), path)]
                if len(matching) > 1 and not any(sign in path for sign in "*?["):
                    raise UnweaveError(f"{name!r} could be any of {', '.join(matching)} in {self.train.name}.")
            if not matching:
                hint = nearest(name, [n for h, own in known.items() for n in (h, *own)]) or "."
                raise UnweaveError(f"{self.train.name} has no hook {name!r}; it has {', '.join(self.hooks)}{hint}")
            found.update(matching)
        return [hook for hook in self.hooks if hook in found]

    @property
    def dtype(self) -> str:
        """Type of the files: float32, bfloat16, float16 or int8."""
        return self.manifest["dtype"]

    @property
    def config(self) -> DataConfig | None:
        """How documents were laid into rows; None for images."""
        return data_config(self.manifest)

    @property
    def positions(self) -> str | tuple[int, ...] | None:
        """Positions of a row that are stored; None: all."""
        kept = self.manifest["made_from"]["positions"]
        return tuple(kept) if isinstance(kept, list) else kept

    @property
    def tokens(self) -> Path | None:
        """The token folder of the rows that were run; None for images."""
        return self.path / TOKENS if (self.path / TOKENS).is_dir() else None

    @property
    def images(self) -> dict[str, Any] | None:
        """Of images by number: "names", "labels" (classes) and "classes" (their names); None for text."""
        path = self.path / IMAGES
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def verify(self) -> None:
        """Compare every file with its checksum, which reads all of them.

        Raises:
            UnweaveError: Some differ; all of them are named.
        """
        wrong = [str(p.relative_to(self.path)) for p, about in _files(self.path, self.manifest)
                 if checksum(p) != about["blake2b"]]  # fmt: skip
        if self.tokens is not None:
            wrong += [f"{TOKENS}/{name}" for name in open_token_folder(self.tokens).changed()]
        if wrong:
            raise UnweaveError(f"in the cache {self.path}, {', '.join(wrong)} changed after being written.")

    def check_model(self, fingerprint: str, name: str) -> None:
        """Refuse a model, given by its fingerprint, that is not the one whose activations these are."""
        made_with = self.manifest["made_from"]["model"]
        if made_with["fingerprint"] != fingerprint:
            raise UnweaveError(
                f"the cache {self.path} holds activations of the model {made_with['name']!r}, and {name!r} has other "
                "parameters: name the model that the cache was made with, or make a cache of this one."
            )


def _part_of(hook: str) -> tuple[bool, bool]:
    """Whether a hook is at a module's input, and whether it is some columns alone; a glob says nothing about these."""
    place, sign, _ = hook.partition("#")
    return place.endswith(":in"), bool(sign)


# --- opening ---------------------------------------------------------------------------------------------------------


def is_cache(path: str | Path) -> bool:
    """Whether a folder is a cache, finished or not."""
    return read_format(Path(path).expanduser() / MANIFEST) == FORMAT


def open_cache(folder: str | Path, *, verify: bool = False) -> Cache:
    """Open a finished cache, and check that every file is there in its full size, of the right type and shape.

    Args:
        folder: The folder that `unweave.cache` or `unweave cache` wrote.
        verify: Also compare the checksums, which reads every file.

    Raises:
        UnweaveError: It is none, it is unfinished, or files are missing or damaged; all of those are named.
    """
    path = Path(folder).expanduser()
    if not is_cache(path):
        raise UnweaveError(f"{path} is no cache: it has no {MANIFEST} that says so.")
    manifest = read_manifest(path)
    if not manifest["complete"]:
        raise UnweaveError(f"the cache {path} is unfinished: go on with the same command and --resume.")
    if bad := list(_problems(path, manifest)):
        raise UnweaveError(f"the cache {path} is damaged: {'; '.join(bad)}.")
    if manifest["made_from"]["rows"] == "text":
        open_token_folder(path / TOKENS)  # what is evaluated on must be there before it is trained for
    held_out = CacheSide(path, manifest, "held_out") if manifest["sides"]["held_out"]["rows"] else None
    opened = Cache(path, manifest, CacheSide(path, manifest, "train"), held_out)
    if verify:
        opened.verify()
    return opened


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a cache, whose values are of the right kind and agree with one another.

    Raises:
        UnweaveError: They do not.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version, made_from = manifest["version"], manifest["made_from"]
        if version == VERSION:
            if lacking := [key for key in MADE_FROM if key not in made_from]:
                raise UnweaveError(
                    f"the cache {path} was made by an earlier state of unweave: its manifest does not say "
                    f"{', '.join(lacking)}; make it anew."
                )
            if manifest["hash"] != hash_of(hashed(made_from)):
                raise ValueError("its hash is not that of what it says it was made from")
            if manifest["complete"]:
                _check_manifest(manifest)
    except UnweaveError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnweaveError(f"{path / MANIFEST} is no manifest of a cache: {error!r}.") from error
    if version != VERSION:
        raise UnweaveError(f"the cache {path} has version {version!r}; this unweave reads {VERSION}.")
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    if manifest["dtype"] not in DTYPES or manifest["dtype"] != manifest["made_from"]["dtype"]:
        raise ValueError(f"the dtype {manifest['dtype']!r}")
    names = [hook["name"] for hook in manifest["hooks"]]
    if names != manifest["made_from"]["hooks"] or not all(hook["width"] > 0 for hook in manifest["hooks"]):
        raise ValueError("its hooks are not those that it was made from")
    files = files_of({hook["name"]: hook["file"] for hook in manifest["hooks"]}, manifest["dtype"], manifest["records"])
    if not all(re.fullmatch(r"[A-Za-z0-9_.-]+\.npy", name) for name in files):
        raise ValueError("the name of a file")
    data_config(manifest)
    for side in SIDES:
        shards = manifest["sides"][side]["shards"]
        if manifest["sides"][side]["rows"] != sum(shard["rows"] for shard in shards):
            raise ValueError(f"the rows of the {side} shards do not add up")
        for shard in shards:
            if not re.fullmatch(rf"{side}_\d{{5,}}", shard["folder"]) or set(shard["files"]) != set(files):
                raise ValueError(f"the files of the shard {shard['folder']!r}")


def data_config(manifest: Mapping[str, Any]) -> DataConfig | None:
    """How the rows of a cache of text were laid out."""
    made_from = manifest["made_from"]
    return DataConfig(**made_from["config"]) if made_from["rows"] == "text" else None


def hashed(made_from: Mapping[str, Any]) -> dict[str, Any]:
    """What a cache was made from, without names: those of one machine may mean nothing on another."""
    return {
        key: {k: v for k, v in value.items() if k != "name"} if key in NAMED and value else value
        for key, value in made_from.items()
    }


def _files(path: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    if "images" in manifest:
        yield path / IMAGES, manifest["images"]
    for side in SIDES:
        for shard in manifest["sides"][side]["shards"]:
            for name, about in shard["files"].items():
                yield path / shard["folder"] / name, about


def _problems(path: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the files, as far as it can be seen without reading them."""
    hooks = {hook["name"]: hook["file"] for hook in manifest["hooks"]}
    widths = {hook["name"]: hook["width"] for hook in manifest["hooks"]}
    holds = files_of(hooks, manifest["dtype"], manifest["records"])
    if manifest["made_from"]["rows"] == "text" and not (path / TOKENS / MANIFEST).is_file():
        yield f"{TOKENS}/{MANIFEST} is missing"
    if "images" in manifest:
        there = (path / IMAGES).stat().st_size if (path / IMAGES).is_file() else None
        if there != manifest["images"]["bytes"]:
            yield f"{IMAGES} " + ("is missing" if there is None else f"has {there:,} bytes")
    for side in SIDES:
        for shard in manifest["sides"][side]["shards"]:
            if not (path / shard["folder"] / SHARD).is_file():
                yield f"{shard['folder']}/{SHARD} is missing"
            for name, about in shard["files"].items():
                kind, of = holds[name]
                shape = (shard["rows"], widths[of]) if kind == "hook" else (shard["rows"],)
                dtype = {"hook": DTYPES[manifest["dtype"]][0], "record": manifest["records"].get(of)}.get(kind, "<f4")
                if wrong := _problem(path / shard["folder"] / name, about["bytes"], np.dtype(dtype), shape):
                    yield f"{shard['folder']}/{name} {wrong}"


def _problem(file: Path, n_bytes: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> str | None:
    if not file.is_file():
        return "is missing"
    try:
        found, there = read_npy_header(file)
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    if (found, there) != (dtype, shape):
        return f"holds {found.name} {there}, not {dtype.name} {shape}"
    size, wanted = file.stat().st_size, HEADER_BYTES + int(np.prod(shape)) * dtype.itemsize
    return None if size == n_bytes == wanted else f"has {size:,} bytes, not {wanted:,}"
