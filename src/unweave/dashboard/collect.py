"""Everything the page shows about every latent, from one pass over the tokens.

`Collector.add` takes the sparse codes of a batch of token rows and folds them into per-latent statistics of fixed size:
how often a latent fires, how strongly, a histogram, its strongest contexts (one per document, so that no repeated
page fills the list), and a uniform sample of its firings, from which contexts at any quantile are shown. The sample
is drawn by a hash of (seed, latent, position), and every other statistic is a count or a maximum, so the result does
not depend on the batch size. Masked tokens count nowhere, but windows show them, with their true activations.

Histogram bins are spaced evenly in log2: one grid then fits every latent without knowing its scale beforehand.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from unweave.dashboard.windows import BestContexts, Contexts, Firings
from unweave.sae.codes import SparseCodes

BINS_PER_OCTAVE = 8
_LOWEST_OCTAVE, _OCTAVES = -20, 40
N_BINS = BINS_PER_OCTAVE * _OCTAVES


class Collected(NamedTuple):
    """What a pass leaves behind. Magnitudes are absolute values, for the sake of signed codes."""

    n_tokens: int
    """Tokens counted: real and not masked."""
    counts: Int64[Tensor, " d_sae"]
    """Tokens on which each latent fires (is not 0)."""
    maximum: Float[Tensor, " d_sae"]
    """Largest magnitude; 0 for a latent that never fires."""
    histogram: Int64[Tensor, "d_sae n_bins"]
    """Firings per bin of magnitude; `bin_edge` tells where a bin begins."""
    token_counts: Int64[Tensor, " vocabulary"]
    """How often each token id was counted."""
    top: Contexts
    """The strongest contexts, at most one per document."""
    sample: Contexts
    """Firings drawn uniformly at random, without replacement."""

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Fraction of counted tokens on which each latent fires."""
        return self.counts.double() / max(self.n_tokens, 1)

    def quantile(self, latent: int, q: float) -> float:
        """Magnitude below which a fraction `q` of a latent's firings lie, from the histogram: exact to a bin (9 %)."""
        below = self.histogram[latent].cumsum(0).double()
        wanted = q * below[-1]
        i = int(torch.searchsorted(below, wanted))
        before = below[i - 1] if i else torch.zeros(())
        fraction = float((wanted - before) / (below[i] - before).clamp(min=1))
        return min(bin_edge(i + fraction), float(self.maximum[latent]))

    def near_quantile(self, latent: int, q: float, *, within: float = 0.06) -> list[int]:
        """Slots of the sampled firings between the quantiles `q - within` and `q + within`, the closest to `q` first.

        The contexts in `top` are left out.
        """
        low, high = (self.quantile(latent, min(max(edge, 0), 1)) for edge in (q - within, q + within))
        sampled = self.sample.peak_values[latent].abs()
        distance = (sampled.clamp(min=bin_edge(0)).log() - math.log(self.quantile(latent, q))).abs()
        shown = set(self.top.positions[latent].tolist())
        fits = ((sampled >= low) & (sampled <= high) & (self.sample.positions[latent] >= 0)).tolist()
        positions = self.sample.positions[latent].tolist()
        return [s for s in distance.argsort(stable=True).tolist() if fits[s] and positions[s] not in shown]


def bin_edge(i: float) -> float:
    """Magnitude at which histogram bin `i` begins."""
    return 2.0 ** (i / BINS_PER_OCTAVE + _LOWEST_OCTAVE)


class Collector:
    """Folds batches of codes into a `Collected`.

    Args:
        d_sae: Number of latents.
        n_top: Strongest contexts kept per latent.
        n_sample: Random firings kept per latent.
        window: Tokens shown on either side of a firing.
        seed: Seed of the random sample.
        device: Where the statistics live; the device of the codes.
    """

    def __init__(
        self, d_sae: int, *, n_top: int = 20, n_sample: int = 40, window: int = 12, seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed = seed
        self.n_seen = self.n_tokens = 0
        self.counts = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.maximum = torch.zeros(d_sae, device=device)
        self.histogram = torch.zeros(d_sae * N_BINS, dtype=torch.int64, device=device)
        self.token_counts = torch.zeros(0, dtype=torch.int64, device=device)
        self.top = BestContexts(d_sae, n_top, window, device)
        self.sample = BestContexts(d_sae, n_sample, window, device)

    def add(
        self,
        codes: SparseCodes,
        ids: Int64[Tensor, "n context"],
        real: Bool[Tensor, "n context"],
        documents: Int64[Tensor, "n context"],
        counted: Bool[Tensor, "n context"],
    ) -> None:
        """Fold in a batch.

        Args:
            codes: Codes of every position of the batch, padding included, row after row.
            ids: Token ids.
            real: False on padding.
            documents: Number of the document that each token belongs to.
            counted: True where a token counts: real and not masked.
        """
        firings = Firings.of(codes, ids, real, self.n_seen)
        entries = counted.flatten()[firings.positions].nonzero().squeeze(1)
        latents, positions = firings.latents[entries], firings.positions[entries]
        magnitude = firings.values[entries].abs()

        self.n_tokens += int(counted.sum())
        token_counts = torch.bincount(ids[counted], minlength=len(self.token_counts))
        token_counts[: len(self.token_counts)] += self.token_counts
        self.token_counts = token_counts
        self.counts += torch.bincount(latents, minlength=len(self.counts))
        self.maximum.scatter_reduce_(0, latents, magnitude, "amax")
        bins = ((magnitude.log2() - _LOWEST_OCTAVE) * BINS_PER_OCTAVE).floor().long().clamp(0, N_BINS - 1)
        self.histogram.index_add_(0, latents * N_BINS + bins, torch.ones_like(bins))

        self.top.offer(firings, entries, magnitude, documents.flatten()[positions])
        stream_positions = positions + self.n_seen
        self.sample.offer(firings, entries, _uniform(self.seed, latents, stream_positions), stream_positions)
        self.n_seen += ids.numel()

    def finish(self) -> Collected:
        """The statistics of all batches so far, on the CPU."""
        histogram = self.histogram.view(-1, N_BINS)
        return Collected(
            self.n_tokens, self.counts.cpu(), self.maximum.cpu(), histogram.cpu(), self.token_counts.cpu(),
            self.top.contexts(), self.sample.contexts(),
        )  # fmt: skip


def _uniform(seed: int, latents: Tensor, positions: Tensor) -> Float[Tensor, " m"]:
    """A number in [0, 1) for each (latent, position), the same in every batching (splitmix64's mixing function)."""
    x = latents * -0x61C8864680B583EB + positions * -0x4B47D0C5A9D5F35B + seed * 0x9E3779B1
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((x >> 40) & 0xFFFFFF).float() / (1 << 24)
