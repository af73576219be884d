from __future__ import annotations

import torch
from torch import Tensor

from unweave.dashboard.collect import Collected, Collector
from unweave.dashboard.interest import interest_scores, most_interesting
from unweave.sae import SparseCodes

ROWS, CONTEXT = 400, 16
STRINGS = [" red", " green", " blue", "(", ")", "ing", "\n", *(f" word{i}" for i in range(200))]
COLOURS, BRACKETS = torch.tensor([0, 1, 2]), torch.tensor([3])
MEANING, COPY, BRACKET, NOISE, DENSE, RARE, DEAD = range(7)


def planted() -> tuple[Collected, Tensor]:
    """A latent for colours and its copy, one for a bracket, one for random tokens, a dense, a rare and a dead one."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(STRINGS), (ROWS, CONTEXT), generator=generator)
    chance = torch.rand(ROWS, CONTEXT, generator=generator)
    ids[chance < 0.01] = torch.randint(0, 3, (int((chance < 0.01).sum()),), generator=generator)
    strength = 1 + torch.rand(ROWS, CONTEXT, generator=generator)
    codes = torch.zeros(ROWS, CONTEXT, 7)
    codes[..., MEANING] = torch.isin(ids, COLOURS) * strength
    codes[..., COPY] = codes[..., MEANING]
    codes[..., BRACKET] = torch.isin(ids, BRACKETS) * strength
    codes[..., NOISE] = (torch.rand(ROWS, CONTEXT, generator=generator) < 0.01) * strength
    codes[..., DENSE] = strength * (chance < 0.5)
    codes[0, 0, RARE] = 1.0
    collector = Collector(7, n_top=10, window=2)
    documents = torch.arange(ROWS)[:, None].expand(ROWS, CONTEXT)
    everything = torch.ones(ROWS, CONTEXT, dtype=torch.bool)
    collector.add(SparseCodes.from_dense(codes.flatten(0, 1)), ids, everything, documents, everything)
    return collector.finish(), embedding()


def embedding() -> Tensor:
    """Random directions, but for the colours, which share one."""
    vectors = torch.randn(len(STRINGS), 32, generator=torch.Generator().manual_seed(1))
    vectors[COLOURS] = vectors[0] + 0.3 * vectors[COLOURS]
    return vectors


def test_meaning_before_brackets_before_noise() -> None:
    collected, vectors = planted()
    score = interest_scores(collected, embedding=vectors, strings=STRINGS)
    assert score[MEANING] > 2 * score[BRACKET] > 2 * score[NOISE] > 0
    assert 0 < score[RARE] < score[BRACKET] / 10
    assert 0 < score[DENSE] < score[BRACKET] / 10
    assert score[DEAD] == 0


def test_the_copy_of_a_chosen_latent_comes_last() -> None:
    collected, vectors = planted()
    directions = torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
    directions[COPY] = directions[MEANING]
    chosen = most_interesting(collected, directions, n=6, embedding=vectors, strings=STRINGS).latents.tolist()
    assert {chosen[0], chosen[-1]} == {MEANING, COPY}
    assert sorted(chosen) == [MEANING, COPY, BRACKET, NOISE, DENSE, RARE]


def test_dead_latents_are_never_shown() -> None:
    collected, vectors = planted()
    chosen = most_interesting(collected, torch.randn(7, 16), n=100, embedding=vectors, strings=STRINGS)
    assert DEAD not in chosen.latents.tolist()
    assert len(chosen.latents.unique()) == 6
    assert ((chosen.scores > 0) & (chosen.scores <= 1)).all()


def test_nothing_fired() -> None:
    collector = Collector(4, n_top=3, window=2)
    ids = torch.zeros(2, CONTEXT, dtype=torch.long)
    codes = SparseCodes.from_dense(torch.zeros(2 * CONTEXT, 4))
    collector.add(codes, ids, ids == 0, ids, ids == 0)
    chosen = most_interesting(collector.finish(), torch.randn(4, 8), n=2, embedding=torch.randn(1, 8), strings=["a"])
    assert len(chosen.latents) == 0
