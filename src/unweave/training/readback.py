"""Numbers that a GPU computes at one step and its host reads two steps later, without a wait.

A GPU works behind its host, which loses its lead whenever it needs a number that is not computed yet. What later steps
are to know of a step (the norm of its gradient, how many latents are dead, how dense its codes were) therefore arrives
late, and always equally late, so that a run does not depend on how fast its device is.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.kernels.dispatch import backend

LAG = 2
"""Steps after which the host reads what a step left; the GPU is done with that step by then, and busy with the next."""


class _Pending(NamedTuple):
    step: int
    numbers: Tensor
    """On the host; valid once `arrived`."""
    arrived: torch.cuda.Event | None


class Readback:
    """The numbers of the last few steps, on their way to the host."""

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()

    def push(self, step: int, numbers: Float[Tensor, " k"]) -> tuple[int, list[float]] | None:
        """Send for the numbers of a step, and get those of `LAG` steps before with their step, if there are any."""
        arrived = None
        if numbers.device.type == "cuda":
            stream = torch.cuda.current_stream(numbers.device)  # which need not be the current device
            there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = there.copy_(numbers, non_blocking=True)
            arrived = stream.record_event()
        self._pending.append(_Pending(step, numbers, arrived))
        return _read(self._pending.popleft()) if len(self._pending) > LAG else None

    def state(self) -> list[tuple[int, list[float]]]:
        """All that is on its way; the host waits for it."""
        return [_read(pending) for pending in self._pending]

    def restore(self, state: list[tuple[int, list[float]]]) -> None:
        """Continue from what `state` returned."""
        self._pending = deque(_Pending(step, torch.tensor(numbers), None) for step, numbers in state)


def _read(pending: _Pending) -> tuple[int, list[float]]:
    if pending.arrived is not None:
        pending.arrived.synchronize()
    return pending.step, pending.numbers.tolist()


def runs_behind(tensor: Tensor) -> bool:
    """Whether the device of a tensor works behind its host."""
    return tensor.device.type == "cuda" or backend("training step", tensor) == "cuda"  # or does as if, interpreted
