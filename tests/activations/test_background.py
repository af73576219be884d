from __future__ import annotations

import gc
import math
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations import ActivationStream, Background, DataConfig, ShuffledBatches, TokenRows
from unweave.models import Hook, LoadedModel

TEXTS = [f"<{i}>" + "word " * (i % 7) for i in range(200)]


@pytest.fixture
def make(model: LoadedModel, hooks: list[Hook]) -> Callable[..., ActivationStream]:
    def stream(*, repeat: bool = False) -> ActivationStream:
        rows = TokenRows(TEXTS, model.tokenizer, DataConfig(context=8), held_out=False, repeat=repeat)
        return ActivationStream(model, hooks, rows, prompts_per_pass=5)

    return stream


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "unweave-harvest"]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_passes_are_those_of_the_stream(make: Callable[..., ActivationStream]) -> None:
    plain = make()
    passes = [plain.next_pass() for _ in range(20)]
    rest = list(plain)
    assert len(rest) > 5
    with Background(make()) as ahead:
        for expected in passes:
            got = ahead.next_pass()
            assert_same(got.activations, expected.activations)
            assert_same(got.records, expected.records)
        for activations in rest:
            assert_same(next(ahead), activations)
        for _ in range(2):  # an end stays an end
            with pytest.raises(StopIteration):
                next(ahead)
    assert ahead.stream.report == plain.report


def test_it_runs_ahead_and_not_farther(make: Callable[..., ActivationStream]) -> None:
    with Background(make(repeat=True), ahead=3) as ahead:
        next(ahead)
        deadline = time.monotonic() + 10
        while ahead.stream.passes < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert ahead.stream.passes == 4


@pytest.mark.parametrize("resumed_with", [True, False])
@pytest.mark.parametrize("saved_with", [True, False])
def test_pitfall_179_a_state_with_passes_in_flight_is_exact(
    make: Callable[..., ActivationStream], saved_with: bool, resumed_with: bool
) -> None:
    whole = ShuffledBatches(make(repeat=True), 64, 300, seed=1)
    expected = [next(whole) for _ in range(40)]

    first: Any = Background(make(repeat=True)) if saved_with else make(repeat=True)
    batches = ShuffledBatches(first, 64, 300, seed=1)
    for _ in range(17):
        next(batches)
    if saved_with:
        while not first._worker.ready:
            time.sleep(0.001)
    state = batches.state_dict()
    assert bool(state["stream"]["ready"]) == saved_with
    if saved_with:  # saving does not disturb it
        assert_same(next(batches), expected[17])
        first.close()

    second: Any = Background(make(repeat=True)) if resumed_with else make(repeat=True)
    resumed = ShuffledBatches(second, 64, 300, seed=1)
    resumed.load_state_dict(state)
    for batch in expected[17:]:
        assert_same(next(resumed), batch)
    if resumed_with:
        second.close()


def test_a_state_may_be_loaded_while_the_thread_runs(make: Callable[..., ActivationStream]) -> None:
    with Background(make(repeat=True)) as ahead:
        state = ahead.state_dict()
        expected = [next(ahead) for _ in range(10)]
        ahead.load_state_dict(state)
        for batch in expected:
            assert_same(next(ahead), batch)


def test_an_error_is_raised_where_its_pass_would_have_come(make: Callable[..., ActivationStream], speller: Any) -> None:
    plain = make()
    good = [next(plain) for _ in range(3)]
    with Background(make()) as ahead:
        original = speller.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if ahead.stream.passes == 3:
                speller.special = dict.fromkeys(range(256), math.nan)
            return original(*args, **kwargs)

        speller.forward = forward
        for expected in good:
            assert_same(next(ahead), expected)
        for _ in range(2):
            with pytest.raises(UnweaveError, match=r"activations at hook h\.1 are NaN or infinite in pass 4"):
                next(ahead)


def test_pitfall_221_closing_leaves_a_pass_at_once(make: Callable[..., ActivationStream], speller: Any) -> None:
    layer = speller.h[1]
    started = threading.Event()
    original = speller.forward

    def slow(*args: Any, **kwargs: Any) -> Tensor:
        started.set()
        for _ in range(1000):  # a hundred seconds of layers
            time.sleep(0.1)
            layer(torch.zeros(1))
        return original(*args, **kwargs)

    ahead = Background(make())
    thread_error: list[BaseException] = []

    def read() -> None:
        try:
            next(ahead)
        except BaseException as error:
            thread_error.append(error)

    speller.forward = slow
    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(10)
    before = time.monotonic()
    ahead.close()
    reader.join(5)
    assert time.monotonic() - before < 1
    assert not reader.is_alive()
    assert isinstance(thread_error[0], RuntimeError)
    with pytest.raises(RuntimeError, match="closed"):
        next(ahead)
    assert not speller._forward_pre_hooks
    assert not layer._forward_pre_hooks


def test_forgetting_it_stops_its_thread(make: Callable[..., ActivationStream]) -> None:
    ahead = Background(make(repeat=True))
    next(ahead)
    thread, gone = ahead._thread, weakref.ref(ahead)
    del ahead
    gc.collect()
    assert gone() is None
    assert thread is not None
    assert not thread.is_alive()


PROGRAM = """
import signal, sys, threading, time, torch
from unweave.activations import ActivationStream, Background, DataConfig, MaskConfig, TokenRows
from unweave.models import Hook, LoadedModel

class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.never = torch.nn.Identity(), torch.nn.Identity()
    def forward(self, ids):
        print("running", flush=True)
        for _ in range(600):
            time.sleep(0.05)
            self.layer(torch.zeros(1))

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
ids = torch.zeros(64, 8, dtype=torch.int64).numpy()
rows = TokenRows(ids, None, DataConfig(context=8, bos=False, held_out=0), held_out=False)
ahead = Background(ActivationStream(LoadedModel(Slow(), None, "slow"), [Hook("never")], rows, prompts_per_pass=2))
next(ahead)
"""


def test_ctrl_c_ends_a_program_that_waits_for_a_pass() -> None:
    command = [sys.executable, "-c", PROGRAM]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - before < 5  # of which most is Python's own end under load
    assert "KeyboardInterrupt" in errors
    assert "terminate called" not in errors
