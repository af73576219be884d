"""Memory that is used again at every step.

A fresh tensor's pages are handed out by the operating system one by one as they are first touched, which costs more
than most of what a step does with them.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_LARGEST_KEPT = 64 << 20
LIKE_W_ENC, LIKE_W_DEC = "as large as W_enc", "as large as W_dec"
"""Names of memory for what has a row for each latent: first what a product takes of an encoder, then, once the product
is made, the gradients of a step."""


class _Pool(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}


_pool = _Pool()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A CPU tensor with arbitrary values. The next call with the same name, on the same thread, gives the same memory.

    Args:
        name: Of the use; two tensors that are needed at once have two names.
        shape: Of the tensor.
        dtype: Of the tensor.
    """
    wanted = torch.Size(shape).numel() * dtype.itemsize
    buffer = _pool.buffers.get(name)
    if buffer is None or len(buffer) < wanted:
        buffer = _pool.buffers[name] = torch.empty(wanted, dtype=torch.uint8, device="cpu")
    return buffer[:wanted].view(dtype).view(shape)


def scratch_if_small(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """`scratch` for what outlasts no call; above 64 MiB, fresh memory that is given back after it."""
    if torch.Size(shape).numel() * dtype.itemsize > _LARGEST_KEPT:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return scratch(name, shape, dtype)


def forget(*names: str) -> None:
    """Give back this thread's memory of some uses; where they come again, it is allocated anew."""
    for name in names:
        _pool.buffers.pop(name, None)


def scratch_sizes() -> dict[str, int]:
    """Bytes that `scratch` holds for this thread, by name; where more is needed, it is allocated anew."""
    return {name: len(buffer) for name, buffer in _pool.buffers.items()}


def scratch_bytes() -> int:
    """Bytes that `scratch` holds for this thread."""
    return sum(scratch_sizes().values())
