"""Selection against sorting."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave import kernels
from unweave.kernels import BatchTopKCandidates, encode_select


def brute_force_topk(pre, k):
    """Indices of the k largest of each row; ties go to the lowest index."""
    order = sorted(range(len(pre)), key=lambda i: (-pre[i], i))
    return sorted(order[:k])


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=5, max_size=5), min_size=1, max_size=6),
    st.integers(1, 5),
)
def test_topk_takes_exactly_k_and_the_lowest_of_equals(rows, k):
    """pitfall_042: a constant row has k latents, not all of them."""
    selection = kernels.topk(torch.tensor(rows), k)
    assert selection.counts.tolist() == [k] * len(rows)
    for row, indices in zip(rows, selection.indices.view(-1, k).tolist(), strict=True):
        assert indices == brute_force_topk(row, k)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 11), st.integers(1, 4), st.integers(0, 2**32), st.booleans())
def test_batch_topk_is_the_largest_of_the_batch(n, m, k, seed, ties):
    x = torch.randn(n, m, generator=torch.Generator().manual_seed(seed))
    if ties:
        x = x.round()
    candidates = BatchTopKCandidates(k * n)
    parts = [candidates(chunk) for chunk in x.split(3)]
    merged = kernels.Selection(*(torch.cat(c) for c in zip(*parts, strict=True)))
    chosen = kernels.batch_topk(merged, k * n)
    flat = x.flatten().tolist()
    positive = [i for i in sorted(range(len(flat)), key=lambda i: (-flat[i], i)) if flat[i] > 0]
    expected = sorted(positive[: k * n])
    rows = torch.repeat_interleave(torch.arange(n), chosen.counts)
    assert (rows * m + chosen.indices).tolist() == expected


def test_a_hint_that_was_too_high_is_reported():
    x = torch.arange(20.0).view(4, 5)
    too_high, fine = BatchTopKCandidates(8, hint=15.0), BatchTopKCandidates(8, hint=5.0)
    too_high(x), fine(x)
    assert too_high.missed
    assert not fine.missed


def test_batch_topk_finds_a_row_that_holds_every_winner():
    """A token of large norm may take the whole batch's budget; a limit per row would miss its latents."""
    x = torch.full((64, 200), 1e-3)
    x[17] = 100 + torch.arange(200.0)
    candidates = BatchTopKCandidates(3 * 64)
    parts = [candidates(chunk) for chunk in x.split(10)]
    merged = kernels.Selection(*(torch.cat(c) for c in zip(*parts, strict=True)))
    chosen = kernels.batch_topk(merged, 3 * 64)
    assert chosen.counts[17] == 192
    assert len(chosen.values) == 192


def test_encode_select_makes_one_product_for_several_selectors():
    x, W, b = torch.randn(1030, 8), torch.randn(8, 20), torch.randn(20)
    dead = torch.tensor([3, 11, 19])
    above, aux = encode_select(
        x, W, b, [lambda pre: kernels.above(pre, 0.5), lambda pre: kernels.topk_among(pre, 5, dead)]
    )
    pre = x @ W + b
    assert above.counts.tolist() == (pre > 0.5).sum(1).tolist()
    torch.testing.assert_close(above.values, pre[pre > 0.5])
    assert aux.indices.view(-1, 3).tolist() == [dead.tolist()] * 1030
    torch.testing.assert_close(aux.values.view(-1, 3), pre[:, dead])
