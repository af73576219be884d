from __future__ import annotations

import json

import pytest
import torch

from unweave.dashboard.collect import Collector
from unweave.dashboard.interest import Interest
from unweave.dashboard.logits import LogitEffects
from unweave.dashboard.records import latent_records
from unweave.sae import SparseCodes

ROWS, CONTEXT = 60, 20


@pytest.fixture
def collected():
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(ROWS, CONTEXT, 3, generator=generator).pow(-1) * (torch.rand(ROWS, CONTEXT, 3) < 0.2)
    collector = Collector(3, n_top=5, window=4)
    ids = torch.randint(0, 50, (ROWS, CONTEXT), generator=generator)
    documents = torch.arange(ROWS)[:, None].expand(ROWS, CONTEXT)
    everything = torch.ones(ROWS, CONTEXT, dtype=torch.bool)
    collector.add(SparseCodes.from_dense(dense.flatten(0, 1)), ids, everything, documents, everything)
    return collector.finish()


INTEREST = Interest(torch.tensor([2, 0]), torch.tensor([0.5, 0.25]))


def test_pitfall_333_the_peak_of_a_context_is_its_latents_activation_there(collected) -> None:
    """No token is dropped, so the place of the peak needs no shift."""
    records, strings = latent_records(collected, INTEREST, None, None)
    for record in records:
        latent = record["index"]
        strongest, *others = record["groups"]
        assert strongest["quantile"] is None
        for slot, context in enumerate(strongest["contexts"]):
            active = dict(zip(context["active"][::2], context["active"][1::2], strict=True))
            peak = float(collected.top.scores[latent, slot])
            assert active[context["peak"]] == pytest.approx(peak, rel=1e-3)
            token = int(collected.top.peak_ids[latent, slot])
            assert strings[context["tokens"][context["peak"]]] == f"#{token}"
            assert len(context["tokens"]) <= 9
            assert 0 not in active.values()
        assert strongest["contexts"][0]["active"]
        assert [group["quantile"] for group in others] == [0.9, 0.5]
        for group in others:
            assert 1 <= len(group["contexts"]) <= 5


def test_records_are_the_statistics(collected) -> None:
    records, _ = latent_records(collected, INTEREST, None, None)
    assert [record["index"] for record in records] == [2, 0]
    for record in records:
        latent = record["index"]
        assert record["count"] == collected.counts[latent]
        assert record["density"] == pytest.approx(float(collected.density[latent]), rel=1e-3)
        assert record["max"] == pytest.approx(float(collected.maximum[latent]), rel=1e-3)
        histogram = record["histogram"]
        assert sum(histogram["counts"]) == record["count"]
        assert len(histogram["counts"]) <= 40
        assert histogram["counts"][0] > 0
        assert histogram["counts"][-1] > 0
        assert histogram["low"] * histogram["ratio"] ** len(histogram["counts"]) >= record["max"]
        assert "promoted" not in record
    assert json.loads(json.dumps(records, allow_nan=False)) == records


def test_tokens_of_the_logits(collected) -> None:
    ids, values = torch.tensor([[7, 8], [9, 7]]), torch.tensor([[2.0, 1.5], [1.0, 0.12345]])
    records, strings = latent_records(collected, INTEREST, LogitEffects(ids, values, ids, -values), None)
    assert [(strings[token], value) for token, value in records[0]["promoted"]] == [("#7", 2), ("#8", 1.5)]
    assert [(strings[token], value) for token, value in records[1]["suppressed"]] == [("#9", -1), ("#7", -0.1235)]


def test_pitfall_334_a_tiny_density_survives(collected) -> None:
    rare = collected._replace(n_tokens=10**9, counts=torch.tensor([100, 5, 123]))
    records, _ = latent_records(rare, INTEREST, None, None)
    assert [record["density"] for record in records] == [1.23e-7, 1e-7]
