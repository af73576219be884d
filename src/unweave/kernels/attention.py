"""Attention without a mask but the causal one: PyTorch's, and in C++ for short rows in bf16."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from unweave.kernels import cpu, dispatch

_MOST = 4096  # positions whose scores of a few queries, and whose keys and values, the caches hold
_LANES = 16


def attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g n d"],
    v: Float[Tensor, "b g n d"],
    *,
    scale: float | None = None,
    causal: bool,
) -> Float[Tensor, "b n h d"]:
    """`softmax(scale q k.T) v`, summed in fp32, head by head; laid out so that the heads lie side by side.

    On a CPU with AVX512-BF16, rows of up to 4096 positions in bf16 go through one kernel, which skips what lies ahead
    of the queries; it does not know gradients. All else goes through `scaled_dot_product_attention`.

    Args:
        q: Queries.
        k: Keys; of each head, `h / g` heads of queries make use.
        v: Values.
        scale: Factor of the scores; None: `d ** -0.5`.
        causal: Whether a position sees only itself and what comes before it.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if _fits(q, k, v) and (out := cpu.attention(q, k, v, scale, causal)) is not None:
        return out
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped).transpose(1, 2)


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    b, h, n, d = q.shape
    return (
        all(x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.stride(-1) == 1 for x in (q, k, v))
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
        and q.numel() > 0
        and n <= _MOST
        and d % _LANES == 0
        and h % k.shape[1] == 0
        and k.shape == v.shape == (b, k.shape[1], n, d)
        and dispatch.forced() in (None, "cpu")
        and cpu.available()
    )
