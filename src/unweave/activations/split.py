"""Which documents are held out: decided by each document's own content.

A document's side, or an image's, depends on nothing but its content and the seed, so the split survives reordering,
streaming and resuming, and two copies of one document never end up on both sides. Only where there are so few
documents that one side would stay empty does `held_out_cutoff` move the limit, for both sides alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import pairwise

DEFAULT_HELD_OUT = 0.05


def held_out_score(content: str | bytes, seed: int = 0) -> int:
    """A document's place in `[0, 2**64)`, uniform over documents; the lowest ones are held out."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    digest = hashlib.blake2b(data, digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "big")


def is_held_out(content: str | bytes, fraction: float = DEFAULT_HELD_OUT, seed: int = 0) -> bool:
    """True for about `fraction` of all documents, the same ones every time."""
    return held_out_score(content, seed) < fraction * 2**64


def held_out_cutoff(documents: Iterable[tuple[int, int]], fraction: float) -> float:
    """The score below which documents are held out, given all the documents there are.

    This is `is_held_out`'s limit unless it leaves a side empty. Then the lowest scores are held out until they make
    up `fraction` of the data, and at least one document stays for training: a lone document is never held out.

    Args:
        documents: `(score, size)` of every document, in any order.
        fraction: Part of the data to hold out, in (0, 1).
    """
    sizes: dict[int, int] = {}
    for score, size in documents:
        sizes[score] = sizes.get(score, 0) + size
    limit = fraction * 2**64
    scores = sorted(sizes)
    if not scores or scores[0] < limit <= scores[-1]:
        return limit
    wanted, held_out = fraction * sum(sizes.values()), 0
    for score, following in pairwise(scores):
        held_out += sizes[score]
        if held_out >= wanted:
            return following
    return scores[-1]
