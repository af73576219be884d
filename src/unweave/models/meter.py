"""The memory that computing something takes, counted from the tensors that it makes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
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
        before = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
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
