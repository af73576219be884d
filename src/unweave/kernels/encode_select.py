"""The dense product of a step, and what is kept of it.

The pre-activations of a chunk of rows are made in one reused buffer and handed to every selector while they are
still in cache, so the full `(n, d_sae)` tensor never exists, and the main codes and the auxiliary ones (dead latents)
come from the same product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

CHUNK_ROWS = 512


class Selection(NamedTuple):
    """Selected pre-activations, row after row."""

    counts: Int64[Tensor, " n"]
    """Number of entries of each row."""
    indices: Int64[Tensor, " nnz"]
    """Latent of each entry, ascending within a row."""
    values: Float[Tensor, " nnz"]
    """Pre-activation of each entry."""


Selector = Callable[[Float[Tensor, "rows d_sae"]], Selection]


def encode_select(
    x: Float[Tensor, "n d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    selectors: Sequence[Selector],
) -> list[Selection]:
    """Compute `x @ W_enc + b_enc` once and return what each selector keeps of it.

    Args:
        x: Encoder input; a pre-encoder bias is subtracted already.
        W_enc: Encoder weights.
        b_enc: Encoder bias.
        selectors: Functions from the pre-activations of some rows to a `Selection` of these rows.

    Returns:
        One `Selection` of all `n` rows for each selector.
    """
    buffer = x.new_empty(min(CHUNK_ROWS, len(x)), W_enc.shape[1])
    parts: list[list[Selection]] = [[] for _ in selectors]
    for rows in x.split(CHUNK_ROWS):
        pre = torch.addmm(b_enc, rows, W_enc, out=buffer[: len(rows)])
        for part, select in zip(parts, selectors, strict=True):
            part.append(select(pre))
    return [Selection(*(torch.cat(columns) for columns in zip(*part, strict=True))) for part in parts]
