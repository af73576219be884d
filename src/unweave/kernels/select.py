"""Which pre-activations are kept. Ties go to the latent with the lowest index, so every back-end can agree."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave.kernels.encode_select import Selection


def _topk_indices(pre: Float[Tensor, "n m"], k: int) -> Int64[Tensor, "n k"]:
    """Latents of the `k` largest values of each row, ascending; among equal values the lowest latents win."""
    values, indices = pre.topk(k, dim=1, sorted=False)
    # torch.topk leaves open which of several equal values it takes. Only rows with more candidates at or above the
    # k-th value than there are places can be affected.
    ambiguous = (pre >= values.amin(1, keepdim=True)).sum(1) > k
    if ambiguous.any():
        order = pre[ambiguous].argsort(dim=1, descending=True, stable=True)
        indices[ambiguous] = order[:, :k]
    return indices.sort(dim=1).values


def topk(pre: Float[Tensor, "n m"], k: int) -> Selection:
    """The `k` largest pre-activations of each row, negative ones included."""
    indices = _topk_indices(pre, k)
    counts = torch.full((len(pre),), k, device=pre.device)
    return Selection(counts, indices.flatten(), pre.gather(1, indices).flatten())


def topk_among(pre: Float[Tensor, "n m"], k: int, latents: Int64[Tensor, " c"]) -> Selection:
    """The `min(k, c)` largest pre-activations of each row among some latents (ascending), such as the dead ones."""
    chosen = topk(pre[:, latents], min(k, len(latents)))
    return chosen._replace(indices=latents[chosen.indices])


def above(pre: Float[Tensor, "n m"], bound: Float[Tensor, " m"] | float) -> Selection:
    """Everything strictly above a bound per latent."""
    mask = pre > bound
    flat = mask.flatten().nonzero().squeeze(1)
    return Selection(mask.sum(1), flat % pre.shape[1], pre.flatten()[flat])


class BatchTopKCandidates:
    """Selector that keeps every entry which may still be among the `budget` largest positive ones of the whole batch.

    The budget-th largest of the entries seen so far is a lower bound of the batch's, so each chunk of rows is compared
    with the bound that the chunks before it gave. Nothing is sorted.

    Args:
        budget: Number of winners.
        hint: A guess of the batch's bound, such as half the last one: it saves looking at most of the first chunks'
            entries. If it was too high, `missed` says so afterwards, and the batch has to be looked at again without.
    """

    def __init__(self, budget: int, hint: float = 0.0) -> None:
        self.budget = budget
        self.bound = self.hint = max(hint, 0.0)
        self._largest: Tensor | None = None

    @property
    def missed(self) -> bool:
        """Whether winners may lie below the hint."""
        return self.hint > 0 and (self._largest is None or len(self._largest) < self.budget)

    def __call__(self, pre: Float[Tensor, "rows m"]) -> Selection:
        candidates = above(pre, self.bound)
        seen = candidates.values if self._largest is None else torch.cat([self._largest, candidates.values])
        if len(seen) >= self.budget:
            seen = seen.topk(self.budget, sorted=False).values
            # One step below the budget-th largest: entries equal to it must stay candidates, ties are broken later.
            self.bound = float(torch.nextafter(seen.amin(), seen.new_tensor(-torch.inf)).clamp(min=self.hint))
        self._largest = seen
        return candidates


def batch_topk(candidates: Selection, budget: int) -> Selection:
    """The `budget` largest of all candidates of a batch; ties go to the first row, then to the lowest latent."""
    if len(candidates.values) > budget:
        bound = candidates.values.topk(budget, sorted=False).values.amin()
        keep = candidates.values > bound
        tied = (candidates.values == bound).nonzero().flatten()
        keep[tied[: budget - int(keep.sum())]] = True
    else:
        keep = torch.ones_like(candidates.values, dtype=torch.bool)
    kept = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    ends = torch.nn.functional.pad(candidates.counts.cumsum(0), (1, 0))
    return Selection(kept[ends].diff(), candidates.indices[keep], candidates.values[keep])
