"""What may be kept of pre-activations, and how to keep it: each selection in a few lines of PyTorch.

Ties go to the latent with the lowest index on every back-end. Comparisons with a bound are strict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import pad


class TooDense(Exception):  # no error: the caller then computes densely
    """So many entries are above their bounds that sparse execution would not pay."""


class Selection(NamedTuple):
    """Selected pre-activations, row after row."""

    counts: Int64[Tensor, " n"]
    """Number of entries of each row."""
    indices: Int64[Tensor, " nnz"]
    """Latent of each entry, ascending within a row."""
    values: Float[Tensor, " nnz"]
    """Pre-activation of each entry."""


@dataclass(frozen=True)
class Largest:
    """The `k` largest of each row, negative ones included; with `magnitude`, the k largest in absolute value."""

    k: int
    magnitude: bool = False


@dataclass(frozen=True)
class LargestOfGroups:
    """The largest of each of `groups` groups of neighbouring latents (their number divides d_sae)."""

    groups: int


@dataclass(frozen=True, eq=False)
class Above:
    """Everything strictly above a bound, `(m,)` or one for all latents."""

    bounds: Float[Tensor, " m"] | float


@dataclass(frozen=True)
class LargestOfBatch:
    """The `budget` largest positive ones of the whole batch; ties go to the first row, then to the lowest latent.

    Attributes:
        budget: How many.
        hint: A guess of the smallest of them, such as the last batch's. It decides only how fast the result is found.
    """

    budget: int
    hint: float | None = None


Spec = Largest | LargestOfGroups | Above | LargestOfBatch


def _top_indices(pre: Float[Tensor, "n m"], k: int) -> Int64[Tensor, "n k"]:
    values, indices = pre.topk(k, dim=1, sorted=False)
    # torch.topk leaves open which of several equal values it takes. Only rows with more candidates at or above the
    # k-th value than there are places can be affected.
    ambiguous = (pre >= values.amin(1, keepdim=True)).sum(1) > k
    if ambiguous.any():
        order = pre[ambiguous].argsort(dim=1, descending=True, stable=True)
        indices[ambiguous] = order[:, :k]
    return indices.sort(dim=1).values


def largest(pre: Float[Tensor, "n m"], spec: Largest) -> Selection:
    """What `Largest` keeps."""
    indices = _top_indices(pre.abs() if spec.magnitude else pre, spec.k)
    counts = torch.full((len(pre),), spec.k, device=pre.device)
    return Selection(counts, indices.flatten(), pre.gather(1, indices).flatten())


def largest_of_groups(pre: Float[Tensor, "n m"], spec: LargestOfGroups) -> Selection:
    """What `LargestOfGroups` keeps."""
    n, m = pre.shape
    size = m // spec.groups
    grouped = pre.view(n, spec.groups, size)
    values = grouped.amax(2)
    # argmax leaves open which of several equal values it takes.
    within = torch.where(grouped == values[:, :, None], torch.arange(size, device=pre.device), size).amin(2)
    indices = within + torch.arange(spec.groups, device=pre.device) * size
    counts = torch.full((n,), spec.groups, device=pre.device)
    return Selection(counts, indices.flatten(), values.flatten())


def above(pre: Float[Tensor, "n m"], bounds: Float[Tensor, " m"] | float) -> Selection:
    """Everything strictly above a bound per latent."""
    mask = pre > bounds
    flat = mask.flatten().nonzero().squeeze(1)
    return Selection(mask.sum(1), flat % pre.shape[1], pre.flatten()[flat])


def kept(selection: Selection, keep: Tensor) -> Selection:
    """The entries for which `keep` is true."""
    before = pad(keep.cumsum(0), (1, 0))
    ends = pad(selection.counts.cumsum(0), (1, 0))
    return Selection(before[ends].diff(), selection.indices[keep], selection.values[keep])


def largest_of_batch(candidates: Selection, budget: int) -> Selection:
    """The `budget` largest of all candidates of a batch, of which there are at least as many."""
    smallest = candidates.values.topk(budget, sorted=False).values.amin()
    keep = candidates.values > smallest
    tied = (candidates.values == smallest).nonzero().flatten()
    keep[tied[: budget - int(keep.sum())]] = True
    return kept(candidates, keep)
