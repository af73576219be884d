"""The back-ends that a machine without a GPU has: the reference, and each instruction set of the compiled kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from unweave.kernels import cpu, dispatch, library

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # that there is no library; the reference is tested all the same
    _library = library.load()

TARGETS = [] if _library is None else library.targets(_library)


def _use(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if name == "reference":
        monkeypatch.setenv(dispatch.VARIABLE, "reference")
        yield name
    else:
        monkeypatch.setenv(dispatch.VARIABLE, "cpu")
        with cpu.forced_target(name):
            yield name


@pytest.fixture(params=["reference", *TARGETS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every operation of the test runs on one back-end; the test is repeated for each."""
    yield from _use(request.param, monkeypatch)


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same for the compiled kernels only."""
    yield from _use(request.param, monkeypatch)
