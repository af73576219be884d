from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unweave.dashboard.collect import N_BINS, Collected, Collector, bin_edge
from unweave.sae import SparseCodes

ROWS, CONTEXT, D_SAE = 40, 16, 12


@pytest.fixture
def dense() -> Tensor:
    """Codes over 640 tokens: a third of the entries active, magnitudes over several decades, one latent dead."""
    generator = torch.Generator().manual_seed(0)
    values = (2 * torch.randn(ROWS, CONTEXT, D_SAE, generator=generator)).exp()
    values *= torch.rand(ROWS, CONTEXT, D_SAE, generator=generator) < 0.3
    values[:, :, 5] = 0
    return values


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 30, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def counted() -> Tensor:
    return torch.rand(ROWS, CONTEXT, generator=torch.Generator().manual_seed(2)) < 0.9


DOCUMENTS = (torch.arange(ROWS * CONTEXT) // 50).view(ROWS, CONTEXT)


def collect(
    dense: Tensor, ids: Tensor, counted: Tensor, *, step: int = 8, n_sample: int = 6, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Collected:
    collector = Collector(dense.shape[2], n_top=4, n_sample=n_sample, window=3, seed=seed)
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        codes = SparseCodes.from_dense(dense[part].flatten(0, 1).to(dtype))
        real = torch.ones_like(counted[part])
        collector.add(codes, ids[part], real, DOCUMENTS[: len(ids)][part], counted[part])
    return collector.finish()


def test_counts_against_dense_codes(dense: Tensor, ids: Tensor, counted: Tensor) -> None:
    found = collect(dense, ids, counted)
    seen = dense[counted]
    assert found.n_tokens == len(seen)
    assert torch.equal(found.counts, (seen != 0).sum(0))
    assert torch.equal(found.maximum, seen.amax(0))
    assert torch.equal(found.density, (seen != 0).double().mean(0))
    assert torch.equal(found.token_counts, torch.bincount(ids[counted], minlength=len(found.token_counts)))
    edges = torch.tensor([bin_edge(i) for i in range(N_BINS + 1)], dtype=torch.float64)
    for latent in range(D_SAE):
        values = seen[:, latent][seen[:, latent] != 0].double()
        expected = torch.histogram(values, bins=edges).hist.long()
        # A value on an edge may fall on either side of it in float32; here none does.
        assert torch.equal(found.histogram[latent], expected)


def test_batch_size_changes_nothing(dense: Tensor, ids: Tensor, counted: Tensor) -> None:
    once, by_rows, by_sevens = (collect(dense, ids, counted, step=step) for step in (ROWS, 1, 7))
    for other in (by_rows, by_sevens):
        assert other.n_tokens == once.n_tokens
        for name in ("counts", "maximum", "histogram", "token_counts"):
            assert torch.equal(getattr(other, name), getattr(once, name))
        for mine, theirs in zip((*other.top, *other.sample), (*once.top, *once.sample), strict=True):
            assert torch.equal(mine, theirs)


def test_the_sample_is_made_of_distinct_firings(dense: Tensor, ids: Tensor, counted: Tensor) -> None:
    sample = collect(dense, ids, counted, n_sample=10_000).sample
    for latent in range(D_SAE):
        fired = ((dense[:, :, latent] != 0) & counted).flatten().nonzero().flatten().tolist()
        positions = sample.positions[latent][sample.positions[latent] >= 0]
        assert sorted(positions.tolist()) == fired
        assert torch.equal(sample.peak_values[latent, : len(fired)], dense[:, :, latent].flatten()[positions])
    other = collect(dense, ids, counted, seed=1).sample
    assert not torch.equal(other.positions, collect(dense, ids, counted).sample.positions)


def test_the_sample_is_uniform() -> None:
    """Where every latent fires on every token, the sampled positions are spread evenly over the stream."""
    dense = torch.ones(ROWS, CONTEXT, 400)
    everything = torch.ones(ROWS, CONTEXT, dtype=torch.bool)
    sample = collect(dense, torch.zeros(ROWS, CONTEXT).long(), everything, n_sample=8).sample
    counts = torch.histc(sample.positions.float(), bins=10, min=0, max=ROWS * CONTEXT - 1)
    expected = 400 * 8 / 10
    assert ((counts - expected).abs() < 5 * math.sqrt(expected)).all()


def test_pitfall_330_quantiles_are_those_of_the_active_tokens() -> None:
    """Equal-width intervals of a heavy-tailed latent would put its median at half the maximum."""
    uniform = torch.rand(ROWS, CONTEXT, 3, generator=torch.Generator().manual_seed(0))
    dense = uniform.pow(-1.5)  # Pareto: maximum in the thousands, median 2.8
    dense[:, ::2] = 0
    everything = torch.ones(ROWS, CONTEXT, dtype=torch.bool)
    found = collect(dense, torch.zeros(ROWS, CONTEXT).long(), everything, n_sample=64)
    for latent in range(3):
        values = dense[:, 1::2, latent].flatten()
        for q in (0.1, 0.5, 0.9):
            assert found.quantile(latent, q) == pytest.approx(float(values.quantile(q)), rel=0.1)
            slots = found.near_quantile(latent, q)
            assert len(slots) >= 5
            ranks = torch.stack([(values <= v).float().mean() for v in found.sample.peak_values[latent, slots]])
            assert ((ranks - q).abs() < 0.12).all()
            assert not set(found.sample.positions[latent, slots].tolist()) & set(found.top.positions[latent].tolist())
        assert found.quantile(latent, 1.0) == pytest.approx(float(values.max()), rel=1e-6)


def test_pitfall_343_tokens_that_are_masked_never_top_a_list(dense: Tensor, ids: Tensor) -> None:
    dense[:, 0] *= 1000  # the first token of each row is an attention sink
    counted = torch.ones(ROWS, CONTEXT, dtype=torch.bool)
    counted[:, 0] = False
    found = collect(dense, ids, counted)
    used = found.top.positions[found.top.positions >= 0]
    assert (used % CONTEXT != 0).all()
    documents = found.top.groups
    assert all(len(set(d)) == len(d) for d in ([g for g in row if g >= 0] for row in documents.tolist()))


def test_pitfall_344_codes_in_bf16(dense: Tensor, ids: Tensor, counted: Tensor) -> None:
    low, high = collect(dense, ids, counted, dtype=torch.bfloat16), collect(dense, ids, counted)
    assert torch.equal(low.counts, high.counts)
    torch.testing.assert_close(low.maximum, high.maximum, rtol=1e-2, atol=0)


def test_signed_codes_count_by_magnitude(ids: Tensor) -> None:
    dense = torch.zeros(ROWS, CONTEXT, 1)
    dense[3, 4], dense[7, 8] = -5.0, 2.0
    found = collect(dense, ids, torch.ones(ROWS, CONTEXT, dtype=torch.bool))
    assert found.maximum.tolist() == [5]
    assert found.top.peak_values[0, :2].tolist() == [-5, 2]


def test_masks_that_leave_nothing(dense: Tensor, ids: Tensor) -> None:
    found = collect(dense, ids, torch.zeros(ROWS, CONTEXT, dtype=torch.bool))
    assert found.n_tokens == 0
    assert not found.counts.any()
    assert not found.density.any()
