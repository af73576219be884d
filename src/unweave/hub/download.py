"""From the Hub to a local folder: only the files that are needed, all of one commit, each compared with its hash.

Downloading, caching and going on after a dropped connection are huggingface_hub's. Here are three things that it leaves
to its caller: files come from one commit, bytes that were damaged on the way are noticed, and what goes wrong is said
in one sentence with the way out of it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from unweave._errors import UnweaveError, nearest
from unweave._hub import downloaded, network_errors, unreachable
from unweave.hub import published

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SHOWN = 12
_AT_ONCE = 4
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
            raise UnweaveError(_away(repo, name))
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
    from huggingface_hub import HfApi

    if not repo.local_files_only and unreachable() is None:
        try:
            with explained(repo):
                info = HfApi(token=repo.token).repo_info(
                    repo.id, revision=repo.at, repo_type=repo.kind, timeout=_PATIENCE
                )
            files = getattr(info, "siblings", None) or ()
            return replace(repo, commit=info.sha), [file.rfilename for file in files]
        except UnweaveError as error:
            if not isinstance(error.__cause__, network_errors()) or not cached(repo):
                raise
    if not (names := cached(repo)):
        raise UnweaveError(_away(repo))
    return repo, names


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


def _away(repo: Repo, name: str = "") -> str:
    """What to say where the cache is all there is, and it does not have a repository or a file of one."""
    what = f"{name!r} of the repository {repo}" if name else f"the repository {repo}"
    why = "was not downloaded before" if repo.local_files_only else f"cannot be reached {unreachable()}"
    return f"{what} {why}{_what_is_cached(repo)}"


def _what_is_cached(repo: Repo) -> str:
    """The end of a sentence."""
    names = cached(repo)
    if not names:
        return f"; nothing of {repo} is in the cache{_similarly_named(repo) or '.'}"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"; in the cache are of {repo}: {', '.join(names[:_SHOWN])}{more}."


def _similarly_named(repo: Repo) -> str:
    """Repositories with names like an unknown one's, as the end of a sentence: of published SAEs, and in the cache."""
    published_ = {release.repo_id for release in published.directory().values()} if repo.kind == "model" else set()
    known = published_ | set(downloaded(repo.kind))
    return "" if repo.id in known else nearest(repo.id, sorted(known), cutoff=0.7)


@contextmanager
def explained(repo: Repo, name: str = "", *, reads: bool = True) -> Iterator[None]:
    """What goes wrong with the Hub, as one sentence; who reads is told what is in the cache.

    Raises:
        UnweaveError: In place of huggingface_hub's errors, which are its cause.
    """
    try:
        yield
    except UnweaveError:
        raise
    except Exception as error:
        # An upload's error is the cause of another one.
        failed = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        sentence = _sentence(failed, repo, name, reads=reads)
        if sentence is None:
            raise
        raise UnweaveError(sentence) from failed


def _sentence(error: BaseException, repo: Repo, name: str, *, reads: bool) -> str | None:
    """What went wrong; None for what has nothing to do with the Hub."""
    from huggingface_hub import constants, errors

    what = f"{name!r} of the repository {repo}" if name else f"the repository {repo}"
    match error:
        case errors.LocalTokenNotFoundError():
            return f"a name without an owner is that of whose token it is: {_access(repo)}, or name it OWNER/NAME."
        case errors.GatedRepoError():
            url = f"{constants.ENDPOINT}/{repo.id}"
            return (
                f"the repository {repo} is gated and needs a token of somebody who accepted its terms at {url}: "
                f"{_access(repo)}."
            )
        case errors.RepositoryNotFoundError():
            meant = _similarly_named(repo) or "."
            return f"there is no repository {repo}, or it is private and {_access(repo)}{meant}"
        case errors.RevisionNotFoundError():
            return f"the repository {repo.id!r} has no revision {repo.revision!r}{_revisions(repo)}."
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return f"{what} cannot be reached at {constants.ENDPOINT}{_what_is_cached(repo)}"
        case errors.EntryNotFoundError():
            return _similar(repo, name)
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"access to {what} needs a token with the right to do so: {_access(repo)}."
        case errors.HfHubHTTPError():
            reason = error.server_message or "no reason given"
            return f"access to {what} failed: the Hub answered with status {error.response.status_code}, {reason}."
        case errors.HFValidationError():
            return f"{repo.id!r} is no repository on the Hub: {str(error).rstrip('.')}."
        case OSError() if "Consistency check failed" in str(error):
            return f"{what} arrived incomplete: try again."
    if isinstance(error, (*network_errors(), ConnectionError)):
        reason = str(error).rstrip(".") or type(error).__name__
        here = _what_is_cached(repo) if reads else "."
        return f"the connection to {constants.ENDPOINT} broke at {what} ({reason}): try again{here}"
    return None


def _access(repo: Repo) -> str:
    if repo.token or _has_token():
        return "the token that was given has no access to it"
    return "no token was given, pass token= or run `hf auth login`"


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _revisions(repo: Repo) -> str:
    from huggingface_hub import HfApi

    with explained(repo):
        refs = HfApi(token=repo.token).list_repo_refs(repo.id, repo_type=repo.kind)
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return f"; it has {', '.join(map(repr, names))}"


def _similar(repo: Repo, name: str) -> str:
    return str(missing(repo, listing(repo)[1], name))
