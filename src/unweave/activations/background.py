"""A stream that runs ahead of whoever reads it, in a thread of its own and on CUDA streams of its own.

What it yields is what the stream yields, pass by pass. A saved state holds the passes that were run and not handed out,
so a run goes on bit for bit, with a thread or without one. A thread pays where the model runs on a GPU: tokenising,
launching and copying then happen beside the training step. On a CPU both want the same cores and nothing is gained.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from unweave.activations.live import ActivationStream, Pass
from unweave.models.lean import sees_nothing


class Background(Iterator[dict[str, Tensor]]):
    """Runs the passes of a stream ahead. Close it when done, or use it as a context manager.

    While it is open the stream must not be used otherwise, and neither must the stream's model, unless it runs in a
    copy (`dtype`). What goes wrong in the thread is raised where the pass would have been handed out.

    Args:
        stream: What to run ahead; the thread starts with the first pass that is asked for.
        ahead: Passes to hold ready.
    """

    def __init__(self, stream: ActivationStream, ahead: int = 2) -> None:
        self.stream = stream
        self._worker = _Worker(stream, ahead)
        self._thread: threading.Thread | None = None
        self._close = weakref.finalize(self, self._worker.stop)  # also when it is forgotten, and when Python ends

    @property
    def device(self) -> torch.device:
        """Where the activations are."""
        return self.stream.device

    def __next__(self) -> dict[str, Tensor]:
        return self.next_pass().activations

    def next_pass(self) -> Pass:
        """The next pass; as `ActivationStream.next_pass`.

        Raises:
            RuntimeError: It is closed.
        """
        if self._thread is None and self._close.alive:
            self._thread = threading.Thread(target=self._worker.run, name="unweave-harvest", daemon=True)
            self._worker.thread = self._thread
            self._thread.start()
        return self._worker.take()

    def state_dict(self) -> dict[str, Any]:
        """The stream's state, with the passes that are ready; waits for the pass that is being run."""
        with self._worker.between_passes:
            state = self.stream.state_dict()
            ready = [{"activations": p.activations, "records": p.records} for p, _ in self._worker.ready]
            return {**state, "ready": [*ready, *state["ready"]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved."""
        with self._worker.between_passes:
            self._worker.forget()
            self.stream.load_state_dict(state)

    def close(self) -> None:
        """Stop the thread, in the middle of a pass if need be. The stream's position is then undefined."""
        self._close()

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Worker:
    """What the thread runs and shares with its reader. It knows nothing of `Background`, which can so be collected."""

    def __init__(self, stream: ActivationStream, ahead: int) -> None:
        self.stream, self.ahead = stream, ahead
        self.ready: deque[tuple[Pass, torch.cuda.Event | None]] = deque()
        self.between_passes = threading.Lock()
        """Held while a pass is run and put with the ready ones."""
        self.thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._stopped = threading.Event()

    def run(self) -> None:
        lane: torch.cuda.Stream | None = None
        with ExitStack() as stack:
            if self.stream.model.device.type == "cuda":
                lane = torch.cuda.Stream(self.stream.model.device)
                stack.enter_context(torch.cuda.stream(lane))
            while self._wait_for_room():
                with self.between_passes:
                    if not self._has_room():  # a state was loaded meanwhile
                        continue
                    try:
                        done = self._pass()
                    except _Stopped:
                        return
                    except BaseException as error:
                        self._put(None, error)
                        continue
                    event = None
                    if lane is not None:
                        (event := torch.cuda.Event()).record(lane)
                    self._put((done, event))

    def take(self) -> Pass:
        """The oldest pass, once there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self.ready or self._error is not None or self._stopped.is_set())
            if self._stopped.is_set():
                raise RuntimeError("the background stream is closed")
            if not self.ready:
                assert self._error is not None
                raise self._error
            done, event = self.ready.popleft()
            self._changed.notify_all()
        if event is not None:
            for x in done.activations.values():
                if x.is_cuda:
                    current = torch.cuda.current_stream(x.device)
                    current.wait_event(event)
                    x.record_stream(current)  # its memory is not given away before this reader is done with it
        return done

    def forget(self) -> None:
        """Drop what is ready; between passes only."""
        with self._changed:
            self.ready.clear()
            self._error = None
            self._changed.notify_all()

    def stop(self) -> None:
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()

    def _pass(self) -> Pass:
        self.stream.prepare()
        handles = [m.register_forward_pre_hook(self._leave) for m in self.stream.model.module.modules()]
        try:
            return self.stream.next_pass()
        finally:
            for handle in handles:
                handle.remove()

    @sees_nothing
    def _leave(self, module: nn.Module, args: Any) -> None:
        if self._stopped.is_set() and threading.current_thread() is self.thread:
            raise _Stopped

    def _has_room(self) -> bool:
        return len(self.ready) < self.ahead and self._error is None

    def _wait_for_room(self) -> bool:
        """True once a pass may be run, False once there is to be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped.is_set() or self._has_room())
            return not self._stopped.is_set()

    def _put(self, done: tuple[Pass, torch.cuda.Event | None] | None, error: BaseException | None = None) -> None:
        with self._changed:
            self._error = error
            if done is not None:
                self.ready.append(done)
            self._changed.notify_all()


class _Stopped(BaseException):
    """Leaves a forward pass that nobody waits for any more."""
