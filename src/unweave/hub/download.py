"""From the Hub to a local folder: only the files that are needed, all of one commit, each compared with its hash.

Downloading, caching and going on after a dropped connection are huggingface_hub's. Here are two things that it leaves
to its caller: files come from one commit, and bytes that were damaged on the way are noticed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

from unweave._errors import UnweaveError
from unweave._hub import network_errors, unreachable
from unweave.hub.explained import away, explained
from unweave.hub.repo import Repo, asked, cached, check_inside

_AT_ONCE = 4


def fetch(repo: Repo, files: Sequence[str], optional: Sequence[str] = ()) -> Path:
    """Download files of one commit and return the folder that they lie in, under their names in the repository.

    The folder's name is the commit; it is empty where there was nothing to download.

    Args:
        repo: The repository.
        files: Names of files.
        optional: Names of files that may be missing.

    Raises:
        UnweaveError: If a file is not there, may not be read, cannot be reached or arrived damaged.
    """
    wanted, folder, rest = repo.commit, Path(), [*files, *optional]
    repo = replace(repo, commit=None)  # the first file by the revision's name, which the cache then knows
    while rest and not folder.name:
        name = rest.pop(0)
        path = _download(repo, check_inside(name), must=name in files)
        if path is not None and wanted not in (None, _top(path, name).name):  # somebody has pushed since
            path = _download(replace(repo, commit=wanted), name, must=name in files)
        if path is not None:
            folder = _top(path, name)
    same = replace(repo, commit=folder.name)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: _download(same, check_inside(name), must=name in files), rest))
    return folder


def _top(path: Path, name: str) -> Path:
    return path.parents[len(PurePosixPath(name).parts) - 1]


def _download(repo: Repo, name: str, *, must: bool) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    before = try_to_load_from_cache(repo.id, name, revision=repo.at, repo_type=repo.kind)
    cached = isinstance(before, str) and not repo.force_download
    if repo.local_files_only or unreachable() is not None:
        if cached:
            return Path(str(before))
        # Not to be reached is not to be missing, unless nothing but the cache was asked for, or it says so.
        if must or (before is None and not repo.local_files_only):
            raise UnweaveError(away(repo, name))
        return None
    known = os.path.realpath(str(before)) if cached else None
    with explained(repo, name):
        try:
            path = Path(
                hf_hub_download(
                    repo.id, name, revision=repo.at, repo_type=repo.kind, token=repo.token,
                    force_download=repo.force_download,
                )
            )  # fmt: skip
        except EntryNotFoundError as error:
            if must or isinstance(error, LocalEntryNotFoundError):  # which is said where the network fails
                raise
            return None
    if os.path.realpath(path) != known:
        _verify(repo, path, name)
    return path


def _verify(repo: Repo, path: Path, name: str) -> None:
    """Compare a file that was just downloaded with the hash that the Hub gives as its ETag."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if path.is_symlink():  # to the blob, which has the ETag as its name
        expected = Path(os.readlink(path)).name
    else:
        with explained(repo, name):
            url = hf_hub_url(repo.id, name, revision=repo.at, repo_type=repo.kind)
            expected = get_hf_file_metadata(url, token=repo.token).etag or ""
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", expected) or expected in _hashes(path, expected):
        return  # a mirror may give ETags of its own
    for file in {path.resolve(), path.parent / os.readlink(path) if path.is_symlink() else path, path}:
        file.unlink(missing_ok=True)
    raise UnweaveError(f"{name!r} of the repository {repo} arrived damaged and was deleted; try again.")


def _hashes(path: Path, like: str) -> set[str]:
    """SHA-256 of a large file; of a small one SHA-1, by itself (as some mirrors give it) and as git computes it."""
    with path.open("rb") as file:
        if len(like) == 64:
            return {hashlib.file_digest(file, "sha256").hexdigest()}
        content = file.read()
    return {hashlib.sha1(head + content).hexdigest() for head in (b"", b"blob %d\0" % len(content))}


def listing(repo: Repo) -> tuple[Repo, list[str]]:
    """The files of a repository, and the repository at their commit; from the cache if that is all there is.

    Raises:
        UnweaveError: If the repository or the revision is not there, or cannot be reached and nothing of it is cached.
    """
    if not repo.local_files_only and unreachable() is None:
        try:
            with explained(repo):
                return asked(repo)
        except UnweaveError as error:
            if not isinstance(error.__cause__, network_errors()) or not cached(repo):
                raise
    if not (names := cached(repo)):
        raise UnweaveError(away(repo))
    return repo, names
