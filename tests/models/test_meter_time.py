"""How long something takes, on a machine that is not always as fast."""

import sys

import pytest

from unweave.models.meter import typical_seconds

METER = sys.modules["unweave.models.meter"]


@pytest.mark.parametrize(
    ("taken", "times", "expected"), [([1, 1, 50], 3, 1), ([50, 1, 1, 2, 1], 5, 1), ([50, 1], 2, 1), ([3], 1, 3)]
)
def test_one_slow_moment_counts_for_nothing(
    monkeypatch: pytest.MonkeyPatch, taken: list[int], times: int, expected: int
) -> None:
    now, calls = 0.0, iter(taken)

    def run() -> None:
        nonlocal now
        now += next(calls)

    monkeypatch.setattr(METER.time, "perf_counter", lambda: now)
    assert typical_seconds(run, times) == expected
    assert next(calls, None) is None


def test_it_goes_on_for_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def run() -> None:
        nonlocal now
        now += 1.0

    monkeypatch.setattr(METER.time, "perf_counter", lambda: now)
    assert typical_seconds(run, 1, seconds=7) == 1
    assert now == 7
