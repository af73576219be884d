from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from unweave.evaluation import CodeSums, ReconstructionSums, density
from unweave.evaluation import metrics as m
from unweave.sae import SAE, SparseCodes, TopK

BATCHES = [torch.tensor([[3.0, 1], [1, 1], [2, 4]]), torch.tensor([[0.0, 2], [4, 2], [2, -1]])]
MEAN = torch.tensor([2.0, 1.5])
# Reconstruction, exact explained variance, legacy, uncentred: worked out apart from this library.
GOLDEN = {
    "input": (lambda x: x, 1, 1),
    "mean": (lambda x: MEAN.expand_as(x), 0, -0.0125),
    "zero": (lambda x: 0 * x, -1.595745, -1.841667),
    "half of the variance": (lambda x: MEAN + (x - MEAN) * (1 - 1 / math.sqrt(2)), 0.5, 0.493750),
    "bias of 1": (lambda x: x + 1, 0.489362, 0.366667),
    "half": (lambda x: x / 2, 0.351064, 0.289583),
}


def sums_of(batches, reconstruct):
    sums = ReconstructionSums()
    for x in batches:
        sums.update(x, reconstruct(x))
    return sums


def in_batches(x, x_hat, sizes):
    sums = ReconstructionSums()
    for a, b in zip(x.split(sizes), x_hat.split(sizes), strict=True):
        sums.update(a, b)
    return sums


@pytest.fixture
def heavy_tailed():
    """1000 tokens of log-normal length, a large mean of their own in each dimension, and a noisy reconstruction."""
    x = torch.randn(1000, 12) * torch.randn(1000, 1).exp() + 5 * torch.randn(12)
    return x, x + 0.3 * torch.randn_like(x) + 0.1


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_table(name):
    """pitfall_001: explained variance subtracts the mean of each dimension, so predicting the mean scores 0."""
    reconstruct, exact, legacy = GOLDEN[name]
    sums = sums_of(BATCHES, reconstruct)
    assert m.explained_variance(sums) == pytest.approx(exact, abs=1e-6)
    assert m.explained_variance_legacy(sums) == pytest.approx(legacy, abs=1e-6)
    assert m.fvu(sums) == pytest.approx(1 - exact, abs=1e-6)


def test_input_scores_exactly_1_and_mean_exactly_0():
    assert m.explained_variance(sums_of(BATCHES, lambda x: x)) == 1
    assert m.explained_variance(sums_of(BATCHES, lambda x: MEAN.expand_as(x))) == 0


@pytest.mark.parametrize("size", [1, 8, 64])
def test_mse_does_not_depend_on_the_batch(size, heavy_tailed):
    """pitfall_002: summed over dimensions, mean over tokens, not divided by the tokens of a batch."""
    x, x_hat = heavy_tailed
    sums = in_batches(x, x_hat, size)
    expected = (x.double() - x_hat.double()).square().sum(1).mean()
    assert m.mse(sums) == pytest.approx(expected.item(), rel=1e-12)
    assert m.mse_per_dim(sums) == pytest.approx(expected.item() / 12, rel=1e-12)


def test_ratio_of_sums_not_mean_of_ratios(heavy_tailed):
    """pitfall_003: tokens of very different lengths tell the two apart; the exact form is numpy's."""
    x, x_hat = heavy_tailed
    sums = in_batches(x, x_hat, 100)
    a, b = x.double().numpy(), x_hat.double().numpy()
    expected = 1 - ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()
    assert m.explained_variance(sums) == pytest.approx(expected, rel=1e-12)
    assert abs(m.explained_variance_legacy(sums) - m.explained_variance(sums)) > 0.05


def test_constant_bias_counts(heavy_tailed):
    """pitfall_004"""
    x, _ = heavy_tailed
    scores = [m.explained_variance(in_batches(x, x + bias, 100)) for bias in (0, 0.5, 1)]
    assert scores[0] == 1
    assert scores[0] > scores[1] > scores[2]


def test_mean_of_each_dimension():
    """pitfall_005: with one mean for all dimensions, predicting each dimension's own would score far above 0."""
    x = torch.randn(500, 3) + torch.tensor([-50.0, 0, 50])
    assert m.explained_variance(in_batches(x, x.mean(0).expand_as(x), 100)) == pytest.approx(0, abs=1e-6)


def all_metrics(sums):
    skip = {"explained_variance_legacy"}
    functions = [f.function for f in m.METRICS if f.group in ("reconstruction", "shrinkage")]
    return {f.__name__: f(sums) for f in functions if f.__name__ not in skip}


def test_unequal_batches_and_a_short_last_one(heavy_tailed):
    """pitfall_007 and pitfall_008: no ratio is averaged over batches."""
    x, x_hat = heavy_tailed
    whole = all_metrics(in_batches(x, x_hat, 1000))
    for sizes in ([1, 999], [500, 499, 1], 64, 7):
        assert all_metrics(in_batches(x, x_hat, sizes)) == pytest.approx(whole, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 59), max_size=6, unique=True), seed=st.integers(0, 2**16))
def test_exact_form_is_invariant(cuts, seed):
    """To batching, to a common shift, and to a rotation."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(60, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    ends = [0, *sorted(cuts), 60]
    sizes = [b - a for a, b in pairwise(ends)]
    expected = m.explained_variance(in_batches(x, x + noise, 60))
    for y, y_hat in ((x, x + noise), (x + 7, x + noise + 7), (x @ rotation, (x + noise) @ rotation)):
        assert m.explained_variance(in_batches(y, y_hat, sizes)) == pytest.approx(expected, abs=1e-9)


def test_a_large_mean_does_not_cancel():
    """With `Σx² - (Σx)²/N` in float64, a mean of 1e8 leaves nothing of a variance of 1."""
    x = torch.randn(4000, 3, dtype=torch.float64) + 1e8
    x_hat = x + 0.5 * torch.randn_like(x)
    a, b = x.numpy(), x_hat.numpy()
    expected = 1 - ((a - b) ** 2).sum() / ((a - a.mean(0, dtype=np.longdouble)) ** 2).sum()
    assert m.explained_variance(in_batches(x, x_hat, 64)) == pytest.approx(float(expected), rel=1e-9)


def test_sums_of_parts_add_up(heavy_tailed):
    x, x_hat = heavy_tailed
    parts = [in_batches(a, b, 10) for a, b in zip(x.split(300), x_hat.split(300), strict=True)]
    together = ReconstructionSums() + parts[0] + parts[1] + parts[2] + parts[3] + ReconstructionSums()
    whole = in_batches(x, x_hat, 10)
    assert together.n_tokens == 1000
    assert all_metrics(together) == pytest.approx(all_metrics(whole), rel=1e-12)


def test_published_sums_give_the_metrics_back(heavy_tailed):
    x, x_hat = heavy_tailed
    sums = in_batches(x, x_hat, 64)
    d = sums.to_dict()
    variance = d["sum_sq_in"] - sum(s * s for s in d["sum_in"]) / d["n_tokens"]
    assert 1 - d["sse_recon"] / variance == pytest.approx(m.explained_variance(sums), rel=1e-9)
    assert d["sum_in"] == pytest.approx(x.double().sum(0).tolist(), rel=1e-9)
    assert (d["n_tokens"], d["d_in"]) == (1000, 12)


def test_constant_or_no_data_has_no_explained_variance():
    """pitfall_028: null, unless the reconstruction is exact."""
    constant = torch.full((10, 3), 2.0)
    assert m.explained_variance(in_batches(constant, constant + 1, 5)) is None
    assert m.explained_variance(in_batches(constant, constant.clone(), 5)) == 1
    empty = in_batches(torch.zeros(0, 3), torch.zeros(0, 3), 5)
    assert set(all_metrics(empty).values()) == {None}
    assert m.explained_variance_legacy(empty) is None


def test_zero_vectors_have_no_cosine_and_no_norm_ratio():
    x, x_hat = torch.tensor([[0.0, 0], [3, 4], [6, 8]]), torch.tensor([[1.0, 0], [3, 4], [0, 0]])
    sums = in_batches(x, x_hat, 3)
    assert (int(sums.n_cosine), m.cosine(sums)) == (1, 1)
    assert (int(sums.n_ratio), m.l2_ratio(sums)) == (2, 0.5)
    assert (m.l2_norm_in(sums), m.l2_norm_out(sums)) == (5, 2)


def test_relative_bias_of_a_shrunken_reconstruction():
    x = torch.randn(100, 4)
    assert m.relative_reconstruction_bias(in_batches(x, 0.8 * x, 30)) == pytest.approx(0.8, rel=1e-6)
    assert m.relative_reconstruction_bias(in_batches(x, 0 * x, 30)) is None


def codes(dense):
    return SparseCodes.from_dense(torch.tensor(dense))


def test_signed_codes():
    """pitfall_010: a negative code fires, and L1 is of absolute values."""
    sums = CodeSums(3)
    sums.update(codes([[-2.0, 0, 1], [0, 0, -3]]))
    assert m.l0(sums) == 1.5
    assert m.l1(sums) == 3
    assert density.feature_density(sums).tolist() == [0.5, 0, 1]


def test_an_entry_of_value_0_did_not_fire():
    sums = CodeSums(3)
    sums.update(SparseCodes(torch.tensor([0, 2]), torch.tensor([0.0, 1]), torch.tensor([0, 2]), 3))
    assert m.l0(sums) == 1
    assert sums.counts().tolist() == [0, 0, 1]
    assert sums.prompt_counts().tolist() == [0, 0, 1]


def test_leading_dimensions_are_rows():
    """pitfall_025: (2, 3, d) has the codes of (6, d)."""
    sae, x = SAE(5, 8, TopK(2)), torch.randn(2, 3, 5)
    flat, deep = CodeSums(8), CodeSums(8)
    flat.update(sae.encode_sparse(x.reshape(6, 5)))
    deep.update(sae.encode_sparse(x))
    assert (m.l0(deep), m.l1(deep), deep.n_tokens) == (m.l0(flat), m.l1(flat), 6)


def test_densities():
    """100 tokens on which four latents fire 0, 1, 5 and 50 times."""
    dense = torch.zeros(100, 4)
    for latent, times in enumerate((0, 1, 5, 50)):
        dense[:times, latent] = 1
    sums = CodeSums(4)
    for part in dense.split(33):
        sums.update(SparseCodes.from_dense(part))
    assert density.feature_density(sums).tolist() == [0, 0.01, 0.05, 0.5]
    assert (m.frac_alive(sums), m.n_dead(sums), m.n_dense(sums)) == (0.75, 1, 1)
    assert (m.freq_over_1_percent(sums), m.freq_over_10_percent(sums)) == (0.5, 0.25)
    assert m.normalized_freq_over_1_percent(sums) == pytest.approx(55 / 56)
    assert m.normalized_freq_over_10_percent(sums) == pytest.approx(50 / 56)
    histogram = density.density_histogram(sums)
    assert histogram == {"log10_edges": [-2, -1.5, -1, -0.5, 0], "counts": [1, 1, 0, 1], "dead": 1}


def test_no_density_is_claimed_that_the_sample_cannot_resolve():
    """pitfall_027: of 100,000 tokens, a latent that fires once is in the lowest bin, which ends at one firing."""
    sums, n = CodeSums(3), 100_000
    rows = torch.tensor([0, 5, 70])
    once_and_twice = SparseCodes.from_entries(rows, torch.tensor([1, 2, 2]), torch.ones(3), n, 3)
    sums.update(once_and_twice)
    histogram = density.density_histogram(sums)
    assert 10 ** histogram["log10_edges"][0] == pytest.approx(1 / n)
    assert histogram["counts"][0] == 2
    assert (m.n_dead(sums), histogram["dead"]) == (1, 1)
    assert m.frac_alive(sums) == pytest.approx(2 / 3)


def test_sums_do_not_grow_with_the_tokens():
    """pitfall_040: nothing is kept for each token; ten times the tokens take the same memory."""

    def held(sums):
        sizes = {torch.Tensor: torch.Tensor.numel, list: len, dict: len}
        return [sizes.get(type(value), lambda _: 1)(value) for value in vars(sums).values()]

    sizes = []
    for n in (100, 1000):
        reconstruction, firing = ReconstructionSums(), CodeSums(6)
        for _ in range(10):
            x = torch.randn(n // 10, 4)
            reconstruction.update(x, x + 1)
            firing.update(SparseCodes.from_dense(torch.randn(n // 10, 6).relu()), torch.arange(n // 10) // 5)
        sizes.append(held(reconstruction) + held(firing))
        assert (reconstruction.n_tokens, firing.n_tokens) == (n, n)
    assert sizes[0] == sizes[1]


def test_density_histogram_holds_every_living_latent():
    dense = (torch.rand(1000, 50) < torch.rand(50) ** 3).float()
    sums = CodeSums(50)
    sums.update(SparseCodes.from_dense(dense))
    histogram = density.density_histogram(sums)
    assert sum(histogram["counts"]) + histogram["dead"] == 50
    # The upper edge belongs to a bin, and the least possible density to the lowest one.
    edges = 10 ** torch.tensor(histogram["log10_edges"], dtype=torch.float64) * (1 + 1e-9)
    edges[0] = 0
    assert histogram["counts"] == torch.histogram(density_above_0(sums), edges).hist.tolist()


def density_above_0(sums):
    shares = density.feature_density(sums)
    return shares[shares > 0]


def test_consistent_activation():
    """pitfall_030: firings per prompt with a firing; prompts of different batches are different prompts."""
    sums = CodeSums(3)
    sums.update(codes([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]), torch.tensor([0, 0, 1]))
    sums.update(codes([[1.0, 0, 0]]), torch.tensor([0]))
    heuristic = density.consistent_activation_heuristic(sums).tolist()
    assert heuristic[:2] == [1.5, 1]
    assert math.isnan(heuristic[2])
    assert sums.n_prompts == 3


def test_code_sums_do_not_depend_on_the_batch_and_add_up():
    dense = torch.randn(60, 9) * (torch.rand(60, 9) < 0.2)
    prompts = torch.arange(60) // 10
    whole, parts = CodeSums(9), [CodeSums(9), CodeSums(9)]
    whole.update(SparseCodes.from_dense(dense), prompts)
    for i, part in enumerate(parts):
        for start in (30 * i, 30 * i + 10, 30 * i + 20):
            part.update(SparseCodes.from_dense(dense[start : start + 10]))
    together = parts[0] + parts[1]
    assert together.counts().equal(whole.counts())
    assert together.prompt_counts().equal(whole.prompt_counts())
    assert together.to_dict() == pytest.approx(whole.to_dict())


def test_no_tokens_have_no_sparsity():
    assert {f.function(CodeSums(4)) for f in m.METRICS if f.group == "sparsity"} == {None}


@pytest.mark.parametrize("signed", [False, True])
def test_a_million_latents_take_no_more_operations_than_ten(signed):
    """pitfall_310: nothing goes through latents one by one."""

    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for d_sae in (10, 1_000_000):
        values = torch.tensor([1.0, -2.0, 3.0]) if signed else torch.tensor([1.0, 2.0, 3.0])
        codes = SparseCodes(torch.tensor([1, 4, 4]), values, torch.tensor([0, 2, 3]), d_sae)
        sums = CodeSums(d_sae)
        with Operations() as operations:
            sums.update(codes, torch.tensor([0, 1]))
            found = {f.name: f.function(sums) for f in m.METRICS if f.group == "sparsity"}
            density.density_histogram(sums)
            density.feature_density(sums)
            density.consistent_activation_heuristic(sums)
        assert found["sparsity/l0"] == 1.5
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_each_definition_is_one_function():
    """pitfall_006: every metric id maps to one function, and every metric has its place and its words."""
    assert len({f.id for f in m.METRICS}) == len({f.name for f in m.METRICS}) == len({f.function for f in m.METRICS})
    assert all(f.definition and f.id.partition("@")[2] for f in m.METRICS)


def test_alive_share_says_of_how_many_tokens():
    """pitfall_029"""
    said = m.definitions(123_456)
    for name in ("sparsity/frac_alive", "sparsity/n_dead"):
        assert "123,456 tokens" in said[name]["definition"]
