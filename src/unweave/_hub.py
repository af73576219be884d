"""Whether the Hugging Face Hub can be reached: asked once, before its client would try again and again.

Of a file that it has not cached, huggingface_hub asks six times with growing pauses, half a minute in all, and
libraries on top of it do so for every file; no argument turns that off. So one request of our own goes first. Where it
fails, there is nothing but the cache to look at, and that is said at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Literal

_CONNECT, _ANSWER = 4.0, 10.0
"""Seconds that a connection, and then an answer, may take."""
_REACHED_FOR, _AWAY_FOR = 60.0, 5.0
"""Seconds for which it is remembered that the Hub was reached, or was not."""

_answers: dict[str, tuple[float, str | None]] = {}
"""Of each address: until when the answer holds, and what is wrong."""


@dataclass
class _Offline:
    """The state of `asked_once`: how many are within it, what they were told, and huggingface_hub's own setting."""

    inside: int = 0
    why: str | None = None
    before: bool = False


_offline = _Offline()
_lock = RLock()
"""Of both. Held while the Hub is asked, so that threads that want to know at the same time ask once, too."""


def unreachable() -> str | None:
    """Where the Hub cannot be reached, and why: "at https://... (reason)". None if it answers, be it with a refusal."""
    from huggingface_hub import constants, get_session

    with _lock:
        if _offline.inside:
            return _offline.why
        address = constants.ENDPOINT
        if constants.HF_HUB_OFFLINE:
            return f"at {address} (HF_HUB_OFFLINE is set)"
        until, answer = _answers.get(address, (0.0, None))
        if time.monotonic() < until:
            return answer
        try:
            get_session().head(address, follow_redirects=False, timeout=(_CONNECT, _ANSWER, _ANSWER, _ANSWER))
            answer = None
        except network_errors() as error:
            answer = f"at {address} ({str(error).rstrip('.') or type(error).__name__})"
        _answers[address] = time.monotonic() + (_REACHED_FOR if answer is None else _AWAY_FOR), answer
        return answer


@contextmanager
def asked_once() -> Iterator[None]:
    """Within it, if the Hub cannot be reached, libraries that use huggingface_hub take what is cached or fail at once.

    For calls of libraries that have no argument for it. huggingface_hub's setting is what it was when the last leaves.
    """
    from huggingface_hub import constants

    with _lock:
        if (why := unreachable()) is not None:
            if not _offline.inside:
                _offline.why, _offline.before = why, constants.HF_HUB_OFFLINE
            _offline.inside += 1
            constants.HF_HUB_OFFLINE = True
    if why is None:
        yield
        return
    try:
        yield
    finally:
        with _lock:
            _offline.inside -= 1
            if not _offline.inside:
                constants.HF_HUB_OFFLINE = _offline.before


def downloaded(kind: Literal["model", "dataset"] = "model") -> list[str]:
    """Names of the repositories of which something is in the cache."""
    from huggingface_hub import constants

    folders = sorted(Path(constants.HF_HUB_CACHE).glob(f"{kind}s--*/snapshots"))
    return [folder.parent.name.removeprefix(f"{kind}s--").replace("--", "/") for folder in folders]


def network_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub's client raises where the network fails, which is the base of its errors of the Hub.

    The client's package has another name in some versions, so it is not imported by name.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[:1]
