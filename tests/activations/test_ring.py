from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unweave.activations.ring import ShuffleRing, _draw


def ring_of(capacity: int, seed: int = 0) -> ShuffleRing:
    return ShuffleRing(capacity, torch.Generator().manual_seed(seed))


def numbered(start: int, n: int, width: int = 3) -> dict[str, torch.Tensor]:
    """Rows that hold their own number, and at hook "b" its negative."""
    x = torch.arange(start, start + n).float()[:, None].expand(n, width)
    return {"a": x, "b": -x[:, :1]}


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=40))
def test_pitfall_202_235_every_row_leaves_once_and_hooks_stay_aligned(steps: list[tuple[bool, int]]) -> None:
    ring, entered, left = ring_of(20), 0, list[float]()
    for put, n in steps:
        if put and n <= ring.free:
            ring.put(numbered(entered, n))
            entered += n
        elif not put and n <= ring.size and entered:
            taken = ring.take(n)
            assert torch.equal(taken["a"][:, :1], -taken["b"])
            left += taken["a"][:, 0].tolist()
    if entered:
        left += ring.take(ring.size)["a"][:, 0].tolist()
    assert sorted(left) == list(range(entered))


def test_rows_are_drawn_uniformly() -> None:
    counts = torch.zeros(10)
    ring = ring_of(10)
    for _ in range(3000):
        ring.put(numbered(0, 10))
        counts[ring.take(3)["a"][:, 0].long()] += 1
        ring.take(7)
    assert (counts / 3000 - 0.3).abs().max() < 0.04


def test_the_seed_decides() -> None:
    first, same, other = (ring_of(50, seed) for seed in (0, 0, 1))
    taken = []
    for ring in (first, same, other):
        ring.put(numbered(0, 50))
        taken.append(ring.take(20)["a"])
    assert torch.equal(taken[0], taken[1])
    assert not torch.equal(taken[0], taken[2])


def test_pitfall_211_what_was_taken_does_not_change() -> None:
    ring = ring_of(10)
    ring.put(numbered(0, 10))
    taken, peeked = ring.take(5)["a"], ring.peek(5)["a"]
    before = taken.clone(), peeked.clone()
    ring.put(numbered(90, 5))
    ring.take(10)
    ring.put(numbered(70, 10))
    assert torch.equal(taken, before[0])
    assert torch.equal(peeked, before[1])


def test_peeking_spreads_over_the_rows_and_draws_nothing() -> None:
    ring, plain = ring_of(10), ring_of(10)
    for r in (ring, plain):
        r.put(numbered(0, 9))
    assert ring.peek(3)["a"][:, 0].tolist() == [0, 4, 8]
    assert len(ring.peek(100)["a"]) == 9
    assert torch.equal(ring.take(9)["a"], plain.take(9)["a"])
    assert len(ring.peek(3)["a"]) == 0


def test_pitfall_200_229_230_memory_is_allocated_once_and_is_what_it_says() -> None:
    ring = ring_of(64)
    assert ring.nbytes == 0
    rows = {"a": torch.zeros(32, 8, dtype=torch.bfloat16), "b": torch.zeros(32, 4)}
    ring.put(rows)
    assert ring.nbytes == 64 * (8 * 2 + 4 * 4)
    places = {name: buffer.data_ptr() for name, buffer in ring._buffers.items()}
    for _ in range(5):
        ring.put(rows)
        assert ring.take(32)["a"].dtype == torch.bfloat16
    assert places == {name: buffer.data_ptr() for name, buffer in ring._buffers.items()}


def test_a_saved_ring_goes_on_alike() -> None:
    ring = ring_of(30)
    ring.put(numbered(0, 30))
    ring.take(7)
    state = ring.state_dict()
    ring_after = [ring.take(5)["a"] for _ in range(4)]
    resumed = ring_of(30, seed=99)
    resumed.load_state_dict(state)
    assert len(state["rows"]["a"]) == 23
    assert all(torch.equal(x, resumed.take(5)["a"]) for x in ring_after)


def test_an_empty_ring_can_be_saved() -> None:
    resumed = ring_of(5)
    resumed.load_state_dict(ring_of(5).state_dict())
    assert resumed.size == 0


def test_pitfall_222_every_method_runs() -> None:
    ring = ring_of(5)
    ring.put(numbered(0, 4))
    state = ring.state_dict(copy=False)
    ran = {
        "free": ring.free == 1, "nbytes": ring.nbytes > 0, "put": ring.put(numbered(4, 1)) is None,
        "peek": len(ring.peek(2)["a"]) == 2, "take": len(ring.take(3)["a"]) == 3, "state_dict": "rows" in state,
        "load_state_dict": ring.load_state_dict(ring.state_dict()) is None,
    }  # fmt: skip
    assert all(ran.values())
    assert ran.keys() == {name for name in vars(ShuffleRing) if not name.startswith("_")}


def test_pitfall_244_short_batches_take_no_new_memory() -> None:
    ring = ring_of(64)
    ring.put(numbered(0, 40))
    places = {name: buffer.data_ptr() for name, buffer in ring._buffers.items()}
    for n in (1, 17, 3, 40):
        ring.take(min(n, ring.size))
        ring.put(numbered(0, n))
    assert places == {name: buffer.data_ptr() for name, buffer in ring._buffers.items()}


def test_misuse() -> None:
    ring = ring_of(5)
    with pytest.raises(ValueError, match="cannot put"):
        ring.put(numbered(0, 6))
    with pytest.raises(ValueError, match="cannot put"):
        ring.put({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)})
    ring.put(numbered(0, 3))
    with pytest.raises(ValueError, match="the ring holds"):
        ring.put({"c": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match="cannot take 4 of 3"):
        ring.take(4)


def test_a_small_draw_from_a_large_ring_is_uniform_and_without_repetition() -> None:
    generator, counts, first = torch.Generator().manual_seed(0), torch.zeros(16), torch.zeros(16)
    for _ in range(4000):
        drawn = _draw(4, 16, generator, np.empty(16, np.int32))
        assert len(set(drawn.tolist())) == 4
        counts[drawn] += 1
        first[drawn[0]] += 1
    assert (counts / 4000 - 4 / 16).abs().max() < 0.03
    assert (first / 4000 - 1 / 16).abs().max() < 0.015
    assert len(_draw(0, 16, generator, np.empty(16, np.int32))) == 0
