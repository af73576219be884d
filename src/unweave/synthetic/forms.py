"""Activations in three forms: dense tensors, COO tensors and sparse codes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.sae.codes import SparseCodes

Batch = Tensor | SparseCodes


def to_codes(batch: Batch) -> SparseCodes:
    """The entries that are not 0, ascending within a row; codes as they are."""
    if isinstance(batch, SparseCodes):
        return batch
    if batch.layout == torch.strided:
        return SparseCodes.from_dense(batch)
    batch = batch.coalesce()
    rows, features = batch.indices()
    return SparseCodes.from_entries(rows, features, batch.values(), *batch.shape)


def to_dense(batch: Batch) -> Float[Tensor, "n k"]:
    """A dense tensor; dense tensors as they are."""
    if isinstance(batch, Tensor):
        return batch if batch.layout == torch.strided else batch.to_dense()
    dense = batch.values.new_zeros(batch.n_rows * batch.d_sae)
    dense[batch.rows * batch.d_sae + batch.indices] = batch.values  # in place: a copy would double the time
    return dense.view(batch.n_rows, batch.d_sae)


def to_coo(batch: Batch) -> Tensor:
    """A COO tensor; COO tensors as they are."""
    if isinstance(batch, Tensor):
        return batch if batch.layout == torch.sparse_coo else batch.to_sparse_coo()
    return torch.sparse_coo_tensor(
        torch.stack([batch.rows, batch.indices]), batch.values, (batch.n_rows, batch.d_sae),
        is_coalesced=True, check_invariants=False,
    )  # fmt: skip
