"""Which network is this? A hash of its parameters that is quick to take and the same on every machine."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from unweave._errors import UnweaveError

SAMPLE = 1024
"""Numbers that are looked at in each parameter, spread evenly over it."""


def model_fingerprint(module: nn.Module) -> str:
    """BLAKE2b, 128 bits, of the names, shapes, types and a sample of the values of all parameters and buffers.

    Training, merging or quantising a network changes nearly all numbers of the matrices concerned, so a sample of each
    tells networks apart; an edit of single numbers may pass unnoticed. The device does not matter.

    Raises:
        UnweaveError: Parameters that hold no values (on the meta device).
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):
            continue
        if value.is_meta:
            raise UnweaveError(f"the parameter {name!r} holds no values (it is on the meta device).")
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(_sample(value.detach()))
    return digest.hexdigest()


def _sample(value: Tensor) -> bytes:
    flat = value.reshape(-1)
    if len(flat) > SAMPLE:
        flat = flat[torch.linspace(0, len(flat) - 1, SAMPLE, dtype=torch.float64).round().long().to(flat.device)]
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()
