"""Shuffled and ordered reading: every row once, one order whatever the threads, and a position that can be saved.

pitfall_203, pitfall_209, pitfall_220, pitfall_221, pitfall_235.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unweave import OrderedBatches, Selection, StoreBatches, UnweaveError, shuffle_quality
from unweave.activations.cache import Store
from unweave.activations.cache.batches import _runs
from unweave.activations.cache.quality import quality_of

Make = Callable[..., Store]
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows_of(batches: Any) -> list[list[int]]:
    """Which rows each batch holds; the hooks must agree."""
    served = []
    for batch in batches:
        assert torch.equal(batch["a"], -batch["b"])
        served.append(batch["a"][:, 0].long().tolist())
    return served


@FEW
@given(
    st.integers(1, 700), st.integers(1, 200), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_every_chosen_row_comes_once_in_each_epoch(
    store: Make, n: int, size: int, factor: int, epochs: int, workers: int, drop: bool, some: bool
) -> None:
    rows = store(n)
    selection = Selection(without_tokens=[3, 4]) if some else None
    wanted = [i for i in range(n) if not (some and i % 11 in (3, 4))]
    batches = StoreBatches(
        rows, size, size * factor, selection=selection, epochs=epochs, workers=workers, drop_last=drop
    )
    served = rows_of(batches)
    assert all(len(batch) == size for batch in served[:-1])
    assert len(served) == len(batches)
    flat = [row for batch in served for row in batch]
    if drop:
        assert len(flat) == len(wanted) * epochs // size * size
    else:
        assert len(flat) == len(wanted) * epochs
    for epoch in range(len(flat) // len(wanted)):
        assert sorted(flat[epoch * len(wanted) : (epoch + 1) * len(wanted)]) == wanted
    assert next(batches, None) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_copied_batch_by_batch(store: Make, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """pitfall_224: threads meet once for each batch, not for each row."""
    rows, gathered, submitted = store(1000), list[int](), list[int]()
    gather, submit = type(rows).gather, ThreadPoolExecutor.submit

    def counting(self: Any, wanted: Any, *args: Any, **kwargs: Any) -> Any:
        gathered.append(len(wanted))
        return gather(self, wanted, *args, **kwargs)

    def counted(self: Any, *args: Any) -> Any:
        submitted.append(1)
        return submit(self, *args)

    monkeypatch.setattr(type(rows), "gather", counting)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", counted)
    batches = StoreBatches(rows, 100, 400, workers=workers)
    assert sorted(row for batch in rows_of(batches) for row in batch) == list(range(1000))
    assert gathered == [100] * 10
    assert len(submitted) == (10 if workers else 0)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("hooks", [None, ["b"]])
@pytest.mark.parametrize("epochs", [1, None])
@pytest.mark.parametrize("some", [False, True])
def test_pitfall_218_every_combination_of_modes_runs(
    store: Make, workers: int, dtype: torch.dtype | None, hooks: list[str] | None, epochs: int | None, some: bool
) -> None:
    selection = Selection(without_tokens=[3]) if some else None
    batches = StoreBatches(
        store(100), 16, 32, selection=selection, hooks=hooks, epochs=epochs, workers=workers, dtype=dtype
    )
    for _, batch in zip(range(9 if epochs is None else 5), batches, strict=False):
        assert batch.keys() == set(hooks or ["a", "b"])
        assert {(x.dtype, len(x)) for x in batch.values()} == {(dtype or torch.float32, 16)}
        assert not some or not (batch["b"] % 11 == 8).any()  # -3 modulo 11
    batches.close()


def test_the_order_is_that_of_the_seed_and_the_epoch_alone(store: Make) -> None:
    rows = store(1000)
    orders = [rows_of(StoreBatches(rows, 64, 256, seed=3, epochs=2, workers=workers)) for workers in (0, 1, 4)]
    assert orders[0] == orders[1] == orders[2]
    flat = [row for batch in orders[0] for row in batch]
    assert flat[:1000] != flat[1000:]
    assert orders[0] != rows_of(StoreBatches(rows, 64, 256, seed=4, epochs=2))
    assert flat[:64] != list(range(64))


@FEW
@given(st.integers(0, 12), st.integers(0, 3), st.integers(0, 3))
def test_a_saved_position_goes_on_exactly(store: Make, before: int, workers: int, others: int) -> None:
    rows = store(500)

    def opened(workers: int) -> StoreBatches:
        return StoreBatches(rows, 64, 128, selection=Selection(without_special=True), epochs=2, workers=workers)

    whole = rows_of(opened(0))
    batches = opened(workers)
    for _ in range(before):
        next(batches)
    state = batches.state_dict()
    assert rows_of(batches) == whole[before:]
    resumed = opened(others)
    resumed.load_state_dict(state)
    assert resumed.served == 64 * before
    assert rows_of(resumed) == whole[before:]


def test_a_position_of_something_else_is_refused(store: Make) -> None:
    state = StoreBatches(store(500), 64, 128).state_dict()
    for other, message in (
        (StoreBatches(store(501), 64, 128), "store"),
        (StoreBatches(store(500), 32, 128), "batch_size 64, and this is 32"),
        (StoreBatches(store(500), 64, 128, seed=1), "seed"),
        (StoreBatches(store(500), 64, 128, selection=Selection(positions="1:")), "selection"),
    ):
        with pytest.raises(UnweaveError, match=message):
            other.load_state_dict(state)


def test_the_state_is_small(store: Make) -> None:
    batches = StoreBatches(store(2000, d=500), 64, 512, epochs=None)
    next(batches)
    tensors = [x for x in _tensors(batches.state_dict()) if x.dtype == torch.int64]
    assert sum(x.nbytes for x in tensors) < 8 * (512 + 64 + 5 * 64)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def test_peeking_changes_nothing_and_reaches_over_the_ring(store: Make) -> None:
    rows = store(600)
    plain, peeked = StoreBatches(rows, 50, 300), StoreBatches(rows, 50, 300)
    seen = peeked.peek(100)["a"][:, 0]
    assert len(seen.unique()) == 100
    assert rows_of(peeked) == rows_of(plain)
    assert StoreBatches(store(30), 20, 20).peek(99)["a"].shape == (20, 3)


def test_threads_end_with_the_batches(store: Make) -> None:
    def ours() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name.startswith("unweave-")]

    batches = StoreBatches(store(400), 64, 128, workers=2)
    next(batches)
    assert ours()
    batches.close()
    assert not ours()
    assert rows_of(StoreBatches(store(400), 64, 128, workers=2))
    assert not ours()
    assert len(list(OrderedBatches(store(40), 8, workers=2))) == 5
    assert not ours()


def test_an_error_in_a_thread_reaches_the_caller(store: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = store(400)

    def broken(*arguments: Any, **settings: Any) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(type(rows), "gather", broken)
    batches = StoreBatches(rows, 64, 128)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    batches.close()


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"batch_size": 65}, {"epochs": 0}, {"workers": -1}, {"hooks": ["c"]}]
)
def test_wrong_settings_are_refused(store: Make, settings: Any) -> None:
    with pytest.raises(UnweaveError):
        StoreBatches(store(100), **{"batch_size": 8, "capacity": 64} | settings)


def test_no_rows_are_an_error(make_cache: Any) -> None:
    with pytest.raises(UnweaveError, match="leaves no row"):
        StoreBatches(make_cache().train, 4, 8, selection=Selection(only_tokens=[299]))


def test_a_batch_larger_than_the_store_is_one_short_batch(store: Make) -> None:
    assert [sorted(batch) for batch in rows_of(StoreBatches(store(5), 100, 100))] == [list(range(5))]


# --- in order --------------------------------------------------------------------------------------------------------


@FEW
@given(st.integers(1, 300), st.integers(1, 50), st.integers(0, 2), st.sampled_from([None, "1:", "::2"]))
def test_rows_in_order_with_their_records(store: Make, n: int, size: int, workers: int, positions: Any) -> None:
    rows = store(n)
    wanted = [i for i in range(n) if positions is None or (i % 8 >= 1 if positions == "1:" else i % 2 == 0)]
    if not wanted:
        return
    parts = list(OrderedBatches(rows, size, selection=Selection(positions=positions), workers=workers))
    assert [i for part in parts for i in part.activations["a"][:, 0].long().tolist()] == wanted
    assert all(len(part.records["documents"]) == size for part in parts[:-1])
    for part in parts:
        numbers = part.activations["a"][:, 0].long()
        assert torch.equal(part.records["documents"], numbers // 20)
        assert torch.equal(part.records["positions"].long(), numbers % 8)


@FEW
@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 30), st.booleans())
def test_documents_stay_whole(store: Make, n: int, size: int, per_document: int, some: bool) -> None:
    rows = store(n, per_document=per_document)
    selection = Selection(without_labels=[2]) if some else None
    parts = list(OrderedBatches(rows, size, by="documents", selection=selection, workers=0))
    numbers = [part.activations["a"][:, 0].long().tolist() for part in parts]
    assert [i for batch in numbers for i in batch] == [i for i in range(n) if not (some and i % 5 == 2)]
    documents = [{i // per_document for i in batch} for batch in numbers]
    assert all(not a & b for a, b in pairwise(documents))
    for batch, following in pairwise(numbers):
        first = [i for i in following if i // per_document == following[0] // per_document]
        assert len(batch) <= size or len({i // per_document for i in batch}) == 1
        assert len(batch) + len(first) > size  # the next document would not have fitted


def test_order_needs_documents_only_where_it_is_by_them(store: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = store(10)
    monkeypatch.setattr(type(rows), "records", {})
    assert len(list(OrderedBatches(rows, 3))) == 4
    with pytest.raises(UnweaveError, match="does not say which document"):
        OrderedBatches(rows, 3, by="documents")
    with pytest.raises(UnweaveError, match="neither"):
        OrderedBatches(rows, 3, by="images")  # type: ignore[arg-type]


# --- how well it is mixed --------------------------------------------------------------------------------------------


def test_blocks_and_a_ring_mix_as_well_as_a_full_shuffle_and_a_sequential_read_does_not(store: Make) -> None:
    rows = store(200_000, d=1, row=128, per_document=300)
    batches = StoreBatches(rows, 512, 128 * 512)
    before = batches.state_dict()
    quality = shuffle_quality(batches)
    assert quality.document_entropy > 0.97
    assert quality.position_entropy > 0.97
    assert abs(quality.autocorrelation) < 0.02
    assert rows_of(batches)[0] == rows_of(_from(rows, before))[0]

    def measured(numbers: np.ndarray) -> Any:
        return quality_of(batches, np.split(numbers[: 512 * 50], 50))

    full = measured(np.random.default_rng(0).permutation(200_000))
    assert abs(full.document_entropy - 1) < 0.02
    assert abs(full.autocorrelation) < 0.02
    sequential = measured(np.arange(200_000))
    assert sequential.document_entropy < 0.3
    assert sequential.autocorrelation > 0.9
    blocks = np.random.default_rng(0).permutation(200_000 // 64)[:, None] * 64 + np.arange(64)
    assert measured(blocks.ravel()).autocorrelation > 0.9


def _from(rows: Store, state: Any) -> StoreBatches:
    batches = StoreBatches(rows, 512, 128 * 512)
    batches.load_state_dict(state)
    return batches


@given(st.lists(st.integers(0, 30), unique=True))
def test_what_is_asked_for_beforehand_is_what_comes_in_few_calls(blocks):
    runs = list(_runs(torch.tensor(blocks, dtype=torch.int64)))
    assert [b for first, last in runs for b in range(first, last + 1)] == sorted(blocks)
    assert all(after - last > 1 for (_, last), (after, _) in pairwise(runs))
