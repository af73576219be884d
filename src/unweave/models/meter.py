"""What computing something takes: memory, counted from the tensors that it makes, and time."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from statistics import median_low
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Meter(TorchDispatchMode):
    """Within the block, counts the bytes of the tensors that PyTorch makes in this thread, on any device.

    What a single operation uses while it runs, and what is allocated outside of PyTorch, is not seen.

    Attributes:
        largest: Bytes of the largest tensor.
        peak: Bytes of the tensors that lived at the same time, at most.
        live: Bytes of the tensors that live still.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = self.live = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in before and storage._cdata not in self._known:
                self._born(storage)
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known[key] = size
        self.live += size
        self.largest, self.peak = max(self.largest, size), max(self.peak, self.live)
        weakref.finalize(storage, self._died, key).atexit = False

    def _died(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


def typical_seconds(run: Callable[[], Any], times: int = 3, seconds: float = 0.0) -> float:
    """Median of the seconds that a call takes, the lower one of two: one slow moment of the machine counts for nothing.

    Args:
        run: What is called; it waits for what it has begun.
        times: How often, at least.
        seconds: How long, at least.
    """
    began, taken = time.perf_counter(), list[float]()
    while len(taken) < times or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return median_low(taken)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Of the tensors in a tree; opaque ones, such as packed weights, show none."""
    tensors = (value for value in tree_iter(values) if isinstance(value, Tensor))
    return (tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided)
