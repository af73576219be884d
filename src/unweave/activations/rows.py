"""What a model is run on: rows of tokens, or images. Everything behind the model sees them through this interface."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


class Batch(Protocol):
    """Some rows, each with the same number of positions. A position is a token of text or a token of an image."""

    @property
    def real(self) -> Bool[Tensor, "n positions"]:
        """False on padding."""
        ...

    @property
    def documents(self) -> Int64[Tensor, "n positions"]:
        """Running number of the document or image that each position belongs to, -1 on padding."""
        ...

    def __len__(self) -> int: ...

    def inputs(self, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        """The model's first argument, and those that it is given by name."""
        ...

    def records(self) -> dict[str, Tensor]:
        """What is known of each position, as `(n, positions)`: "positions" and "documents", and what else there is."""
        ...


class Rows(Protocol):
    """Rows that can be read on from where they are, looked at ahead, and resumed."""

    @property
    def context(self) -> int:
        """Positions in a row."""
        ...

    def next_rows(self, n: int) -> Batch: ...
    def peek(self, n: int) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
