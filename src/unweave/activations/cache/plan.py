"""What a cache will take: bytes on disk, exactly but for headers and manifests, and time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from unweave._errors import UnweaveError
from unweave.activations.cache.format import dtype_name
from unweave.activations.cache.write import SHARD_BYTES
from unweave.activations.live import StreamCost

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_RECORD_BYTES = 4 + 8 + 4  # position, document, token id
_TOKEN_BYTES = 4 + 4  # of the rows that were run: token id, document


@dataclass(frozen=True)
class CachePlan:
    """A cache's sizes and expected time.

    Attributes:
        tokens: Tokens of the training side.
        held_out_tokens: Tokens of the held-out side.
        rows: Rows that the model is run on.
        shards: Folders of activations.
        bytes: On disk.
        seconds: Of forward passes.
    """

    tokens: int
    held_out_tokens: int
    rows: int
    shards: int
    bytes: int
    seconds: float


def plan_cache(
    tokens: int,
    cost: StreamCost,
    context: int,
    *,
    dtype: str = "bfloat16",
    held_out_tokens: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> CachePlan:
    """The price of `unweave.cache` at the hooks of a stream that was measured.

    Args:
        tokens: Tokens of training documents to store.
        cost: What `ActivationStream.measure` found, with masks that leave out nothing.
        context: Tokens in a row.
        dtype: Type of the cache.
        held_out_tokens: Tokens of held-out documents; None: a 20th of `tokens`, at most 100,000.
        shard_bytes: Size of a shard.

    Raises:
        UnweaveError: A cache cannot have that type, or fewer than one token is asked for.
    """
    if tokens < 1:
        raise UnweaveError(f"a cache holds at least one token, not {tokens}.")
    per_token = token_bytes(cost.widths, dtype)
    held_out = min(100_000, tokens // 20) if held_out_tokens is None else held_out_tokens
    rows = math.ceil(tokens / context) + math.ceil(held_out / context)
    return CachePlan(
        tokens=tokens,
        held_out_tokens=held_out,
        rows=rows,
        shards=sum(math.ceil(n * per_token / shard_bytes) for n in (tokens, held_out)),
        bytes=(tokens + held_out) * per_token + rows * context * _TOKEN_BYTES,
        seconds=(tokens + held_out) / cost.tokens_per_second,
    )


def token_bytes(widths: Mapping[str, int], dtype: str = "bfloat16") -> int:
    """Bytes that a cache takes for one token: activations, norms, scales, and what is known of it."""
    name = dtype_name(dtype)
    per_hook = 4 + 4 * (name == "int8")
    return sum(width * _ITEM_BYTES[name] + per_hook for width in widths.values()) + _RECORD_BYTES
