"""Pairs by |cos|: optimal where exact, a valid matching that is nearly as good where greedy."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from unweave._errors import UnweaveError
from unweave.synthetic import matching
from unweave.synthetic.matching import best_features, feature_uniqueness, match, mean_correlation_coefficient


def vectors(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def cosines(a, b):
    return (normalize(a.double(), dim=1) @ normalize(b.double(), dim=1).T).abs()


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 5), m=st.integers(1, 5), seed=st.integers(0, 1000))
def test_the_matching_is_the_best_of_all(n, m, seed):
    a, b = vectors(n, 3, seed), vectors(m, 3, seed + 1)
    table = cosines(a, b)
    table = table if n <= m else table.T
    orders = itertools.permutations(range(max(n, m)), min(n, m))
    best = max(sum(float(table[i, j]) for i, j in enumerate(order)) for order in orders)
    found = match(a, b)
    assert float(found.similarity.double().sum()) == pytest.approx(best, abs=1e-5)
    assert mean_correlation_coefficient(a, b) == pytest.approx(best / min(n, m), abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 60), m=st.integers(1, 60), seed=st.integers(0, 1000), exact=st.booleans())
def test_pairs_are_one_to_one(n, m, seed, exact):
    a, b = vectors(n, 4, seed), vectors(m, 4, seed + 1)
    found = match(a, b, exact_up_to=60 if exact else 0)
    assert found.method == ("hungarian" if exact else "greedy")
    assert len(found.a) == len(found.a.unique()) == len(found.b.unique()) == min(n, m)
    assert torch.equal(found.a, found.a.sort().values)
    torch.testing.assert_close(found.similarity.double(), cosines(a, b)[found.a, found.b], atol=1e-6, rtol=0)


def greedy_by_hand(table):
    """The strongest pair, then the strongest of what is left, and so on."""
    table, total = table.clone(), 0.0
    for _ in range(min(table.shape)):
        at = int(table.argmax())
        i, j = divmod(at, table.shape[1])
        total += float(table[i, j])
        table[i], table[:, j] = -1, -1
    return total


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), m=st.integers(1, 30), seed=st.integers(0, 1000))
def test_greedy_takes_the_strongest_first(n, m, seed):
    """With all of the other side as neighbours, it is the greedy choice in every step."""
    a, b = vectors(n, 3, seed), vectors(m, 3, seed + 1)
    greedy = match(a, b, exact_up_to=0).similarity.double().sum()
    assert float(greedy) == pytest.approx(greedy_by_hand(cosines(a, b)), abs=1e-5)
    assert float(greedy) <= float(match(a, b).similarity.double().sum()) + 1e-5


def test_greedy_finds_what_was_recovered():
    truth = vectors(3000, 64)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(2))[:2000]
    found = match(truth[order] + 0.1 * vectors(2000, 64, seed=1), truth, exact_up_to=100)
    assert found.method == "greedy"
    assert torch.equal(found.b, order)


def test_greedy_when_all_neighbours_are_taken():
    """Latents that all point the same way have the same few neighbours; each still gets a feature of its own."""
    a = torch.ones(200, 8) + 1e-3 * vectors(200, 8)
    found = match(a, vectors(300, 8, seed=1), exact_up_to=0)
    assert len(found.b.unique()) == 200
    assert found.similarity.max() > 0.7
    assert found.similarity.min() < 0.3


def test_tiles_make_no_difference(monkeypatch):
    a, b = vectors(70, 6), vectors(50, 6, seed=1)

    def everything():
        exact, greedy, (best, similarity) = match(a, b), match(a, b, exact_up_to=0), best_features(a, b)
        return [exact.b, exact.similarity, greedy.b, greedy.similarity, best, similarity]

    whole = everything()
    monkeypatch.setattr(matching, "_TILE_ROWS", 16)
    monkeypatch.setattr(matching, "_TILE_COLUMNS", 7)
    monkeypatch.setattr(matching, "_TILE_ELEMENTS", 100)
    torch.testing.assert_close(everything(), whole)


def test_the_sign_and_the_length_do_not_matter():
    a = vectors(10, 16)
    assert mean_correlation_coefficient(a, -3 * a.flip(0)) == pytest.approx(1, abs=1e-6)
    assert mean_correlation_coefficient(a, a) <= 1


def test_best_features_may_be_shared():
    truth = torch.eye(4)
    latents = torch.tensor([[1.0, 0.1, 0, 0], [2.0, -0.1, 0, 0], [0, 0, -1.0, 0]])
    index, similarity = best_features(latents, truth)
    assert index.tolist() == [0, 0, 2]
    torch.testing.assert_close(similarity, torch.tensor([1 / 1.01**0.5, 2 / 4.01**0.5, 1.0]))
    assert feature_uniqueness(latents, truth) == pytest.approx(2 / 3)


def test_uniqueness_is_bounded_by_the_number_of_features():
    assert feature_uniqueness(vectors(40, 8), vectors(10, 8, seed=1)) <= 0.25


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(0, 3), torch.ones(2, 3), r"first set.*\(0, 3\)"),
        (torch.ones(2, 3), torch.ones(3), r"second set.*\(3,\)"),
        (torch.ones(2, 3), torch.ones(2, 4), "different widths, 3 and 4"),
        (torch.full((2, 3), float("nan")), torch.ones(2, 3), "first set.*NaN"),
    ],
)
def test_bad_vectors(a, b, message):
    for function in (match, mean_correlation_coefficient, best_features, feature_uniqueness):
        with pytest.raises(UnweaveError, match=message):
            function(a, b)
