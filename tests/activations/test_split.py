from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unweave.activations.split import held_out_cutoff, held_out_score, is_held_out


def test_the_share_is_about_the_fraction_and_stable() -> None:
    held_out = [is_held_out(f"document {i}") for i in range(20_000)]
    assert abs(sum(held_out) / 20_000 - 0.05) < 0.01
    assert is_held_out("document 17") == held_out[17]


def test_the_seed_matters() -> None:
    texts = [f"document {i}" for i in range(1000)]
    assert {t for t in texts if is_held_out(t, 0.3, seed=0)} != {t for t in texts if is_held_out(t, 0.3, seed=1)}


def test_the_cutoff_is_the_hash_limit_where_both_sides_have_documents() -> None:
    scores = [(held_out_score(str(i)), 100) for i in range(300)]
    assert held_out_cutoff(scores, 0.05) == 0.05 * 2**64


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 10_000)), min_size=2, unique_by=lambda d: d[0]),
    st.floats(0.01, 0.9),
)
def test_both_sides_get_documents_and_the_order_does_not_matter(
    documents: list[tuple[int, int]], fraction: float
) -> None:
    cutoff = held_out_cutoff(documents, fraction)
    assert cutoff == held_out_cutoff(documents[::-1], fraction)
    assert 0 < sum(score < cutoff for score, _ in documents) < len(documents)


@pytest.mark.parametrize("score", [0, 2**64 - 1])
def test_a_lone_document_is_never_held_out(score: int) -> None:
    assert not score < held_out_cutoff([(score, 10), (score, 10)], 0.5)
