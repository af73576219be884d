"""Sparse codes: which latents are active on which row, and how strongly.

Rows are stored one after the other, as (indices, values, offsets), the layout of compressed sparse rows and of
`torch.nn.functional.embedding_bag`. An entry may hold the value 0 (a latent that was selected but did not fire);
whatever counts firing looks at the values, never at the number of entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from unweave import kernels


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """Codes of `n_rows` inputs over `d_sae` latents.

    Attributes:
        indices: Latent of each entry, `(nnz,)`, int64; ascending within a row.
        values: Value of each entry, `(nnz,)`.
        offsets: Row `i` holds the entries `offsets[i]:offsets[i + 1]`, `(n_rows + 1,)`, int64.
        d_sae: Number of latents.
    """

    indices: Int64[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    offsets: Int64[Tensor, " n_rows+1"]
    d_sae: int

    @property
    def n_rows(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Int64[Tensor, " nnz"]:
        """Row of each entry."""
        return torch.repeat_interleave(
            torch.arange(self.n_rows, device=self.indices.device), self.offsets.diff(), output_size=len(self.indices)
        )

    @cached_property
    def by_latent(self) -> kernels.Transposed:
        """The same entries, ordered latent by latent; made once per batch."""
        return kernels.transpose(self.indices, self.offsets, self.d_sae)

    def with_values(self, values: Float[Tensor, " nnz"]) -> SparseCodes:
        """The same entries with other values; what is known about the index is kept."""
        codes = replace(self, values=values)
        for name in ("rows", "by_latent"):
            if name in self.__dict__:
                codes.__dict__[name] = self.__dict__[name]
        return codes

    def at(self, per_latent: Float[Tensor, " d_sae"]) -> Float[Tensor, " nnz"]:
        """The value of a per-latent vector at every entry."""
        return _At.apply(per_latent, self)

    def sum_by_latent(self, per_entry: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
        """The sum of a value per entry over each latent's entries, always in the same order."""
        return torch.segment_reduce(per_entry[self.by_latent.order], "sum", offsets=self.by_latent.offsets)

    def to_dense(self) -> Float[Tensor, "n_rows d_sae"]:
        """A dense `(n_rows, d_sae)` tensor, made only here."""
        dense = self.values.new_zeros(self.n_rows, self.d_sae)
        return dense.index_put((self.rows, self.indices), self.values)

    @classmethod
    def from_dense(cls, dense: Float[Tensor, "n_rows d_sae"]) -> SparseCodes:
        """The non-zero entries of a dense tensor."""
        rows, indices = dense.nonzero(as_tuple=True)
        return cls.from_entries(rows, indices, dense[rows, indices], *dense.shape)

    @classmethod
    def from_entries(
        cls,
        rows: Int64[Tensor, " nnz"],
        indices: Int64[Tensor, " nnz"],
        values: Float[Tensor, " nnz"],
        n_rows: int,
        d_sae: int,
    ) -> SparseCodes:
        """Codes from entries that are sorted by row."""
        counts = kernels.counts_of(rows, n_rows)
        codes = cls(indices, values, torch.nn.functional.pad(counts.cumsum(0), (1, 0)), d_sae)
        codes.__dict__["rows"] = rows
        return codes

    def where(self, keep: Bool[Tensor, " nnz"]) -> SparseCodes:
        """Only some of the entries."""
        return self.from_entries(self.rows[keep], self.indices[keep], self.values[keep], self.n_rows, self.d_sae)

    def firing(self) -> SparseCodes:
        """Only the entries whose value is not 0."""
        return self.where(self.values != 0)

    def cut(self, widths: Sequence[int]) -> SparseCodes:
        """Every row cut into one row for each block of latents.

        Args:
            widths: Where the blocks end, ascending, the last at `d_sae`.

        Returns:
            The same entries as `n_rows * len(widths)` rows: row `i * len(widths) + j` holds row i's entries in block j.
        """
        ends = torch.tensor(widths, device=self.indices.device)
        rows = self.rows * len(widths) + torch.bucketize(self.indices, ends, right=True)
        return self.from_entries(rows, self.indices, self.values, self.n_rows * len(widths), self.d_sae)

    def blocks(self, lengths: Sequence[int]) -> tuple[list[SparseCodes], Int64[Tensor, " nnz"]]:
        """The codes of each of several blocks of latents by itself.

        Args:
            lengths: How many latents each block has, `d_sae` together.

        Returns:
            The codes block by block, without a graph, and which entries they are, one block after the other.
        """
        ends = list(accumulate(lengths))
        of_block = torch.bucketize(self.indices, torch.tensor(ends, device=self.indices.device), right=True)
        found = kernels.transpose(of_block, self.offsets, len(lengths))
        sizes = found.offsets.diff().tolist()
        entries = found.rows, self.indices[found.order], self.values.detach()[found.order]
        parts = zip(*(entry.split(sizes) for entry in entries), lengths, ends, strict=True)
        return [
            self.from_entries(rows, indices - (end - length), values, self.n_rows, length)
            for rows, indices, values, length, end in parts
        ], found.order

    def firing_counts(self) -> Int64[Tensor, " d_sae"]:
        """How many rows each latent fires on (its value is not 0)."""
        return kernels.counts_of(self.indices, self.d_sae, self.values != 0)

    def l0(self) -> Float[Tensor, " n_rows"]:
        """Number of latents that fire (value not 0) on each row."""
        fired = torch.nn.functional.pad((self.values != 0).cumsum(0), (1, 0))
        return (fired[self.offsets[1:]] - fired[self.offsets[:-1]]).to(self.values.dtype)

    def topk(self, k: int) -> SparseCodes:
        """The `k` largest values of each row, or all of a row that has fewer, in the order of their indices."""
        order = torch.argsort(self.values, descending=True, stable=True)
        order = order[torch.argsort(self.rows[order], stable=True)]
        rank = torch.arange(len(order), device=order.device) - self.offsets[self.rows[order]]
        keep = order[rank < k].sort().values
        return self.from_entries(self.rows[keep], self.indices[keep], self.values[keep], self.n_rows, self.d_sae)

    def __getitem__(self, rows: slice) -> SparseCodes:
        """The codes of a range of rows (step 1)."""
        start, stop, step = rows.indices(self.n_rows)
        if step != 1:
            raise ValueError(f"SparseCodes takes slices of step 1, got {step}.")
        first, last = int(self.offsets[start]), int(self.offsets[max(stop, start)])
        return SparseCodes(
            self.indices[first:last],
            self.values[first:last],
            self.offsets[start : max(stop, start) + 1] - first,
            self.d_sae,
        )

    def to(self, *args: object, **kwargs: object) -> SparseCodes:
        """Move to a device, or cast the values to a dtype."""
        values = self.values.to(*args, **kwargs)  # type: ignore[call-overload]
        return SparseCodes(self.indices.to(values.device), values, self.offsets.to(values.device), self.d_sae)

    def detach(self) -> SparseCodes:
        """The same codes outside the graph."""
        return self.with_values(self.values.detach())

    @staticmethod
    def cat(parts: list[SparseCodes]) -> SparseCodes:
        """The rows of several codes, one after the other."""
        ends = torch.tensor([0] + [len(p.indices) for p in parts], device=parts[0].indices.device).cumsum(0)
        offsets = [p.offsets[:-1] + end for p, end in zip(parts, ends[:-1], strict=True)]
        return SparseCodes(
            torch.cat([p.indices for p in parts]),
            torch.cat([p.values for p in parts]),
            torch.cat([*offsets, ends[-1:]]),
            parts[0].d_sae,
        )


class _At(torch.autograd.Function):
    """Indexing whose gradient is summed latent by latent, in one order whatever the number of threads."""

    @staticmethod
    def forward(ctx: Any, per_latent: Tensor, codes: SparseCodes) -> Tensor:
        ctx.codes = codes
        return per_latent[codes.indices]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.codes.sum_by_latent(grad), None


@dataclass(frozen=True, eq=False)
class DenseCodes:
    """Codes of which so many entries are active that a dense `(n_rows, d_sae)` tensor is the faster form."""

    values: Float[Tensor, "n_rows d_sae"]

    @property
    def n_rows(self) -> int:
        return len(self.values)

    @property
    def d_sae(self) -> int:
        return self.values.shape[1]

    def at(self, per_latent: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        """A per-latent vector, as it broadcasts against the values."""
        return per_latent

    def with_values(self, values: Float[Tensor, "n_rows d_sae"]) -> DenseCodes:
        """Other values in the same form."""
        return DenseCodes(values)

    def firing_counts(self) -> Int64[Tensor, " d_sae"]:
        """How many rows each latent fires on (its value is not 0)."""
        return (self.values != 0).sum(0)

    def l0(self) -> Float[Tensor, " n_rows"]:
        """Number of latents that fire on each row."""
        return (self.values != 0).sum(1).to(self.values.dtype)

    def detach(self) -> DenseCodes:
        """The same codes outside the graph."""
        return DenseCodes(self.values.detach())

    def to_dense(self) -> Float[Tensor, "n_rows d_sae"]:
        """The values."""
        return self.values


Codes = SparseCodes | DenseCodes
