"""Every kernel in a few lines of PyTorch: what the fast ones must equal, and what runs where there are none.

Codes are rows of (indices, values, offsets), as in `unweave.sae.SparseCodes`: row i holds the entries
`offsets[i]:offsets[i + 1]`, ascending in their latent. Nothing is scattered and nothing is atomic, so results do not
depend on the number of threads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag, pad


class Transposed(NamedTuple):
    """The entries of sparse codes, latent by latent, and within a latent row by row."""

    order: Int64[Tensor, " nnz"]
    """Position of each entry in the row-ordered codes."""
    rows: Int64[Tensor, " nnz"]
    """Row of each entry."""
    offsets: Int64[Tensor, " m+1"]
    """Where each latent's entries begin."""


class RowErrors(NamedTuple):
    """Errors of a batch and their gradients."""

    errors: Float[Tensor, "n p"]
    """Squared norm of the residual of each row and prefix."""
    grad: Float[Tensor, "n_p d"]
    """Gradient of the loss for what the entries of each row and group decode to."""
    code_grad: Float[Tensor, " nnz"]
    """Gradient of the loss for each code."""


def rows_of(offsets: Int64[Tensor, " n+1"], nnz: int) -> Int64[Tensor, " nnz"]:
    """The row of each entry."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=nnz)


def counts_of(indices: Int64[Tensor, " nnz"], m: int, of: Bool[Tensor, " nnz"] | None = None) -> Int64[Tensor, " m"]:
    """How often each of `m` indices occurs, among those entries that `of` names; integers, so in any order the same."""
    # torch.bincount would make a GPU's host wait to learn how long its result is.
    counted = torch.ones_like(indices) if of is None else of.long()
    return indices.new_zeros(m).scatter_add_(0, indices, counted)


def gather_sum(indices: Tensor, values: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    if len(indices) == 0:
        return weight.new_zeros(len(offsets) - 1, weight.shape[1])
    return embedding_bag(
        indices, weight, offsets, mode="sum", per_sample_weights=values.to(weight.dtype), include_last_offset=True
    )


def sddmm(indices: Tensor, offsets: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    # What embedding_bag computes in its backward pass for its weights per sample, without the two gathered copies
    # of size (nnz, d) that indexing would make.
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    rows = rows_of(offsets, len(indices))
    return backward(grad.contiguous(), weight.contiguous(), indices, offsets, rows, 0)


def transpose(indices: Tensor, offsets: Tensor, m: int) -> Transposed:
    order = torch.sort(indices, stable=True).indices
    counts = counts_of(indices, m)
    return Transposed(order, rows_of(offsets, len(indices))[order], pad(counts.cumsum(0), (1, 0)))


def scatter_outer(by_latent: Transposed, values: Tensor, x: Tensor) -> Tensor:
    return gather_sum(by_latent.rows, values[by_latent.order], by_latent.offsets, x)


def squared_error_rows(
    indices: Tensor, values: Tensor, offsets: Tensor, scales: Tensor, weight: Tensor, bias: Tensor, x: Tensor
) -> RowErrors:
    n, d, p = len(x), x.shape[1], len(scales)
    made = gather_sum(indices, values, offsets, weight).view(n, p, d).cumsum(1) + bias
    residual = made - x[:, None]
    # Group g is part of every prefix from its own on.
    grad = (residual * scales[:, None]).flip(1).cumsum(1).flip(1).reshape(n * p, d)
    return RowErrors(residual.square().sum(2), grad, sddmm(indices, offsets, grad, weight))


def adam_rows(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    grad_scale: float | Tensor,
    unit: bool,
) -> None:
    if not isinstance(grad_scale, Tensor) and math.isnan(grad_scale):
        return
    before = [t.clone() for t in (weight, first, second)] if isinstance(grad_scale, Tensor) else []
    beta1, beta2 = betas
    grad = grad * grad_scale
    m1 = torch.lerp(grad, first.to(grad.dtype), beta1)
    m2 = torch.lerp(grad.square(), second.to(grad.dtype), beta2)
    _keep(first, m1, step, 0)
    _keep(second, m2, step, 16)
    weight.addcdiv_(m1, m2.sqrt() * (1 - beta2**step) ** -0.5 + eps, value=-lr / (1 - beta1**step))
    if unit:
        weight.div_(weight.norm(dim=1, keepdim=True).clamp(min=1e-12))
    for tensor, old in zip((weight, first, second), before, strict=bool(before)):
        torch.where(grad_scale.isnan(), old, tensor, out=tensor)  # type: ignore[union-attr]


def _keep(moment: Tensor, value: Tensor, seed: int, shift: int) -> None:
    if moment.dtype != torch.bfloat16:
        moment.copy_(value)
        return
    # Up or down with the probability that makes the mean right; see csrc/optimizer.h.
    random = (_hashed(seed, value.numel(), value.device) >> shift & 0xFFFF).view(value.shape)
    bits = value.float().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    moment.copy_(((bits + random >> 16) & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.bfloat16))


def _hashed(seed: int, n: int, device: torch.device) -> Tensor:
    """32 random bits for each of n elements, a function of the seed and the element alone."""

    def mixed(z: Tensor, shift: int, factor: int) -> Tensor:
        logical = z >> shift & (1 << 64 - shift) - 1
        return (z ^ logical) * (factor - (1 << 64))

    start = seed * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    z = torch.arange(n, device=device) + (start - (1 << 64) if start >> 63 else start)
    z = mixed(mixed(z, 30, 0xBF58476D1CE4E5B9), 27, 0x94D049BB133111EB)
    return (z ^ (z >> 31 & (1 << 33) - 1)) >> 32 & 0xFFFFFFFF
