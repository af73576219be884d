"""The directory of published SAEs: which releases there are, what is in them, and where each SAE lies on the Hub.

A release is a set of SAEs under one name, such as `gpt2-small-res-jb`; each has an id in it. The directory ships with
unweave (170 releases, 13 857 SAEs) and is unpacked when it is first asked for. It says nothing that the files do not,
but for the few facts that they lack: where they are, an input scale, keys of a config that have to be replaced.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unweave._errors import UnweaveError, nearest
from unweave.hub import naming

if TYPE_CHECKING:
    from rich.console import RenderableType

PACKED = Path(__file__).with_name("releases.json.gz")
WIDE = 1000
"""Columns of a table that goes to no terminal: more than it needs, so that each of its rows is one line."""
_SHOWN = 8


@dataclass(frozen=True)
class PublishedSAE:
    """One SAE of a release.

    Attributes:
        id: Its name in the release.
        path: Folder or file in the repository.
        site: What it reads: "resid_post", "mlp_out", "attn_out", "hook_z", "transcoder", ...
        layer: Number of the block, from 0; None where there is none.
        width: Number of latents as the release gives it ("16k", "8x", "24576"); None where it says none.
        l0: Mean number of active latents, as published.
        variance_explained: As published.
        norm_scaling_factor: What inputs were multiplied by in training, where the file does not say.
        neuronpedia: Its page's id on Neuronpedia.
    """

    id: str
    path: str
    site: str
    layer: int | None
    width: str | None
    l0: float | None = None
    variance_explained: float | None = None
    norm_scaling_factor: float | None = None
    neuronpedia: str | None = None


@dataclass(frozen=True)
class Release:
    """A set of published SAEs.

    Attributes:
        name: What it is loaded by.
        repo_id: Repository on the Hub.
        model: Model that the SAEs were trained on, as the release names it.
        format: How its files are laid out.
        saes: Its SAEs.
        config_overrides: Keys that replace those of a file's config.
    """

    name: str
    repo_id: str
    model: str
    format: str
    saes: tuple[PublishedSAE, ...]
    config_overrides: dict[str, Any]

    @property
    def hooks(self) -> str:
        """Sites and layers, such as "resid_post.0-11"."""
        sites: dict[str, set[int]] = {}
        for sae in self.saes:
            sites.setdefault(sae.site, set()).update(() if sae.layer is None else (sae.layer,))
        return ", ".join(f"{site}.{_spans(layers)}" if layers else site for site, layers in sites.items())

    @property
    def widths(self) -> str:
        """All widths, as they are published."""
        return " ".join(dict.fromkeys(sae.width for sae in self.saes if sae.width is not None)) or "–"

    @property
    def l0(self) -> str:
        """The range of the published L0."""
        found = [sae.l0 for sae in self.saes if sae.l0 is not None]
        return _range(found) if found else "–"

    def __getitem__(self, id: str) -> PublishedSAE:
        """The SAE of an id.

        Raises:
            UnweaveError: If there is none, naming the nearest ones; or the candidates, if `id` stands for several.
        """
        for sae in self.saes:
            if sae.id == id:
                return sae
        ids = [sae.id for sae in self.saes]
        if within := [name for name in ids if id and _parts(id) <= _parts(name)]:
            one = f"; its id is {within[0]!r}"
            hint = one if len(within) == 1 else f": {len(within)} ids contain it, {some(within)}"
        else:
            hint = nearest(id, ids).removesuffix("?") or f"; there are {some(ids)}"
        raise UnweaveError(f"the release {self.name!r} has no SAE {id!r}{hint}.{_canonical(self.name, id)}")

    def table(self) -> RenderableType:
        """All its SAEs, for a terminal."""
        rows = [
            (s.id, s.site if s.layer is None else f"{s.site}.{s.layer}", s.width or "–",
             "–" if s.l0 is None else f"{s.l0:g}", s.path)
            for s in self.saes
        ]  # fmt: skip
        return _table(("id", "hook", "width", "L0", "path in the repository"), rows)

    def __rich__(self) -> RenderableType:
        return self.table()


class ReleaseTable(list[Release]):
    """Releases, shown as a table."""

    def table(self) -> RenderableType:
        """Names, models, hooks, widths, published L0, formats and repositories, for a terminal."""
        rows = [(r.name, r.model, r.hooks, r.widths, r.l0, str(len(r.saes)), r.format, r.repo_id) for r in self]
        return _table(("release", "model", "hooks", "widths", "L0", "SAEs", "format", "repository"), rows)

    def __rich__(self) -> RenderableType:
        return self.table()

    def __repr__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=WIDE, color_system=None).print(self.table())
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def releases(search: str = "") -> ReleaseTable:
    """Published SAEs that unweave knows: the releases in which every word of `search` occurs.

    Words are looked for in name, model, repository, format and hooks, whatever their case.

    Raises:
        UnweaveError: If there is none, naming the nearest releases and models.
    """
    words = search.lower().split()
    found = [r for r in directory().values() if all(word in _searched(r) for word in words)]
    if not found:
        names = {name for r in directory().values() for name in (r.name, r.model)}
        known = sorted(names | {name.partition("-")[0] for name in names})  # gpt2-small-res-jb, and gpt2
        raise UnweaveError(f"no release matches {search!r}{nearest(search, known) or '.'}")
    return ReleaseTable(found)


def find(release: str, id: str | None = None) -> tuple[Release, PublishedSAE]:
    """A published SAE; the id can be left out where a release has one SAE.

    Raises:
        UnweaveError: If there is none, naming the nearest.
    """
    if release not in directory():
        raise UnweaveError(f"there is no release {release!r}{nearest(release, directory()) or '.'}")
    entry = directory()[release]
    if id is not None:
        return entry, entry[id]
    if len(entry.saes) > 1:
        raise UnweaveError(
            f"the release {release!r} has {len(entry.saes)} SAEs; name one: {some(s.id for s in entry.saes)}."
        )
    return entry, entry.saes[0]


def at(repo_id: str, path: str) -> tuple[Release, PublishedSAE] | None:
    """What the directory knows about a folder or file of a repository, if anything."""
    for release in directory().values():
        if release.repo_id == repo_id:
            for sae in release.saes:
                if sae.path == path:
                    return release, sae
    return None


@cache
def directory() -> dict[str, Release]:
    """All releases by name."""
    return {name: _release(name, entry) for name, entry in unpack().items()}


def unpack() -> dict[str, dict[str, Any]]:
    """The facts as their source states them."""
    loaded: dict[str, dict[str, Any]] = json.loads(gzip.decompress(PACKED.read_bytes()))
    return loaded


def checksum(facts: dict[str, Any]) -> str:
    """SHA-256 of the directory's facts, whatever the order of keys and the spaces between them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _release(name: str, entry: dict[str, Any]) -> Release:
    saes = tuple(_published(name, sae) for sae in entry["saes"])
    overrides = entry.get("config_overrides") or {}
    return Release(name, entry["repo_id"], entry["model"], entry["format"], saes, overrides)


def _published(release: str, entry: dict[str, Any]) -> PublishedSAE:
    facts = dict(entry) | {"path": str(entry["path"])}  # of per-layer transcoders it is a number
    id, path = facts["id"], facts["path"]
    if facts.get("l0") is None:
        facts["l0"] = naming.l0(path)
    return PublishedSAE(
        **facts, site=naming.site(release, id, path), layer=naming.layer(id, path),
        width=naming.width(release, id, path, facts.get("neuronpedia")),
    )  # fmt: skip


def _searched(release: Release) -> str:
    return " ".join((release.name, release.model, release.repo_id, release.format, release.hooks)).lower()


def _parts(id: str) -> set[str]:
    return set(re.split(r"[/.]", id))


def _canonical(release: str, id: str) -> str:
    """Gemma Scope's releases have a short list beside them, with one SAE of each layer and width."""
    other = directory().get(f"{release}-canonical")
    if other is None:
        return ""
    layer_and_width = re.match(r"layer_\d+(/width_\w+)?", id)
    ids = [s.id for s in other.saes if layer_and_width and s.id.startswith(f"{layer_and_width[0]}/")]
    return f" The release {other.name!r} has {some(ids) if ids else 'one SAE of each layer and width'}."


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _spans(numbers: set[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in _runs(sorted(numbers)))


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    start = numbers[0]
    for before, after in zip(numbers, [*numbers[1:], None], strict=True):
        if after != before + 1:
            yield start, before
            if after is not None:
                start = after


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def _table(names: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        right = name in ("L0", "SAEs")
        table.add_column(name, no_wrap=name in ("release", "id"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
