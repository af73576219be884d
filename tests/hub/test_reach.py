"""Without the Hub: one attempt, no pause, and one sentence. The connection is refused, or dropped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import unweave as uw
from unweave import SAE, UnweaveError, _hub
from unweave._hub import asked_once, downloaded, unreachable
from unweave.hub import pull, push
from unweave.models import load_model
from unweave.sae import ReLU

JB, JB_ID, JB_REPO = "gpt2-small-res-jb", "blocks.8.hook_resid_pre", "jbloom/GPT2-Small-SAEs-Reformatted"
REFUSED = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def _nothing_is_known_and_nobody_waits(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError(f"it waits {seconds} s")

    monkeypatch.setattr(_hub, "_answers", {})
    monkeypatch.setattr(time, "sleep", sleep)


@pytest.fixture(params=["refused", "dropped"])
def away(request: pytest.FixtureRequest, hub: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Makes the hub go away and gives its address; it is asked once at most, which is looked at in the end."""
    from huggingface_hub import constants

    def go() -> str:
        _hub._answers.clear()
        hub.forget()
        if request.param == "dropped":
            hub.fault("", reset=True)
            request.addfinalizer(lambda: check(hub.requests))
            return str(hub.url)
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
            monkeypatch.setattr(constants, name, getattr(constants, name).replace(hub.url, REFUSED))
        request.addfinalizer(lambda: check(hub.requests))
        return REFUSED

    def check(requests: list[str]) -> None:
        assert requests == (["HEAD /"] if request.param == "dropped" else [])

    return go


def test_a_published_sae(away: Callable[[], str]) -> None:
    address = away()
    with pytest.raises(UnweaveError) as caught:
        SAE.from_pretrained(JB, JB_ID)
    assert re.fullmatch(
        rf"'{JB_ID}/cfg\.json' of the repository '{JB_REPO}' cannot be reached at {address} \(.+\); "
        rf"nothing of '{JB_REPO}' is in the cache\.",
        str(caught.value),
    )


def test_a_repository_and_the_nearest_known_one(away: Callable[[], str]) -> None:
    address = away()
    for load in (SAE.from_pretrained, uw.sae_info, pull):
        with pytest.raises(UnweaveError, match=rf"'nosuch/repo' cannot be reached at {address} \(.*is in the cache\.$"):
            load("nosuch/repo")
        with pytest.raises(UnweaveError, match=rf"is in the cache; did you mean '{JB_REPO}'\?$"):
            load("jbloom/gpt2-small-saes-reformated")


def test_a_model(away: Callable[[], str], tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    address = away()
    monkeypatch.chdir(tmp_path)
    hints = {"nosuch": r"\.", "dema": r"; did you mean 'demo' or 'demo-vit'\?", "gpt3": r"; did you mean 'gpt2'\?"}
    for name, near in hints.items():
        with pytest.raises(
            UnweaveError,
            match=rf"^there is no folder '{name}', and the Hugging Face Hub cannot be reached at {address} \(.*\), "
            rf"whose cache is empty{near}$",
        ):
            load_model(name)
    (hub.cache / "models--openai--gpt3" / "snapshots").mkdir(parents=True)
    with pytest.raises(UnweaveError, match=r"whose cache has 'openai/gpt3'; did you mean 'openai/gpt3'\?$"):
        load_model("openai/gpt2")


def test_what_is_cached_is_used(hub: Any, away: Callable[[], str]) -> None:
    """Also a model's files, of which some are looked for in vain, each of which took half a minute."""
    from unweave.models import DEMO

    hub.add("me/lm", {p.name: p.read_bytes() for p in DEMO.iterdir() if p.is_file()})
    before = load_model("me/lm", device="cpu")
    away()
    after = load_model("me/lm", device="cpu")
    assert after.tokenizer is not None
    assert before.tokenizer is not None
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    assert all(a.equal(b) for a, b in zip(before.module.parameters(), after.module.parameters(), strict=True))
    assert downloaded() == ["me/lm"]


def test_a_model_that_is_not_there(hub: Any) -> None:
    with pytest.raises(
        UnweaveError, match=r"^there is no folder 'me/nosuch', and the Hugging Face Hub has no model of"
    ):
        load_model("me/nosuch")


def test_settings_are_what_they_were(hub: Any, away: Callable[[], str]) -> None:
    from huggingface_hub import constants

    with asked_once():
        assert constants.HF_HUB_OFFLINE is False
    why = away()
    with asked_once():
        with asked_once():
            assert constants.HF_HUB_OFFLINE is True
        assert constants.HF_HUB_OFFLINE is True
        assert str(unreachable()).startswith(f"at {why} (")  # and not that somebody had set it
    assert constants.HF_HUB_OFFLINE is False
    with pytest.raises(ValueError, match="x"), asked_once():
        raise ValueError("x")
    assert constants.HF_HUB_OFFLINE is False


def test_threads_that_begin_together_ask_once(away: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of them takes what another has set for the user's setting."""
    from huggingface_hub import constants

    monkeypatch.setattr(_hub, "_AWAY_FOR", 60.0)
    why, begin = f"at {away()} (", threading.Barrier(8)

    def several(_: int) -> set[str | None]:
        begin.wait()
        said = set()
        for _ in range(50):
            said.add(unreachable())
            with asked_once():
                assert constants.HF_HUB_OFFLINE is True
        return said

    with ThreadPoolExecutor(8) as pool:
        (said,) = set().union(*pool.map(several, range(8)))
    assert str(said).startswith(why)
    assert constants.HF_HUB_OFFLINE is False


def test_a_push(away: Callable[[], str], tmp_path: Path) -> None:
    """What is in the cache is of no use to it."""
    SAE(4, 8, ReLU()).save(tmp_path / "sae")
    address = away()
    for name in ("me/saes", "saes"):
        with pytest.raises(
            UnweaveError, match=rf"^nothing was pushed: the .* Hub cannot be reached at {address} \([^;]*\)\.$"
        ):
            push(tmp_path / "sae", name)


def test_a_setting_of_the_user_s(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with asked_once():
        pass
    assert constants.HF_HUB_OFFLINE is True
    assert hub.requests == []
    with pytest.raises(UnweaveError, match=rf"cannot be reached at {hub.url} \(HF_HUB_OFFLINE is set\); nothing of"):
        SAE.from_pretrained("nosuch/repo")


def test_what_answers_is_asked_once_a_minute(hub: Any) -> None:
    for _ in range(3):
        assert unreachable() is None
    assert hub.requests == ["HEAD /"]
    _hub._answers[hub.url] = time.monotonic() - 1, None
    assert unreachable() is None
    assert hub.requests == 2 * ["HEAD /"]


def test_a_file_that_is_known_to_be_missing(hub: Any, away: Callable[[], str]) -> None:
    """What the Hub said of a file that may be missing holds without a network."""
    from unweave.hub.download import fetch
    from unweave.hub.repo import Repo

    hub.add("me/saes", {"a": b"a"})
    folder = fetch(Repo("me/saes"), ["a"], ["b"])
    away()
    assert fetch(Repo("me/saes"), ["a"], ["b"]) == folder
    with pytest.raises(UnweaveError, match=r"'c' of the repository 'me/saes' cannot be reached .* in the cache are of"):
        fetch(Repo("me/saes"), ["a"], ["c"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", JB, JB_ID], rf"'{JB_REPO}' cannot be reached at {REFUSED} \(.*nothing of '{JB_REPO}' is in the"),
        (["train", "--data", "me/nosuch", "--dry-run"], rf"'me/nosuch' is no local .* cannot be reached at {REFUSED} "),
    ],
    ids=["info", "data"],
)
def test_commands(hub: Any, tmp_path: Path, arguments: list[str], said: str) -> None:
    """In a process with the pauses that huggingface_hub makes, which would take it half a minute and more."""
    done = subprocess.run(
        [sys.executable, "-m", "unweave", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"HF_ENDPOINT": REFUSED},
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.search(said, line)
