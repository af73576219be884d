"""Comparisons of what is random are at fixed seeds, with Z = 5 standard deviations: 6e-7 for each if all is right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import kstest, multivariate_normal, truncnorm
from torch import Tensor

from unweave import SparseCodes, UnweaveError
from unweave.synthetic.correlation import LowRankCorrelationMatrix, generate_random_low_rank_correlation_matrix
from unweave.synthetic.generator import ActivationGenerator
from unweave.synthetic.modifier import hierarchy_modifier
from unweave.synthetic.node import HierarchyNode

Z = 5.0
P = torch.tensor([0.3, 0.05, 0.6, 1.0, 0.01])


def assert_rates(hits: Tensor, n: Tensor | int, p: Tensor) -> None:
    p = p.double()
    assert ((hits - n * p).abs() / (n * p * (1 - p)).sqrt().clamp(min=1e-9)).max() < Z


@pytest.mark.parametrize("std", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("mean", [1.0, 0.3])
def test_rates_are_the_probabilities_whatever_the_magnitudes(mean, std):
    """D-SY-6: a magnitude that is rounded up to 0 would lower the rate."""
    n = 100_000
    generator = ActivationGenerator(5, P, std, mean, seed=0)
    counts = sum(generator.sample_codes(20_000).firing_counts() for _ in range(5))
    assert_rates(counts, n, P)


def test_magnitudes_are_the_gaussian_given_that_it_is_positive():
    mean, std = torch.tensor([1.0, 0.2, -0.5, 2.0, -10.0]), torch.tensor([0.1, 0.5, 1.0, 0.0, 1.0])
    activations = ActivationGenerator(5, 0.5, std, mean, seed=1).sample(40_000)
    for i in (0, 1, 2, 4):
        values = activations[:, i][activations[:, i] != 0].double()
        assert (values > 0).all()
        law = truncnorm(-mean[i] / std[i], math.inf, loc=mean[i], scale=std[i])
        assert kstest(values.numpy(), law.cdf).pvalue > 1e-6  # its own error rate
    assert set(activations[:, 3].tolist()) == {0.0, 2.0}


def test_magnitudes_of_different_entries_are_independent():
    activations = ActivationGenerator(2, 1.0, 0.3, seed=2).sample(100_000)
    assert abs(torch.corrcoef(activations.T)[0, 1]) * 100_000**0.5 < Z
    assert abs(torch.corrcoef(torch.stack([activations[1:, 0], activations[:-1, 0]]))[0, 1]) * 100_000**0.5 < Z


def test_a_feature_of_magnitude_zero_never_shows():
    codes = ActivationGenerator(2, 1.0, mean_firing_magnitudes=torch.tensor([0.0, 1.0]), seed=0).sample_codes(10)
    assert codes.indices.tolist() == [1] * 10


CORRELATIONS: list[Any] = [
    None,
    torch.tensor([[1.0, 0.5, 0, 0, 0], [0.5, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]),
    LowRankCorrelationMatrix(torch.full((5, 1), 0.6), torch.full((5,), 0.64)),
    (torch.full((5, 1), 0.6), torch.full((5,), 0.64)),
]


@pytest.mark.parametrize("correlation", CORRELATIONS, ids=["independent", "full", "low-rank", "pair"])
def test_three_forms_of_the_same_draws(correlation):
    def make(**options: Any) -> ActivationGenerator:
        return ActivationGenerator(5, P, 0.2, correlation_matrix=correlation, seed=3, **options)

    dense, codes, coo = make().sample(50), make().sample_codes(50), make(use_sparse_tensors=True).sample(50)
    assert dense.shape == (50, 5)
    assert torch.equal(make()(50), dense)
    assert torch.equal(codes.to_dense(), dense)
    assert coo.layout == torch.sparse_coo
    assert torch.equal(coo.to_dense(), dense)
    for row in range(50):
        indices = codes.indices[codes.offsets[row] : codes.offsets[row + 1]]
        assert (indices.diff() > 0).all()


def test_a_seed_gives_the_same_stream_whatever_else_draws():
    first, second = ActivationGenerator(5, P, 0.2, seed=3), ActivationGenerator(5, P, 0.2, seed=3)
    for _ in range(3):
        a = first.sample(20)
        torch.rand(7)
        assert torch.equal(a, second.sample(20))
    state = torch.get_rng_state()
    first.sample(20)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.sample(20), first.sample(20))
    assert not torch.equal(ActivationGenerator(5, P, 0.2, seed=4).sample(20), first.fork(3).sample(20))


def test_without_a_seed_one_is_drawn_and_kept():
    torch.manual_seed(5)
    generator, other = ActivationGenerator(5, P), ActivationGenerator(5, P)
    assert generator.seed != other.seed
    torch.manual_seed(5)
    assert ActivationGenerator(5, P).seed == generator.seed
    sampled = generator.sample(20)
    assert torch.equal(generator.fork(generator.seed).sample(20), sampled)
    assert generator.fork().seed != generator.seed


def test_a_fork_shares_parameters_and_not_the_stream():
    generator = ActivationGenerator(5, P, 0.2, seed=0)
    expected = generator.fork(0).sample(30)
    fork = generator.fork(0)
    generator.sample(10)
    assert torch.equal(fork.sample(30), expected)
    fork.to(torch.float64)
    assert generator.sample(1).dtype == torch.float32


def test_thresholds_follow_the_probabilities():
    """D-SY-2: probabilities that are changed or replaced change what is drawn, with and without a copula."""
    n, new = 50_000, torch.tensor([0.02, 0.5, 0.1, 0.9, 0.3])
    for correlation in CORRELATIONS:
        for replace in (False, True):
            generator = ActivationGenerator(5, P, correlation_matrix=correlation, seed=0)
            generator.sample(3)
            if replace:
                generator.firing_probabilities = new
            else:
                generator.firing_probabilities.copy_(new)
            assert_rates(generator.sample_codes(n).firing_counts(), n, new)


def test_the_callers_tensor_is_not_kept():
    p = P.clone()
    generator = ActivationGenerator(5, p, seed=0)
    p.fill_(1)
    assert torch.equal(generator.firing_probabilities, P)


def test_probabilities_that_were_replaced_are_checked():
    generator = ActivationGenerator(5, P)
    generator.firing_probabilities[2] = 1.5
    with pytest.raises(UnweaveError, match=r"^firing_probabilities must be in \(0, 1\], got 1.5 for feature 2\.$"):
        generator.sample(1)


def test_the_copula_correlates_what_the_generator_draws():
    n, p = 200_000, torch.full((2,), 0.1)
    both = multivariate_normal.cdf([-1.2815515655446004] * 2, mean=[0, 0], cov=[[1, 0.5], [0.5, 1]])
    low_rank = LowRankCorrelationMatrix(torch.full((2, 1), 0.5**0.5), torch.full((2,), 0.5))
    for correlation in (torch.tensor([[1.0, 0.5], [0.5, 1.0]]), low_rank):
        fires = ActivationGenerator(2, p, 0.1, correlation_matrix=correlation, seed=0).sample(n) > 0
        assert_rates(fires.sum(0), n, p)
        assert_rates(fires.all(1).sum(), n, torch.tensor(both))


def test_moving_changes_nothing():
    """pitfall_347"""
    for correlation in CORRELATIONS:
        generator = ActivationGenerator(5, P, 0.2, correlation_matrix=correlation, use_sparse_tensors=True, seed=0)
        expected = generator.fork(0)
        generator.sample(10), expected.sample(10)
        moved = generator.to("cpu")
        assert moved is generator
        assert moved.use_sparse_tensors
        assert torch.equal(moved.sample(20).to_dense(), expected.sample(20).to_dense())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_seed_gives_the_same_stream_on_a_gpu():
    tree = HierarchyNode(0, [HierarchyNode(1), HierarchyNode(2)], mutually_exclusive_children=True)
    for correlation in CORRELATIONS:
        generator = ActivationGenerator(5, P, 0.2, 1.0, hierarchy_modifier(tree), correlation, seed=0)
        moved = generator.fork(0).to("cuda")
        made = ActivationGenerator(5, P, 0.2, 1.0, hierarchy_modifier(tree), correlation, "cuda", seed=0)
        for _ in range(2):
            expected = generator.sample(100)
            for other in (moved, made):
                sampled = other.sample(100)
                assert sampled.is_cuda
                assert torch.equal(sampled.cpu(), expected)
        assert moved.sample_codes(3).indices.is_cuda


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_those_of_the_activations_and_not_of_the_parameters(dtype):
    p = torch.full((5,), 0.30103)
    made = ActivationGenerator(5, p, 0.2, dtype=dtype, seed=0)
    cast = ActivationGenerator(5, p, 0.2, seed=0).to(dtype)
    for generator in (made, cast):
        assert generator.sample(4).dtype == generator.sample_codes(4).values.dtype == dtype
        assert generator.firing_probabilities.dtype in (torch.float32, torch.float64)
        assert torch.equal(generator.firing_probabilities.float(), p)
        assert (generator.sample_codes(2000).values > 0).all()
    assert ActivationGenerator(5, p, dtype="bfloat16").dtype == torch.bfloat16


class TestModifiers:
    def test_one_argument_or_two_in_order_and_relu_at_the_end(self):
        seen = []

        def one(batch: Tensor) -> Tensor:
            seen.append((batch.shape, batch.layout))
            return batch + 1

        def two(batch: Tensor, generator: ActivationGenerator) -> Tensor:
            seen.append(generator)
            return torch.where(batch == 2, -1.0, batch * 3)

        generator = ActivationGenerator(5, 0.5, modify_activations=[one, two], seed=0)
        plain = ActivationGenerator(5, 0.5, seed=0)
        fires = plain._activations(1)  # takes no seed of modifiers, so its stream is another
        assert fires.n_rows == 1
        sampled = generator.sample(100)
        assert set(sampled.unique().tolist()) == {0.0, 3.0}
        assert seen == [((100, 5), torch.strided), generator]
        codes = generator.fork(0).sample_codes(100)
        assert torch.equal(codes.to_dense(), sampled)
        assert (codes.values > 0).all()

    def test_a_single_modifier_and_one_that_is_an_object(self):
        class Halve:
            def __call__(self, batch: Tensor) -> Tensor:
                return batch / 2

        sampled = ActivationGenerator(5, 0.5, modify_activations=Halve(), seed=0).sample(50)
        assert set(sampled.unique().tolist()) == {0.0, 0.5}
        assert ActivationGenerator(5, 1.0, modify_activations=torch.neg, seed=0).sample(2).eq(0).all()

    def test_coo_and_codes_where_they_are_asked_for(self):
        def layout(batch: Tensor) -> Tensor:
            assert batch.layout == torch.sparse_coo
            return batch * 2

        def codes(batch: SparseCodes) -> SparseCodes:
            assert isinstance(batch, SparseCodes)
            return batch.with_values(torch.where(batch.indices == 0, -batch.values, batch.values))

        codes.takes_codes = True  # type: ignore[attr-defined]
        generator = ActivationGenerator(5, 0.5, modify_activations=[layout, codes], use_sparse_tensors=True, seed=0)
        sampled = generator.sample(40).coalesce()
        assert (sampled.values() == 2).all()
        assert (sampled.indices()[1] > 0).all()
        assert torch.equal(generator.fork(0).sample_codes(40).to_dense(), sampled.to_dense())

    @pytest.mark.parametrize("wrong", [lambda batch: batch[:1], lambda batch: None])
    def test_what_returns_something_else_is_refused(self, wrong):
        with pytest.raises(UnweaveError, match=r"a modifier must return activations of the shape \(4, 5\), got "):
            ActivationGenerator(5, 0.5, modify_activations=wrong).sample(4)

    def test_a_hierarchys_conditional_probabilities(self):
        n = 200_000
        tree = HierarchyNode(0, [HierarchyNode(1, [HierarchyNode(2)]), HierarchyNode(3)])
        p = torch.tensor([0.4, 0.5, 0.2, 0.7, 0.3])
        fires = ActivationGenerator(5, p, 0.2, modify_activations=hierarchy_modifier(tree), seed=0).sample(n) > 0
        assert_rates(fires[:, [0, 4]].sum(0), n, p[[0, 4]])
        for parent, child in ((0, 1), (1, 2), (0, 3)):
            assert not fires[:, child][~fires[:, parent]].any()
            assert_rates(fires[:, child].sum(), int(fires[:, parent].sum()), p[child])

    def test_exclusive_children_and_that_the_seed_repeats_the_draws_among_them(self):
        n = 100_000
        tree = HierarchyNode(None, [HierarchyNode(0), HierarchyNode(1)], mutually_exclusive_children=True)
        modifier = hierarchy_modifier(tree, seed=9)
        generator = ActivationGenerator(2, 0.5, modify_activations=modifier, seed=0)
        sampled = generator.sample(n)
        fires = sampled > 0
        assert not fires.all(1).any()
        assert_rates(fires.sum(0), n, torch.tensor([0.375, 0.375]))  # alone 1/4, or one of two that win 1/2 of 1/4
        modifier(sampled)  # somebody else's draws
        assert torch.equal(generator.fork(0).sample(n), sampled)
        assert torch.equal(ActivationGenerator(2, 0.5, modify_activations=modifier, seed=0).sample(n), sampled)

    def test_the_draws_among_exclusive_children_depend_on_nothing_else(self):
        """The winner must not be foretold by what fires or by magnitudes, as it would if streams had one seed."""
        n = 100_000
        tree = HierarchyNode(None, [HierarchyNode(0), HierarchyNode(1)], mutually_exclusive_children=True)
        p = torch.tensor([1.0, 1.0, 0.5])
        fires = ActivationGenerator(3, p, 0.1, modify_activations=hierarchy_modifier(tree), seed=0).sample(n) > 0
        for other in (True, False):
            rows = fires[:, 2] == other
            assert_rates(fires[rows, 0].sum(), int(rows.sum()), torch.tensor(0.5))


def test_a_million_features_are_drawn_sparsely():
    k = 1_000_000
    p = torch.logspace(-6, -2.5, k)
    codes = ActivationGenerator(k, p, 0.1, seed=0).sample_codes(64)  # dense, this would be 256 MB
    assert abs(len(codes.indices) - 64 * p.sum()) < Z * (64 * p.sum()) ** 0.5
    correlation = generate_random_low_rank_correlation_matrix(1000, 4, 0.1, seed=0)
    assert ActivationGenerator(1000, 0.01, correlation_matrix=correlation, seed=0).sample_codes(64).d_sae == 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_features": 0}, "num_features must be a whole number of at least 1, got 0"),
        ({"firing_probabilities": 0.0}, r"firing_probabilities must be in \(0, 1\], got 0"),
        ({"firing_probabilities": torch.tensor([0.1, 0.2, 1.2])}, r"in \(0, 1\], got 1.2 for feature 2"),
        ({"firing_probabilities": torch.tensor([0.1, math.nan, 0.2])}, "finite, got nan for feature 1"),
        ({"firing_probabilities": torch.rand(4)}, r"firing_probabilities .* \(3,\), got \(4,\)"),
        ({"std_firing_magnitudes": torch.rand(1)}, r"std_firing_magnitudes .* \(3,\), got \(1,\)"),
        ({"std_firing_magnitudes": -0.1}, "std_firing_magnitudes must be at least 0, got -0.1"),
        ({"mean_firing_magnitudes": torch.rand(3, 1)}, r"mean_firing_magnitudes .* \(3,\), got \(3, 1\)"),
        ({"mean_firing_magnitudes": -1.0}, "at least 0 where std_firing_magnitudes is 0, got -1"),
        ({"mean_firing_magnitudes": -4.0, "std_firing_magnitudes": 0.1}, "30 standard deviations below 0, got -4"),
        ({"mean_firing_magnitudes": math.inf}, "finite, got inf"),
        ({"correlation_matrix": torch.eye(2)}, r"correlation_matrix must have the shape \(3, 3\), got \(2, 2\)"),
        ({"correlation_matrix": (torch.zeros(2, 1), torch.ones(2))}, "shapes"),
        ({"dtype": "float33"}, "did you mean 'float32'"),
        ({"seed": "x"}, "seed must be a whole number"),
    ],
)
def test_bad_input(change, message):
    arguments = {"num_features": 3, "firing_probabilities": 0.1} | change
    with pytest.raises(UnweaveError, match=message) as caught:
        ActivationGenerator(**arguments)
    assert str(caught.value).endswith((".", "?"))


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_batch_sizes(size):
    with pytest.raises(UnweaveError, match="batch_size must be a whole number of at least 1"):
        ActivationGenerator(3, 0.1).sample(size)
