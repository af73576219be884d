"""Rows of a token folder in a seeded order, which is a function of the seed and the epoch alone.

Blocks of 64 rows are permuted, so that what is read from disk lies together, and the rows of each 256 blocks are
permuted among each other. Going to a position costs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int64

from unweave.activations.tokenized.folder import TokenFolder
from unweave.activations.tokenized.format import Side

BLOCK_ROWS = 64
WINDOW_BLOCKS = 256


class RowReader:
    """Reads one side of a token folder, epoch after epoch.

    Args:
        folder: What to read.
        side: "train" or "held_out".
        seed: Of the order.
    """

    epoch: int
    _window: int
    _row: int

    def __init__(self, folder: TokenFolder, side: Side, *, seed: int) -> None:
        self._folder, self._side, self._seed = folder, side, seed
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.load_state_dict({"epoch": epoch, "window": 0, "row": 0})

    def take(self, n: int) -> tuple[Int64[np.ndarray, "m context"], Int64[np.ndarray, "m context"]]:
        """The next `n` rows and their documents; fewer at the end of a window, and none at the end of the epoch."""
        window = self._rows_of(self._window)
        if self._row == len(window):
            self._window, self._row = self._window + 1, 0
            window = self._rows_of(self._window)
        rows = window[self._row : self._row + n]
        self._row += len(rows)
        return self._folder.take(self._side, rows)

    def state_dict(self) -> dict[str, Any]:
        """Position, as plain numbers."""
        return {"epoch": self.epoch, "window": self._window, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        self.epoch, self._window, self._row = state["epoch"], state["window"], state["row"]
        n_blocks = -(-self._folder.n_rows(self._side) // BLOCK_ROWS)
        self._blocks = np.random.default_rng([self._seed, self.epoch, 0]).permutation(n_blocks)
        self._open = -1, np.empty(0, dtype=np.int64)

    def _rows_of(self, window: int) -> Int64[np.ndarray, " m"]:
        """The rows of a window, in their order; none behind the last window."""
        if self._open[0] != window:
            blocks = self._blocks[window * WINDOW_BLOCKS : (window + 1) * WINDOW_BLOCKS]
            rows = (blocks[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).ravel()
            rows = rows[rows < self._folder.n_rows(self._side)]  # the last block may be shorter
            self._open = window, np.random.default_rng([self._seed, self.epoch, window + 1]).permutation(rows)
        return self._open[1]
