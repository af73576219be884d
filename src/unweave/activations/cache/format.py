"""The cache on disk; docs/caching.md describes it byte by byte.

    manifest.json             what produced the cache, its shapes, and every file with its size and checksum
    tokens/                   the rows that were run, as a token folder; missing for images
    images.json               of images: name and class of each, by the number in documents.npy
    train_00000/              a shard: some rows at every hook, aligned
        shard.json            its rows and files; a shard without it does not exist
        HOOK.npy              (rows, d) in the type of the cache; bfloat16 as the uint16 of its bits
        HOOK.scale.npy        (rows,) float32, for int8: what a row is multiplied by
        HOOK.norms.npy        (rows,) float32, the length of each activation
        positions.npy, documents.npy, token_ids.npy, ...    (rows,) what is known of each row
    held_out_00000/ ...       the same for held-out documents
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unweave._errors import UnweaveError, nearest
from unweave.activations.tokenized.format import CHECKSUM_BYTES

FORMAT, VERSION = "unweave-cache", 1
MANIFEST, SHARD, TOKENS, IMAGES = "manifest.json", "shard.json", "tokens", "images.json"
HEADER_BYTES = 128
NAMED = ("model", "tokenizer", "data")
"""What a cache is made from that has a name besides a fingerprint."""
MADE_FROM = (
    "model", "hooks", "dtype", "model_precision", "positions", "tokens", "prompts_per_pass", "shard_bytes", "rows",
    "tokenizer", "data", "config",
)  # fmt: skip
"""What every manifest says that a cache was made from."""

# Names of the types of a cache, how numpy writes them, and as what PyTorch reads them.
DTYPES = {"float32": ("<f4", torch.float32), "bfloat16": ("<u2", torch.bfloat16), "float16": ("<f2", torch.float16),
          "int8": ("|i1", torch.int8)}  # fmt: skip
RECORD_DTYPES = {"positions": "<i4", "documents": "<i8", "token_ids": "<i4", "kinds": "|u1"}
"""Of other records, such as "labels", the type they come in is kept."""


def dtype_name(dtype: str | torch.dtype) -> str:
    """The name of a cache's type.

    Raises:
        UnweaveError: A cache cannot hold it.
    """
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "float": "float32", "half": "float16"}
    name = str(dtype).removeprefix("torch.")
    name = short.get(name, name)
    if name not in DTYPES:
        hint = nearest(name, DTYPES) or f"; it can hold {', '.join(DTYPES)}."
        raise UnweaveError(f"a cache cannot hold {name!r}{hint}")
    return name


def slugs(hooks: Sequence[str]) -> dict[str, str]:
    """A file name for each hook: readable, different for each, and none of the other names in a shard."""
    names: dict[str, str] = {}
    for hook in hooks:
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "_", hook).strip(".")
        taken = {*map(str.lower, names.values()), *RECORD_DTYPES, "labels"}
        if not 0 < len(slug) <= 100 or slug.lower() in taken or slug.endswith((".norms", ".scale")):
            slug = f"{slug[:80]}_{hashlib.blake2b(hook.encode(), digest_size=8).hexdigest()}"
        names[hook] = slug
    return names


def shard_folder(side: str, number: int) -> str:
    return f"{side}_{number:05d}"


def hash_of(parts: Mapping[str, Any]) -> str:
    """BLAKE2b, 128 bits, of plain JSON values."""
    text = json.dumps(parts, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=CHECKSUM_BYTES).hexdigest()


def as_stored(x: Tensor, dtype: str) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Activations as they are written, and for int8 the scale of each row: its largest number is 127 of them."""
    if dtype != "int8":
        bits = x.detach().to(DTYPES[dtype][1]).cpu().contiguous()
        return (bits.view(torch.int16).numpy().view("<u2") if dtype == "bfloat16" else bits.numpy()), None
    x = x.detach().float()
    scales = x.abs().amax(1) / 127
    whole = torch.where(scales[:, None] > 0, x / scales[:, None], 0).round().clamp(-127, 127)
    return whole.to(torch.int8).cpu().numpy(), scales.cpu().numpy()


def files_of(hooks: Mapping[str, str], dtype: str, records: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Every array of a shard by file name: what it holds ("hook", "scale", "norms" or "record"), and of which."""
    files = {}
    for hook, slug in hooks.items():
        files[f"{slug}.npy"] = ("hook", hook)
        files[f"{slug}.norms.npy"] = ("norms", hook)
        if dtype == "int8":
            files[f"{slug}.scale.npy"] = ("scale", hook)
    return files | {f"{name}.npy": ("record", name) for name in records}
