"""What an SAE is, without its weights: from its config, and from the few bytes of a file that say what is in it.

A file on the Hub is sketched: a file of its size, empty but for its headers and its vectors, which range requests fetch
in a few kilobytes. The format's own reader then reads the sketch as it reads any file, for shapes alone.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._mapped import map_tensors
from unweave.hub.card import join
from unweave.hub.download import Repo, explained, fetch
from unweave.hub.folders import SPARSITY
from unweave.hub.pretrained import Place, find
from unweave.hub.published import PublishedSAE
from unweave.hub.reader import describe_sae
from unweave.sae.files import CONFIG

if TYPE_CHECKING:
    from rich.console import RenderableType

_BLOCK = 1 << 16
_NEVER = -9.99
"""More than what is stored of a latent that never fired: the logarithm of 1e-10."""
_SMALL = 1 << 21
"""Bytes up to which an entry of an archive is fetched whole."""


@dataclass(frozen=True)
class SAEInfo:
    """What is known of an SAE before its weights are read.

    Attributes:
        where: Folder, or repository and path.
        format: How its files are laid out.
        kind: "SAE", "Transcoder", "Crosscoder" or "CrossLayerTranscoder".
        d_in: Width of its inputs.
        d_out: Width of its outputs.
        d_sae: Number of latents.
        dtype: As its weights are stored.
        activation: Name of the activation function as `type`, and its fields.
        apply_b_dec_to_input: Whether the decoder's bias is subtracted from the input.
        metadata: Model, hook, data and what else its files say.
        published: What the directory of releases says of it, if it is there.
        log10_densities: `(d_sae,)`, the logarithm of how often each latent fires per token, as `sparsity.safetensors`
            beside SAELens' files has it: -10 where it never fired, NaN where that is unknown. None without that file.
    """

    where: str
    format: str
    kind: str
    d_in: int
    d_out: int
    d_sae: int
    dtype: str
    activation: dict[str, Any]
    apply_b_dec_to_input: bool
    metadata: dict[str, Any]
    published: PublishedSAE | None = None
    log10_densities: Float[Tensor, " d_sae"] | None = field(default=None, repr=False, compare=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the encoder, the decoder and its bias, as this library lays them out."""
        return {"W_enc": (self.d_in, self.d_sae), "W_dec": (self.d_sae, self.d_out), "b_dec": (self.d_out,)}

    def rows(self) -> list[tuple[str, str]]:
        """What there is to say, one line each."""
        fields = ", ".join(f"{k}={v}" for k, v in self.activation.items() if k != "type" and v is not None)
        rows = [
            ("where", self.where), ("format", self.format), ("kind", self.kind),
            ("activation", f"{self.activation['type']}({fields})"), ("d_in", f"{self.d_in:,}"),
            ("d_sae", f"{self.d_sae:,}"), ("d_out", f"{self.d_out:,}"), ("dtype", self.dtype),
            ("apply_b_dec_to_input", str(self.apply_b_dec_to_input).lower()),
            *((name, "×".join(map(str, shape))) for name, shape in self.shapes.items()),
        ]  # fmt: skip
        if self.published is not None and self.published.l0 is not None:
            rows.append(("L0, as published", f"{self.published.l0:g}"))
        if (found := self.log10_densities) is not None:
            never, known = int((found <= _NEVER).sum()), found[found > _NEVER]
            percent = 100 * 10 ** known.median().item() if len(known) else 0
            rows.append(("latents that never fired", f"{never:,}; the others on {percent:.2g} % of tokens (median)"))
        plain = {k: v for k, v in self.metadata.items() if v is not None and k != "unweave"}
        return rows + [(key, v if isinstance(v, str) else json.dumps(v)) for key, v in plain.items()]

    def __rich__(self) -> RenderableType:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan")
        table.add_column(overflow="fold")
        for row in self.rows():
            table.add_row(*row)
        return table


def sae_info(
    source: str | Path,
    id: str | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    **hints: Any,
) -> SAEInfo:
    """What a published or saved SAE is, without reading or downloading its weights.

    Args:
        source: As for `SAE.from_pretrained`.
        id: Likewise.
        revision: Likewise.
        local_files_only: Likewise.
        token: Likewise.
        **hints: Likewise.

    Raises:
        UnweaveError: As `SAE.from_pretrained`; damage is only found in what is read.
    """
    place = find(source, id, revision=revision, local_files_only=local_files_only, token=token)
    if place.repo is None:
        described = describe_sae(place.target, **hints)
        return SAEInfo(str(place.target), **described, log10_densities=_densities(Path(place.target), described))
    beside = [join(place.target, SPARSITY)] if join(place.target, CONFIG) in place.files else []
    with _sketched(replace(place, optional=[*place.optional, *beside])) as path:
        described = describe_sae(path, **(place.hints(path) | hints))
        densities = _densities(path, described)
    if place.release is not None:
        described["metadata"].setdefault("model_name", place.release.model)
    return SAEInfo(f"{place.repo}, {place.target}", **described, published=place.published, log10_densities=densities)


def _densities(path: Path, described: dict[str, Any]) -> Float[Tensor, " d_sae"] | None:
    """What is beside an SAE's files about its latents, if anything."""
    file = (path if path.is_dir() else path.parent) / SPARSITY
    if not file.is_file():
        return None
    found = map_tensors(file).get("sparsity")
    if found is None or found.shape != (described["d_sae"],):
        shape = "no tensor 'sparsity'" if found is None else f"'sparsity' of the shape {tuple(found.shape)}"
        raise UnweaveError(f"{str(file)!r} has {shape}, and the SAE beside it has d_sae={described['d_sae']}.")
    return found.float().clone()


@contextmanager
def _sketched(place: Place) -> Iterator[Path]:
    """The path that a reader is given, of files whose matrices are missing unless they are in the cache."""
    repo = place.repo
    assert repo is not None
    if repo.local_files_only:
        yield fetch(repo, place.files, place.optional) / place.target
        return
    large = [name for name in place.files if not name.endswith((".json", ".yaml", ".yml"))]
    small = [name for name in place.files if name not in large]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        cached = fetch(repo, small, place.optional)
        for name in (*small, *place.optional):
            if cached.name and (cached / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(cached / name, folder / name)
        repo = replace(repo, commit=cached.name or repo.commit)  # what follows is of the same one
        for name in large:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with RemoteFile(repo, name) as remote:
                sketch(remote, folder / name)
        yield folder / place.target


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
