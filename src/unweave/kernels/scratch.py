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
    wanted = _bytes_of(shape, dtype)
    if wanted > _held(name):
        forget(name)  # before there is more
        _pool.buffers[name] = torch.empty(wanted, dtype=torch.uint8, device="cpu")
    return _pool.buffers[name][:wanted].view(dtype).view(shape)


def scratch_if_small(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """`scratch` for what outlasts no call: above 64 MiB, memory that is there is used, but none is kept for later."""
    if _bytes_of(shape, dtype) > max(_held(name), _LARGEST_KEPT):
        return torch.empty(shape, dtype=dtype, device="cpu")
    return scratch(name, shape, dtype)


def scratch_like(x: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """`scratch` on the device of `x`; on a GPU, whose memory PyTorch keeps, a fresh tensor."""
    if x.device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=x.device)
    return scratch(name, shape, dtype)


def _bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _held(name: str) -> int:
    return len(_pool.buffers[name]) if name in _pool.buffers else -1


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
