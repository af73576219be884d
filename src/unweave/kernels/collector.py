"""Candidates of a selection, which the C++ kernels hold between the products and the selection that is made of them."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from unweave.kernels import cpu
from unweave.kernels.scratch import LIKE_W_DEC, scratch_if_small
from unweave.kernels.select import Selection

_TILE = 32  # latents of a tile, which has four int8 numbers of each, and so on: csrc/product.h


class Collector:
    """Candidates of some rows, gathered tile by tile (csrc/select.h) or while products are made (csrc/fused.h)."""

    def __init__(self, n: int) -> None:
        self.n, self._handle = n, cpu.call("collector", n)

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *exception: object) -> None:
        cpu.call("discard", self._handle)

    def not_finite(self) -> int:
        """The first row with a pre-activation that is NaN or infinite; -1 if there is none."""
        return int(cpu.call("not_finite", self._handle))

    def certain(self) -> int:
        """How many entries are above their bounds whatever the rounding of the product."""
        return int(cpu.call("certain", self._handle))

    def _scan(self, what: str, tile: Tensor, first: int, screen: ctypes.Structure, *rest: Any) -> None:
        kind = (torch.float32, torch.bfloat16, torch.int32).index(tile.dtype)
        cpu.call(f"scan_{what}", self._handle, tile, kind, tile.shape[1], first, screen, *rest)

    def scan_topk(
        self, tile: Tensor, first: int, screen: ctypes.Structure, k: int, magnitude: bool, guess: float
    ) -> None:
        self._scan("topk", tile, first, screen, k, magnitude, guess)

    def scan_above(self, tile: Tensor, first: int, screen: ctypes.Structure, bounds: Tensor) -> None:
        self._scan("above", tile, first, screen, bounds)

    def scan_groups(self, tile: Tensor, first: int, screen: ctypes.Structure, size: int) -> None:
        self._scan("groups", tile, first, screen, size)

    def pick(self, what: str, latents: range, d: int, screen: ctypes.Structure, *rest: Any) -> None:
        """Make int8 products with some latents (for "topk" and "groups" all) and look at them at once."""
        packed = scratch_if_small(LIKE_W_DEC, (-(-len(latents) // _TILE), -(-d // 4), _TILE), torch.int32)
        cpu.call(f"pick_{what}", self._handle, latents.start, len(latents), d, screen, packed, *rest)

    def finish_topk(
        self, x: Tensor, weight: Tensor, screen: ctypes.Structure, k: int, magnitude: bool, guess: bool
    ) -> Selection:
        """The selection; rows whose guessed floor was too high have indices of -1."""
        indices, values = x.new_full((self.n * k,), -1, dtype=torch.int64), x.new_empty(self.n * k)
        cpu.call("finish_topk", self._handle, x, weight, *weight.shape, screen, k, magnitude, guess, indices, values)
        return Selection(indices.new_full((self.n,), k), indices, values)

    def finish_groups(self, x: Tensor, weight: Tensor, screen: ctypes.Structure, groups: int, size: int) -> Selection:
        indices, values = x.new_empty(self.n * groups, dtype=torch.int64), x.new_empty(self.n * groups)
        cpu.call("finish_groups", self._handle, x, weight, weight.shape[1], screen, groups, size, indices, values)
        return Selection(indices.new_full((self.n,), groups), indices, values)

    def finish_above(self, x: Tensor, weight: Tensor, screen: ctypes.Structure, bounds: Tensor) -> Selection:
        counts = x.new_empty(self.n, dtype=torch.int64)
        cpu.call("finish_above", self._handle, x, weight, *weight.shape, screen, bounds, counts)
        total = int(counts.sum())
        indices, values = x.new_empty(total, dtype=torch.int64), x.new_empty(total)
        cpu.call("take", self._handle, indices, values)
        return Selection(counts, indices, values)
