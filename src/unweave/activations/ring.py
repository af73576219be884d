"""A preallocated buffer that is filled in order and emptied at random.

The valid rows are always the first `size` ones. Taking rows draws them without replacement, and rows from the end
move into the gaps: what is copied is the rows that leave and at most as many that move, never the buffer. All hooks
share one set of indices, so their rows stay aligned. The order is a function of the generator alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor


class ShuffleRing:
    """Holds up to `capacity` rows per hook, in the type of the first rows put in.

    Args:
        capacity: Rows to hold.
        generator: Generator on the CPU that draws the rows.
        device: Where to hold them.
    """

    def __init__(self, capacity: int, generator: torch.Generator, device: torch.device | str = "cpu") -> None:
        self.capacity, self.size = capacity, 0
        self._generator, self._device = generator, device
        self._buffers: dict[str, Tensor] = {}
        self._owner = np.empty(capacity, np.int32)

    @property
    def free(self) -> int:
        """Rows that can still be put in."""
        return self.capacity - self.size

    @property
    def nbytes(self) -> int:
        """Bytes allocated; 0 before the first rows."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def put(self, rows: Mapping[str, Float[Tensor, "n d"]]) -> None:
        """Copy rows in, the same number for each hook.

        Raises:
            ValueError: More rows than are free, other hooks than before, or unequal numbers of rows.
        """
        n = len(next(iter(rows.values())))
        if n > self.free or any(len(x) != n for x in rows.values()):
            raise ValueError(f"cannot put {[len(x) for x in rows.values()]} rows where {self.free} are free")
        if not self._buffers:
            self._buffers = {
                name: x.new_empty(self.capacity, *x.shape[1:], device=self._device) for name, x in rows.items()
            }
        if self._buffers.keys() != rows.keys():
            raise ValueError(f"the ring holds {sorted(self._buffers)}, not {sorted(rows)}")
        for name, x in rows.items():
            self._buffers[name][self.size : self.size + n] = x
        self.size += n

    def take(self, n: int) -> dict[str, Float[Tensor, "n d"]]:
        """Remove `n` rows drawn uniformly without replacement, and return them in random order.

        Raises:
            ValueError: Fewer than `n` rows are held.
        """
        if n > self.size:
            raise ValueError(f"cannot take {n} of {self.size} rows")
        drawn = _draw(n, self.size, self._generator, self._owner)
        left = self.size - n
        stays = torch.ones(n, dtype=torch.bool)
        stays[drawn[drawn >= left] - left] = False
        gaps, movers = drawn[drawn < left], stays.nonzero().squeeze(1) + left
        taken = {}
        for name, buffer in self._buffers.items():
            taken[name] = buffer.index_select(0, drawn.to(self._device))
            buffer.index_copy_(0, gaps.to(self._device), buffer.index_select(0, movers.to(self._device)))
        self.size = left
        return taken

    def peek(self, n: int) -> dict[str, Float[Tensor, "n d"]]:
        """Copies of up to `n` rows, spread evenly over those that are held; nothing is drawn or removed."""
        chosen = torch.linspace(0, self.size - 1, min(n, self.size), dtype=torch.float64).round().long()
        return {name: buffer.index_select(0, chosen.to(self._device)) for name, buffer in self._buffers.items()}

    def state_dict(self, *, copy: bool = True) -> dict[str, Any]:
        """The valid rows, and the generator's state.

        Args:
            copy: Whether the rows are copies. If not, the next `put` or `take` writes to them.
        """
        rows = {name: buffer[: self.size] for name, buffer in self._buffers.items()}
        rows = {name: x.clone() for name, x in rows.items()} if copy else rows
        return {"rows": rows, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold exactly what was held when `state` was saved."""
        self.size = 0
        if state["rows"]:
            self.put(state["rows"])
        self._generator.set_state(state["generator"].cpu())


def _draw(n: int, size: int, generator: torch.Generator, owner: NDArray[np.int32]) -> Int64[Tensor, " n"]:
    """`n` different numbers below `size`, in random order; its cost does not grow with `size`.

    `owner` has room for `size` numbers, which need not be set: whoever drew a number first writes its place there.
    """
    if 4 * n > size:
        return torch.randperm(size, generator=generator)[:n]
    drawn = np.empty(0, np.int64)
    while (missing := n - len(drawn)) > 0:  # numbers one after the other, without those that were there before
        more = torch.randint(size, (missing + missing // 4 + 8,), generator=generator)
        drawn = np.concatenate([drawn, more.numpy()])
        place = np.arange(len(drawn), dtype=np.int32)
        owner[drawn[::-1]] = place[::-1]  # of equal numbers the last one that is written stays: the first one drawn
        drawn = drawn[owner[drawn] == place]
    return torch.from_numpy(drawn[:n])
