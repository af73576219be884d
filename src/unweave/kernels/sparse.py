"""The three sparse products, as `embedding_bag` calls.

Codes come as (indices, values, offsets), row after row. The weight gradients take the same entries ordered latent by
latent, so that each latent's gradient is one sum over its own rows: nothing is scattered, nothing is atomic, and the
result does not depend on the number of threads.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag


def gather_sum(
    indices: Int64[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    offsets: Int64[Tensor, " n+1"],
    weight: Float[Tensor, "m d"],
) -> Float[Tensor, "n d"]:
    """`codes @ weight`: row i is the sum of `values[e] * weight[indices[e]]` over its entries e."""
    if len(indices) == 0:
        return weight.new_zeros(len(offsets) - 1, weight.shape[1])
    return embedding_bag(
        indices, weight, offsets, mode="sum", per_sample_weights=values.to(weight.dtype), include_last_offset=True
    )


def sddmm(
    indices: Int64[Tensor, " nnz"],
    rows: Int64[Tensor, " nnz"],
    offsets: Int64[Tensor, " n+1"],
    grad: Float[Tensor, "n d"],
    weight: Float[Tensor, "m d"],
) -> Float[Tensor, " nnz"]:
    """`(grad @ weight.T)` at the entries only: the dot products `grad[rows[e]] · weight[indices[e]]`."""
    # What embedding_bag computes in its backward pass for its weights per sample, without the two gathered copies
    # of size (nnz, d) that indexing would make.
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return backward(grad.contiguous(), weight.contiguous(), indices, offsets, rows, 0)


def scatter_outer(
    rows: Int64[Tensor, " nnz"],
    values: Float[Tensor, " nnz"],
    offsets: Int64[Tensor, " m+1"],
    x: Float[Tensor, "n d"],
) -> Float[Tensor, "m d"]:
    """`codes.T @ x` from entries ordered by latent: row j is the sum of `values[e] * x[rows[e]]` over latent j's."""
    return gather_sum(rows, values, offsets, x)
