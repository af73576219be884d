"""Some images as a vision model takes them, and what is known of each of their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Some images as a model takes them. All have equally many positions, at most the rows' `context`."""

    pixels: dict[str, Tensor]
    """The model's inputs by name, each `(n, ...)`; `pixel_values` is its first argument."""
    real: Bool[Tensor, "n positions"]
    """False on padding."""
    documents: Int64[Tensor, "n positions"]
    """Number of the image, by which `Images.names` and `labels` know it; -1 on padding."""
    kinds: UInt8[Tensor, "n positions"]
    """Kind of each token, as index into `TOKEN_KINDS`."""
    labels: Tensor | None = None
    """Class of each patch (0 on other tokens), unsigned, if it is known."""
    options: tuple[tuple[str, Any], ...] = ()
    """Further arguments of the model."""

    def __len__(self) -> int:
        return len(self.real)

    def inputs(self, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        """The pixels, and what the model takes beside them."""
        placed = {name: value.to(device) for name, value in self.pixels.items()}
        return placed.pop("pixel_values"), placed | dict(self.options)

    def records(self) -> dict[str, Tensor]:
        """Each token's position, image, kind and, where there are masks, class."""
        positions = torch.arange(self.real.shape[1], dtype=torch.int32).expand(self.real.shape)
        known = {"positions": positions, "documents": self.documents, "kinds": self.kinds}
        return known if self.labels is None else known | {"labels": self.labels}

    def rows(self, rows: slice) -> ImageBatch:
        """Some of the images."""
        return ImageBatch(
            {name: value[rows] for name, value in self.pixels.items()}, self.real[rows], self.documents[rows],
            self.kinds[rows], None if self.labels is None else self.labels[rows], self.options,
        )  # fmt: skip
