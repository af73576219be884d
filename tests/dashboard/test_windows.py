from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unweave.dashboard.windows import BestContexts, Contexts, Firings
from unweave.sae import SparseCodes

CONTEXT, WINDOW = 5, 2


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
    """Dense codes with many ties, token ids, padding, documents, which tokens count, n, and rows per batch."""
    rows, d_sae = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dense = torch.randint(0, draw(st.sampled_from([2, 4, 50])), (rows, CONTEXT, d_sae), generator=generator).float()
    ids = torch.randint(0, 9, (rows, CONTEXT), generator=generator)
    real = torch.arange(CONTEXT) < torch.randint(1, CONTEXT + 1, (rows, 1), generator=generator)
    documents = torch.randint(0, 2, (rows * CONTEXT,), generator=generator).cumsum(0).view(rows, CONTEXT)
    counted = real & (torch.rand(rows, CONTEXT, generator=generator) < 0.8)
    return dense, ids, real, documents, counted, draw(st.integers(1, 4)), draw(st.integers(1, 6))


def collected(dense: Tensor, ids: Tensor, real: Tensor, groups: Tensor, counted: Tensor, n: int, step: int) -> Contexts:
    best = BestContexts(dense.shape[2], n, WINDOW)
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        codes = SparseCodes.from_dense(dense[part].flatten(0, 1))
        firings = Firings.of(codes, ids[part], real[part], start * CONTEXT)
        entries = counted[part].flatten()[firings.positions].nonzero().squeeze(1)
        best.offer(firings, entries, firings.values[entries], groups[part].flatten()[firings.positions[entries]])
    return best.contexts()


def brute_force(dense: Tensor, groups: Tensor, counted: Tensor, n: int, latent: int) -> list[tuple[float, int, int]]:
    """The best `(score, position, group)` of a latent, one entry at a time."""
    values = dense[:, :, latent].flatten()
    fired = (counted.flatten() & (values != 0)).nonzero().flatten().tolist()
    entries = [(float(values[p]), p, int(groups.flatten()[p])) for p in fired]
    chosen: list[tuple[float, int, int]] = []
    for entry in sorted(entries, key=lambda e: (-e[0], e[1])):
        if entry[2] not in {group for _, _, group in chosen} and len(chosen) < n:
            chosen.append(entry)
    return chosen


@given(cases())
@settings(max_examples=60, deadline=None)
def test_the_exact_best_one_per_group_in_any_batching(case: tuple) -> None:
    dense, ids, real, groups, counted, n, step = case
    contexts = collected(dense, ids, real, groups, counted, n, step)
    for latent in range(dense.shape[2]):
        expected = brute_force(dense, groups, counted, n, latent)
        used = len(expected)
        found = zip(*(t[latent, :used].tolist() for t in contexts[:3]), strict=True)
        assert list(found) == expected
        assert (contexts.positions[latent, used:] == -1).all()
        assert (contexts.ids[latent, used:] == -1).all()
        for slot, (_, position, _) in enumerate(expected):
            row, column = divmod(position, CONTEXT)
            for place, offset in enumerate(range(-WINDOW, WINDOW + 1)):
                there = column + offset
                inside = 0 <= there < CONTEXT and bool(real[row, there])
                assert contexts.ids[latent, slot, place] == (ids[row, there] if inside else -1)
                assert contexts.values[latent, slot, place] == (dense[row, there, latent] if inside else 0)


def test_windows_show_the_activations_of_tokens_that_do_not_count() -> None:
    dense = torch.tensor([[[3.0], [9.0], [2.0], [0.0], [1.0]]])
    ids, real = torch.arange(5)[None], torch.ones(1, 5, dtype=torch.bool)
    counted = torch.tensor([[True, False, True, True, True]])
    contexts = collected(dense, ids, real, torch.zeros(1, 5).long(), counted, 1, 1)
    assert contexts.positions.tolist() == [[0]]
    assert contexts.values.tolist() == [[[0, 0, 3, 9, 2]]]


def test_nothing_fires() -> None:
    dense, ids = torch.zeros(2, CONTEXT, 3), torch.zeros(2, CONTEXT, dtype=torch.long)
    real = torch.ones_like(ids, dtype=torch.bool)
    contexts = collected(dense, ids, real, ids, real, 2, 1)
    assert (contexts.positions == -1).all()
