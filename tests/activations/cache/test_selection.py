"""Selections: each part keeps what a loop over the rows would, and what keeps nothing says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unweave import MaskConfig, Selection, UnweaveError
from unweave.activations.cache import Store, select
from unweave.activations.cache.store import Joined

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ids = st.lists(st.integers(-1, 12), max_size=4)


@FEW
@given(
    special=st.booleans(), without=ids, only=st.none() | ids, labels=st.none() | ids, not_labels=ids,
    documents=st.none() | ids | st.builds(range, st.integers(0, 3), st.integers(3, 6)), not_documents=ids,
    positions=st.sampled_from([None, "1:", "::3", "-2:", "1:7:2", (0, 5), (-1,)]),
)  # fmt: skip
def test_every_part_keeps_what_a_loop_would(
    store: Callable[..., Store], special: bool, without: Any, only: Any, labels: Any, not_labels: Any, documents: Any,
    not_documents: Any, positions: Any,
) -> None:  # fmt: skip
    rows = store(130)
    selection = Selection(special, without, only, None, labels, not_labels, documents, not_documents, positions)
    chosen = None
    if isinstance(positions, str):
        parts = [int(part) if part else None for part in positions.split(":")]
        chosen = set(range(8)[slice(*parts)])
    elif positions is not None:
        chosen = {range(8)[p] for p in positions}
    expected = [
        i for i in range(130)
        if not (special and i % 11 == 0) and i % 11 not in without and (only is None or i % 11 in only)
        and (labels is None or i % 5 in labels) and i % 5 not in not_labels
        and (documents is None or i // 20 in documents) and i // 20 not in not_documents
        and (chosen is None or i % 8 in chosen)
    ]  # fmt: skip
    if not expected:
        with pytest.raises(UnweaveError, match=r"leaves no row of the store: there were 130 \(all rows\), then"):
            select(rows, selection)
        return
    found = select(rows, selection)
    assert found.n_rows == len(expected)
    kept = range(130) if found.keep is None else np.flatnonzero(found.keep).tolist()
    assert list(kept) == expected
    assert list(found.report.values())[-1] == len(expected)


@pytest.mark.parametrize("stored", [True, False])
def test_long_rows_are_left_out_at_all_hooks(
    store: Callable[..., Store], stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = store(101, d=1)  # norms 0 to 100 at both hooks, whose median is 50
    if stored:
        norms = {hook: np.arange(101, dtype=np.float32) for hook in rows.hooks}
        monkeypatch.setattr(type(rows), "norms", norms)
    found = select(rows, Selection(norm_multiple=1.5))
    assert found.keep is not None
    assert np.flatnonzero(found.keep).tolist() == list(range(76))
    of_few = select(rows, Selection(only_documents=range(2), norm_multiple=1.5))  # of norms 0 to 39
    assert of_few.n_rows == 29  # to 28.5
    assert select(store(5, d=1), Selection(only_documents=[0], norm_multiple=100)).n_rows == 5


def test_what_a_store_does_not_know_is_refused(store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = store(10)
    with pytest.raises(UnweaveError, match="only_kinds asks for the kinds of rows, and the store records documents"):
        select(rows, Selection(only_kinds=["cls"]))
    monkeypatch.setattr(rows, "special_ids", None)
    with pytest.raises(UnweaveError, match="does not say which tokens are special"):
        select(rows, Selection(without_special=True))
    with pytest.raises(UnweaveError, match="there are patch"):
        Selection(only_kinds=["patches"])
    with pytest.raises(UnweaveError, match="not positive"):
        Selection(norm_multiple=0)
    with pytest.raises(UnweaveError, match="keeps nothing"):
        select(rows, Selection(positions="9:"))


def test_masks_keep_of_a_cache_what_they_keep_of_a_live_stream(make_cache: Any, model: Any, letters: Any) -> None:
    from unweave import DataConfig
    from unweave.activations import ActivationStream, TokenRows
    from unweave.models import resolve_hooks

    model.module.special[ord("b")] = 5e4
    masks = MaskConfig(positions="1:", token_ids=(ord("a"),))
    rows = TokenRows(letters, model.tokenizer, DataConfig(context=8), held_out=False)
    stream = ActivationStream(model, resolve_hooks(model.module, ["h.0", "h.1"]), rows, masks, prompts_per_pass=40)
    live = stream.next_pass()
    side = make_cache(tokens=320).train
    chosen = select(side, Selection.of_masks(masks, side))
    assert chosen.keep is not None
    assert 0 < chosen.n_rows < 300
    found = side.gather(torch.from_numpy(np.flatnonzero(chosen.keep)))
    assert all(torch.equal(found[hook], live.activations[hook]) for hook in found)


def test_equal_selections_are_equal() -> None:
    assert Selection(without_tokens=[1, 2]) == Selection(without_tokens=torch.tensor([1, 2]))
    assert repr(Selection(only_labels=np.array([3]))) == repr(Selection(only_labels=(3,)))


@FEW
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.data())
def test_joined_columns_are_one(lengths: list[int], data: Any) -> None:
    n = sum(lengths)
    whole = np.arange(n, dtype=np.int32)
    column = Joined(np.split(whole, np.cumsum(lengths)[:-1]))
    assert len(column) == n
    here = data.draw(st.slices(n) if n else st.just(slice(None)))
    assert np.array_equal(column[here], whole[here])
    rows = data.draw(st.lists(st.integers(0, n - 1), max_size=9)) if n else []
    assert np.array_equal(column[np.array(rows, dtype=np.int64)], whole[np.array(rows, dtype=np.int64)])
