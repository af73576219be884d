"""Shuffled batches out of a stream of activations.

The ring is filled before the first batch and again before each further one, so every batch is drawn from `capacity`
tokens; at the end of the stream it is drained. Every token is served exactly once. The batches are a function of the
stream and the seed, and a saved state, which holds the ring's contents, goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations.ring import ShuffleRing


class Stream(Protocol):
    """What batches are made of: `ActivationStream`, or anything else that yields aligned rows and can be resumed."""

    @property
    def device(self) -> torch.device: ...
    def __next__(self) -> dict[str, Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ShuffledBatches(Iterator[dict[str, Tensor]]):
    """Iterator of `{hook: (batch_size, d)}` in random order.

    Args:
        stream: Where rows come from.
        batch_size: Tokens per batch.
        capacity: Tokens that the ring holds, at least `batch_size`; the larger, the better mixed.
        seed: Seed of the order.
        drop_last: Leave out a last batch that is shorter than `batch_size`.

    Raises:
        UnweaveError: A batch size below 1, or a ring smaller than one batch.
    """

    def __init__(
        self, stream: Stream, batch_size: int, capacity: int = 131_072, seed: int = 0, *, drop_last: bool = False
    ) -> None:
        if batch_size < 1:
            raise UnweaveError(f"batch_size={batch_size} is less than 1.")
        if capacity < batch_size:
            raise UnweaveError(f"a ring of {capacity} tokens is smaller than one batch of {batch_size}.")
        self.stream, self.batch_size, self.drop_last = stream, batch_size, drop_last
        self.ring = ShuffleRing(capacity, torch.Generator().manual_seed(seed), stream.device)
        self._waiting: dict[str, Tensor] = {}  # the rest of a pass that did not fit into the ring
        self._ended = False

    def __next__(self) -> dict[str, Float[Tensor, "batch_size d"]]:
        self._fill()
        n = min(self.batch_size, self.ring.size)
        if n == 0 or (n < self.batch_size and self.drop_last):
            raise StopIteration
        return self.ring.take(n)

    def peek(self, n: int) -> dict[str, Float[Tensor, "n d"]]:
        """Copies of up to `n` tokens, spread evenly over the filled ring. The batches stay what they are."""
        self._fill()
        return self.ring.peek(n)

    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """The stream's position, the ring's contents, and the rows that wait to enter it.

        Args:
            copy: Whether the ring's contents are a copy. If not, write them down before the next batch.
        """
        parts = {"stream": self.stream.state_dict(), "ring": self.ring.state_dict(copy=copy)}
        return parts | {"waiting": dict(self._waiting), "ended": self._ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved."""
        self.stream.load_state_dict(state["stream"])
        self.ring.load_state_dict(state["ring"])
        self._waiting, self._ended = {name: x.clone() for name, x in state["waiting"].items()}, state["ended"]

    def _fill(self) -> None:
        while self.ring.free:
            if not self._waiting:
                if self._ended:
                    return
                try:
                    self._waiting = next(self.stream)
                except StopIteration:
                    self._ended = True
                    return
            fits = self.ring.free
            self.ring.put({name: x[:fits] for name, x in self._waiting.items()})
            rest = {name: x[fits:] for name, x in self._waiting.items()}
            self._waiting = rest if len(next(iter(rest.values()))) else {}
