"""A folder or file that somebody published, and how its parts are read: nothing in it is ever executed.

Weights are mapped, so what is not looked at is not read. Pickles are read with `weights_only=True`; what that refuses,
we refuse.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch
import yaml
from torch import Tensor

from unweave._errors import UnweaveError, nearest_beside
from unweave._mapped import Mapping as Mapped
from unweave._mapped import map_file, map_tensors, tensor_in
from unweave.hub.torch_files import read_torch, start_of


class Source:
    """What a reader reads.

    Args:
        path: A folder, or one file; the files beside it are then at hand too.
        hints: What the caller knows and the files do not say, by name; see `unweave.hub.read_sae`.
        shapes_only: Give matrices as shapes, on the meta device; vectors and numbers are read all the same. A reader
            that is run so says what an SAE is without reading its weights.

    Attributes:
        folder: The folder.
        file: Name of the one file, or None.

    Raises:
        UnweaveError: If there is nothing at the path, naming the nearest beside it.
    """

    def __init__(self, path: str | Path, hints: Mapping[str, Any] | None = None, *, shapes_only: bool = False) -> None:
        self.path, self.hints, self.shapes_only = Path(path), dict(hints or {}), shapes_only
        if not self.path.exists():
            raise UnweaveError(f"there is no file or folder {str(path)!r}{nearest_beside(self.path) or '.'}")
        self.file = None if self.path.is_dir() else self.path.name
        self.folder = self.path if self.file is None else self.path.parent

    def __str__(self) -> str:
        return repr(str(self.path))

    @property
    def overrides(self) -> dict[str, Any]:
        """Keys that replace those of the files' config: the hint `config_overrides`."""
        return dict(self.hints.get("config_overrides", {}))

    @property
    def address(self) -> str:
        """Where the files come from, as names are guessed from it: the hint `repo`, and the path."""
        return f"{self.hints.get('repo', '')}/{self.path.absolute().as_posix()}".replace("--", "/")

    def find(self, *patterns: str) -> list[str]:
        """Names of the files that match one of the patterns, sorted; of a single file, only its own."""
        if self.file is not None:
            return [self.file] if any(fnmatch(self.file, p.rsplit("/", 1)[-1]) for p in patterns) else []
        found = (path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file())
        return sorted({path.relative_to(self.folder).as_posix() for path in found})

    def one(self, *patterns: str) -> str:
        """Name of the one file that matches.

        Raises:
            UnweaveError: If there are several, which it names, or none.
        """
        found = self.find(*patterns)
        if len(found) != 1:
            some = ", ".join(found[:5]) + ", ..." * (len(found) > 5)
            what = f"holds several SAEs ({some}): name one of these files" if found else f"has no file {patterns[0]}"
            raise UnweaveError(f"{self} {what}.")
        return found[0]

    def has(self, name: str) -> bool:
        """Whether the folder has a file."""
        return (self.folder / name).is_file()

    def inside(self, name: str) -> Path:
        """A file of the folder, by a name that a file of it gives.

        Raises:
            UnweaveError: If the name leads out of the folder, or there is no such file.
        """
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
            raise UnweaveError(f"{self} names the file {name!r}, which lies outside of its folder.")
        if not self.has(name):
            raise UnweaveError(f"{self} lacks the file {name!r}.")
        return self.folder / name

    def parent(self) -> Source:
        """The folder above."""
        return Source(self.folder.absolute().parent, self.hints, shapes_only=self.shapes_only)

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file."""
        return self._object(name, json.loads, json.JSONDecodeError, "JSON")

    def yaml(self, name: str) -> dict[str, Any]:
        """The mapping in a YAML file."""
        return self._object(name, yaml.safe_load, yaml.YAMLError, "YAML")

    def _object(self, name: str, parse: Any, error_type: type[Exception], kind: str) -> dict[str, Any]:
        path = self.inside(name)
        try:
            value = parse(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, error_type) as error:
            raise UnweaveError(f"{str(path)!r} is not valid {kind}: {error}.") from error
        if not isinstance(value, dict):
            raise UnweaveError(f"{str(path)!r} is no {kind} object.")
        return value

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors, npz or PyTorch file, mapped.

        Raises:
            UnweaveError: If the file is missing, damaged, a pickle with code in it, or holds something else.
        """
        value = self.torch(name) if name.endswith((".pt", ".pth", ".bin")) else None
        if value is not None:
            return self.only_tensors(value, name)
        path = self.inside(name)
        return self.shapes(map_npz(path) if name.endswith(".npz") else map_tensors(path))

    def keys(self, name: str) -> list[str]:
        """Names of the tensors and values in a PyTorch or safetensors file; of one that is no dictionary, none.

        Several formats are told from each other by nothing else.
        """
        path = self.inside(name)
        value = read_torch(path) if name.endswith((".pt", ".pth", ".bin")) else map_tensors(path)
        return [key for key in value if isinstance(key, str)] if isinstance(value, dict) else []

    def torch(self, name: str) -> Any:
        """What a PyTorch file holds: tensors, numbers, texts, lists and dictionaries."""
        return read_torch(self.inside(name))

    def only_tensors(self, value: Any, name: str) -> dict[str, Tensor]:
        """The value, which must be a state dictionary."""
        if not isinstance(value, dict) or not all(isinstance(v, Tensor) for v in value.values()):
            raise UnweaveError(f"{name!r} in {self} is no dictionary of tensors.")
        return self.shapes(dict(value))

    def shapes(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, or of matrices only the shapes, if this is all that is wanted."""
        if not self.shapes_only:
            return tensors
        return {n: t if t.ndim < 2 else torch.empty_like(t, device="meta") for n, t in tensors.items()}


def map_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an npz file: mapped where they are stored as they are, read where they are compressed.

    Raises:
        UnweaveError: If it is damaged, or holds Python objects.
    """
    tensors = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            mapping = map_file(path)
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if entry.compress_type == zipfile.ZIP_STORED:
                    start_of(entry, file)
                    tensors[name] = _mapped_array(mapping, file)
                else:
                    with archive.open(entry) as compressed:
                        array = np.lib.format.read_array(compressed, allow_pickle=False)
                    tensors[name] = torch.from_numpy(array)
    except (zipfile.BadZipFile, ValueError, struct.error, EOFError, OSError) as error:
        raise UnweaveError(f"{str(path)!r} is damaged: {error}.") from error
    except TypeError as error:
        raise UnweaveError(f"{str(path)!r} holds an array of a type that PyTorch does not have: {error}.") from error
    return tensors


def _mapped_array(mapping: Mapped, file: BinaryIO) -> Tensor:
    """The npy array that begins where the file stands."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    found = tensor_in(mapping, kind, shape[::-1] if fortran else shape, file.tell())
    return found.permute(*reversed(range(found.ndim))) if fortran else found
