"""The best few contexts of every latent, kept while the tokens stream by.

`BestContexts` holds, for each latent, the `n` positions with the highest score seen so far and a window of token ids
and activations around each. What it holds is a function of the set of positions offered, never of how they were cut
into batches: scores are compared first, earlier positions win ties, and a group (a document) holds one slot at most.
Everything happens by sorting; there is no loop over tokens or latents. Memory is fixed at the start: about
`(8 * window + 30) * 2` bytes per slot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from unweave.sae.codes import SparseCodes


class Firings(NamedTuple):
    """The entries of a batch of codes that are not 0, ordered by latent and then by position, with its tokens."""

    latents: Int64[Tensor, " nnz"]
    positions: Int64[Tensor, " nnz"]
    """Position in the flattened batch."""
    values: Float[Tensor, " nnz"]
    ids: Int64[Tensor, "n context"]
    real: Bool[Tensor, "n context"]
    """False on padding."""
    first: int
    """Number of positions in the batches before this one."""

    @classmethod
    def of(cls, codes: SparseCodes, ids: Tensor, real: Tensor, first: int) -> Firings:
        by_latent = codes.by_latent
        values = codes.values[by_latent.order].float()
        fired = values != 0
        latents = codes.indices[by_latent.order]
        return cls(latents[fired], by_latent.rows[fired], values[fired], ids, real, first)

    def cut(
        self, latents: Int64[Tensor, " m"], positions: Int64[Tensor, " m"], window: int
    ) -> tuple[Int32[Tensor, "m width"], Float[Tensor, "m width"]]:
        """Token ids (-1 outside the row) and activations within `window` tokens of each position."""
        n_tokens, context = self.ids.numel(), self.ids.shape[1]
        offsets = torch.arange(-window, window + 1, device=self.ids.device)
        column = positions[:, None] % context + offsets
        around = (positions[:, None] + offsets).clamp(0, n_tokens - 1)
        inside = (column >= 0) & (column < context) & self.real.flatten()[around]
        ids = self.ids.flatten()[around].where(inside, -1)

        keys = self.latents * n_tokens + self.positions
        wanted = latents[:, None] * n_tokens + around
        found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        values = self.values[found].where(inside & (keys[found] == wanted), 0)
        return ids.int(), values


class Contexts(NamedTuple):
    """The best-scored positions of every latent, best first, and what surrounds them; `n` slots per latent."""

    scores: Float[Tensor, "d_sae n"]
    """-inf in unused slots."""
    positions: Int64[Tensor, "d_sae n"]
    """Position in the stream of tokens, -1 in unused slots."""
    groups: Int64[Tensor, "d_sae n"]
    """Group of each position, -1 in unused slots."""
    ids: Int32[Tensor, "d_sae n width"]
    """Token ids around the position, which is the middle of the `width` places; -1 beyond the row's ends."""
    values: Float[Tensor, "d_sae n width"]
    """The latent's activation at each of them."""

    @property
    def peak_ids(self) -> Int64[Tensor, "d_sae n"]:
        """Token id at each position, -1 in unused slots."""
        return self.ids[:, :, self.ids.shape[2] // 2].long()

    @property
    def peak_values(self) -> Float[Tensor, "d_sae n"]:
        """The latent's activation at each position."""
        return self.values[:, :, self.values.shape[2] // 2]


class BestContexts:
    """Collects the `n` best-scored positions of every latent and `window` tokens on either side of each."""

    def __init__(self, d_sae: int, n: int, window: int, device: torch.device | str = "cpu") -> None:
        self.n, self.window = n, window
        self._scores = torch.full((d_sae, n), -torch.inf, device=device)
        self._positions = torch.full((d_sae, n), -1, device=device)
        self._groups = torch.full((d_sae, n), -1, device=device)
        self._ids = torch.full((d_sae, n, 2 * window + 1), -1, dtype=torch.int32, device=device)
        self._values = torch.zeros(d_sae, n, 2 * window + 1, device=device)

    def offer(
        self,
        firings: Firings,
        entries: Int64[Tensor, " m"],
        scores: Float[Tensor, " m"],
        groups: Int64[Tensor, " m"],
    ) -> None:
        """Let the given entries of `firings` compete for the slots of their latents."""
        # Later positions lose ties, so only a strictly higher score can enter a full list.
        enters = scores > self._scores[firings.latents[entries], -1]
        entries, scores, groups = entries[enters], scores[enters], groups[enters]
        if not len(entries):
            return
        touched = torch.zeros(len(self._scores), dtype=torch.bool, device=entries.device)
        touched[firings.latents[entries]] = True
        old_latents, old_slots = ((self._positions >= 0) & touched[:, None]).nonzero(as_tuple=True)
        old, n_old = (old_latents, old_slots), len(old_latents)

        latents = torch.cat([old_latents, firings.latents[entries]])
        positions = torch.cat([self._positions[old], firings.positions[entries] + firings.first])
        scores = torch.cat([self._scores[old], scores])
        groups = torch.cat([self._groups[old], groups])
        kept, slots = _best(latents, positions, scores, groups, self.n)

        stays = kept < n_old
        new = entries[kept[~stays] - n_old]
        ids = torch.empty(len(kept), self._ids.shape[2], dtype=torch.int32, device=kept.device)
        values = torch.empty(len(kept), self._ids.shape[2], device=kept.device)
        from_slot = (old_latents[kept[stays]], old_slots[kept[stays]])
        ids[stays], values[stays] = self._ids[from_slot], self._values[from_slot]
        ids[~stays], values[~stays] = firings.cut(firings.latents[new], firings.positions[new], self.window)

        # A list never gets shorter, so this overwrites every slot that was in use.
        where = (latents[kept], slots)
        self._scores[where], self._positions[where], self._groups[where] = scores[kept], positions[kept], groups[kept]
        self._ids[where], self._values[where] = ids, values

    def contexts(self) -> Contexts:
        """What has been collected so far, on the CPU."""
        kept = (self._scores, self._positions, self._groups, self._ids, self._values)
        return Contexts(*(tensor.cpu() for tensor in kept))


def _rank_within(sorted_keys: Int64[Tensor, " m"]) -> Int64[Tensor, " m"]:
    """Each entry's place among the entries of the same key."""
    return torch.arange(len(sorted_keys), device=sorted_keys.device) - torch.searchsorted(sorted_keys, sorted_keys)


def _best(
    latents: Tensor, positions: Tensor, scores: Tensor, groups: Tensor, n: int
) -> tuple[Int64[Tensor, " kept"], Int64[Tensor, " kept"]]:
    """Entries that are among the `n` best of their latent, one per group, and their rank there."""
    best_first = torch.argsort(positions)
    best_first = best_first[torch.argsort(scores[best_first], descending=True, stable=True)]

    # Within each (latent, group) the best entry comes first; it stands for its group.
    latent, group = latents[best_first], groups[best_first]
    order = torch.argsort(group, stable=True)
    order = order[torch.argsort(latent[order], stable=True)]
    repeats = (latent[order][1:] == latent[order][:-1]) & (group[order][1:] == group[order][:-1])
    kept = best_first[order[~torch.nn.functional.pad(repeats, (1, 0))].sort().values]

    kept = kept[torch.argsort(latents[kept], stable=True)]
    rank = _rank_within(latents[kept])
    return kept[rank < n], rank[rank < n]
