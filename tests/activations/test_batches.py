from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations.batches import ShuffledBatches
from unweave.activations.config import DataConfig
from unweave.activations.live import ActivationStream
from unweave.activations.tokens import TokenRows
from unweave.models import Hook, LoadedModel


class Counting(Iterator[dict[str, Tensor]]):
    """Passes of changing sizes whose rows hold (document, running number); ten rows make a document."""

    device = torch.device("cpu")

    def __init__(self, total: int) -> None:
        self.total, self.given, self.passes = total, 0, 0

    def __next__(self) -> dict[str, Tensor]:
        if self.given >= self.total:
            raise StopIteration
        self.passes += 1
        n = min(17 + self.passes % 5, self.total - self.given)
        numbers = torch.arange(self.given, self.given + n).float()
        self.given += n
        x = torch.stack([numbers // 10, numbers], 1)
        return {"a": x, "b": -x}

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given, "passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given, self.passes = state["given"], state["passes"]


def test_pitfall_202_every_token_is_served_once_and_hooks_stay_aligned() -> None:
    batches = list(ShuffledBatches(Counting(1003), 32, 200))
    assert [len(b["a"]) for b in batches] == [32] * 31 + [11]
    assert all(torch.equal(b["a"], -b["b"]) for b in batches)
    assert sorted(torch.cat([b["a"][:, 1] for b in batches]).tolist()) == list(range(1003))


def test_pitfall_221_a_short_last_batch_can_be_dropped() -> None:
    assert [len(b["a"]) for b in ShuffledBatches(Counting(1003), 32, 200, drop_last=True)] == [32] * 31
    assert len(list(ShuffledBatches(Counting(96), 32, 64, drop_last=True))) == 3


def test_the_order_is_a_function_of_the_seed() -> None:
    first, same, other = (list(ShuffledBatches(Counting(500), 50, 200, seed)) for seed in (3, 3, 4))
    assert all(torch.equal(x["a"], y["a"]) for x, y in zip(first, same, strict=True))
    assert not torch.equal(first[0]["a"], other[0]["a"])


def test_pitfall_209_a_batch_mixes_almost_as_many_documents_as_it_could() -> None:
    batches = list(ShuffledBatches(Counting(20_000), 100, 4000))[:100]
    entropies = []
    for batch in batches:
        _, counts = batch["a"][:, 0].unique(return_counts=True)
        p = counts / 100
        entropies.append(float(-(p * p.log()).sum()))
    best = math.log(100)
    assert sum(entropies) / len(entropies) > 0.95 * best
    ages = torch.stack([b["a"][:, 1].std() for b in batches])
    assert ages.min() > 500  # 10 rows that follow each other have a deviation of 3


def test_peeking_changes_nothing() -> None:
    plain, peeking = (ShuffledBatches(Counting(500), 50, 200) for _ in range(2))
    for a in plain:
        assert len(peeking.peek(30)["b"]) <= 30
        assert torch.equal(a["a"], next(peeking)["a"])


@pytest.mark.parametrize("k", [0, 1, 7, 18, 20, 31])
def test_pitfall_179_resumed_batches_are_bit_equal(k: int) -> None:
    batches = ShuffledBatches(Counting(1003), 32, 200, seed=5)
    for _ in range(k):
        next(batches)
    state = batches.state_dict()
    resumed = ShuffledBatches(Counting(1003), 32, 200, seed=6)
    rest = list(batches)
    resumed.load_state_dict(state)
    assert [b["a"].tolist() for b in resumed] == [b["a"].tolist() for b in rest]
    assert sum(len(b["a"]) for b in rest) == 1003 - 32 * k


def test_pitfall_179_the_whole_way_from_text_is_resumed_bit_equal(model: LoadedModel, hooks: list[Hook]) -> None:
    def make() -> ShuffledBatches:
        texts = [f"<{i}>" + "word " * (i % 7) for i in range(200)]
        rows = TokenRows(texts, model.tokenizer, DataConfig(context=8), held_out=False, repeat=True)
        return ShuffledBatches(ActivationStream(model, hooks, rows, prompts_per_pass=5), 64, 300, seed=1)

    whole, interrupted = make(), make()
    expected = [next(whole) for _ in range(130)]
    for _ in range(70):
        next(interrupted)
    resumed = make()
    resumed.load_state_dict(interrupted.state_dict())
    for batch in expected[70:]:
        got = next(resumed)
        assert all(torch.equal(batch[name], got[name]) for name in ("h.0", "h.1"))
    assert isinstance(whole.stream, ActivationStream)
    assert whole.stream.rows.epoch > 1


def test_impossible_sizes() -> None:
    with pytest.raises(UnweaveError, match="batch_size=0"):
        ShuffledBatches(Counting(10), 0, 5)
    with pytest.raises(UnweaveError, match="a ring of 5 tokens is smaller than one batch of 6"):
        ShuffledBatches(Counting(10), 6, 5)
