"""A repository on the Hub: its name and how it is read, its files, and what of it is in the cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from unweave._errors import UnweaveError, nearest

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PATIENCE = 10.0
"""Seconds after which a Hub that does not answer counts as out of reach."""


@dataclass(frozen=True)
class Repo:
    """A repository on the Hub, and how it is read.

    Attributes:
        id: Owner and name.
        revision: Branch, tag or commit.
        token: Of a private or gated repository; None: the one that `hf auth login` or HF_TOKEN gave.
        local_files_only: Look at the cache alone.
        force_download: Download again what is in the cache.
        kind: "model" or "dataset".
        commit: The commit that `revision` stood for when it was looked at; None: not yet.
    """

    id: str
    revision: str = "main"
    token: str | None = None
    local_files_only: bool = False
    force_download: bool = False
    kind: Literal["model", "dataset"] = "model"
    commit: str | None = None

    @property
    def at(self) -> str:
        """What the Hub is asked for."""
        return self.commit or self.revision

    def __post_init__(self) -> None:
        if not HUB_NAME.fullmatch(self.id):
            raise UnweaveError(f"{self.id!r} is no repository on the Hub: its name is OWNER/NAME.")

    def __str__(self) -> str:
        named = "" if self.revision == "main" else f" at {self.revision!r}"
        return f"{'dataset ' * (self.kind == 'dataset')}{self.id!r}{named}"


def check_inside(path: str) -> str:
    """A path within a repository or folder, as it was.

    Raises:
        UnweaveError: If it leads out of it.
    """
    parts = PurePosixPath(path.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:", path):
        raise UnweaveError(f"{path!r} leads out of its folder.")
    return path


def asked(repo: Repo) -> tuple[Repo, list[str]]:
    """The repository at its commit, and its files, as the Hub answers; with huggingface_hub's own errors."""
    from huggingface_hub import HfApi

    info = HfApi(token=repo.token).repo_info(repo.id, revision=repo.at, repo_type=repo.kind, timeout=_PATIENCE)
    return replace(repo, commit=info.sha), [file.rfilename for file in getattr(info, "siblings", None) or ()]


def within(files: Sequence[str], folder: str) -> list[str]:
    """Those of the files that are in a folder or below it; "" is the top."""
    return [name for name in files if not folder or PurePosixPath(folder) in PurePosixPath(name).parents]


def missing(repo: Repo, files: Sequence[str], name: str) -> UnweaveError:
    """What to raise where a repository that has `files` has no file or folder of a name."""
    folders = {str(parent) for file in files for parent in PurePosixPath(file).parents} - {"."}
    return UnweaveError(f"the repository {repo} has no {name!r}{nearest(name, sorted({*files, *folders})) or '.'}")


def cached(repo: Repo) -> list[str]:
    """Names of the files of a repository's revision that are in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    top = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo.id, repo_type=repo.kind)
    reference = top / "refs" / repo.revision
    commit = repo.commit or (reference.read_text(encoding="utf-8").strip() if reference.is_file() else repo.revision)
    snapshot = top / "snapshots" / commit
    return sorted(p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file())
