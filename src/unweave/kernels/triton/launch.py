"""What every wrapper does: check its arguments, cut a row into tiles, start a kernel."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from unweave._errors import UnweaveError

FLOAT_OR_BF16 = (torch.float32, torch.bfloat16)


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Arguments:
    """Checks the tensors of one call: dtypes, one device, and shapes whose sizes carry the same name.

    Args:
        operation: Name of the operation, for messages.
    """

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.sizes: dict[str, int] = {}
        self._first: tuple[str, torch.device] | None = None

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise UnweaveError(f"{self.operation}: {problem}")

    def take(
        self, name: str, tensor: Tensor, shape: str, *dtypes: torch.dtype, in_place: bool = False, gaps: bool = False
    ) -> Tensor:
        """The checked tensor, contiguous.

        Args:
            name: The argument's name.
            tensor: The argument.
            shape: Names of its sizes, such as `n+1 d`. A new name takes the size that the tensor has.
            dtypes: What it may consist of.
            in_place: Whether the kernel writes to it, so that a copy will not do.
            gaps: Whether there may be gaps between its rows.

        Raises:
            UnweaveError: If anything does not fit.
        """
        actual, *allowed = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
        self.require(actual in allowed, f"{name} must be {' or '.join(allowed)}, got {actual}.")
        if self._first is None:
            fits = tensor.device.type == "cuda" or (interpreted() and tensor.device.type == "cpu")
            self.require(fits, f"{name} is on {tensor.device}, but this kernel runs on CUDA devices.")
            self._first = (name, tensor.device)
        first, device = self._first
        self.require(tensor.device == device, f"{name} is on {tensor.device}, but {first} is on {device}.")
        names = [part.partition("+") for part in shape.split()]
        known = self.sizes
        found = {size: length - int(extra or 0) for (size, _, extra), length in zip(names, tensor.shape, strict=False)}
        self.sizes = found | known
        if tensor.dim() != len(names) or any(self.sizes[size] != found[size] for size in found):
            expected = (
                f"{size}{plus}{extra}" + (f"={known[size] + int(extra or 0)}" if size in known else "")
                for size, plus, extra in names
            )
            self.require(False, f"{name} must have shape ({', '.join(expected)}), got {tuple(tensor.shape)}.")
        if in_place:
            self.require(tensor.is_contiguous(), f"{name} is written in place and must be contiguous.")
        return tensor if gaps and tensor.stride(-1) == 1 else tensor.contiguous()


def tile_width(width: int, widest: int = 1024) -> int:
    """How many columns of a row one program takes at a time: a power of two."""
    return max(16, min(triton.next_power_of_2(width), widest))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """Start a kernel on the device of its first argument."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, num_warps=warps, enable_fp_fusion=True, **constants)
