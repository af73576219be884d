"""What goes wrong with the Hub, as one sentence with the way out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from unweave._errors import UnweaveError, nearest
from unweave._hub import downloaded, network_errors, unreachable
from unweave.hub import published
from unweave.hub.repo import Repo, asked, cached, missing

_SHOWN = 12


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
    try:
        files = asked(repo)[1]
    except network_errors():  # that the file is missing is known; only names like it are not
        files = cached(repo)
    return str(missing(repo, files, name))


def away(repo: Repo, name: str = "") -> str:
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
