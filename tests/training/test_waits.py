"""How often a step asks the device how many entries something has, or what a number is.

On a GPU the host then waits until everything that it has queued is done. Here the questions are counted as they reach
PyTorch, on a CPU. What only a CPU is asked (are the indices in range?) does not count.
"""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unweave.objectives import AuxK, GhostGradients, PreActivation
from unweave.sae import JumpReLU, ReLU, TopK
from unweave.training import SAEConfig
from unweave.training.dead import dead_latents
from unweave.training.trainee import Trainee

D, M, N = 16, 64, 48
aten = torch.ops.aten
ASKS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.bincount.default, aten.masked_select.default,
    aten.equal.default, aten._unique2.default, aten.lift_fresh.default,
}  # fmt: skip
CPU_ONLY = "_check"


class Waits(TorchDispatchMode):
    """Which functions of unweave ask, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        by_mask = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        repeats = func is aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None
        if func in ASKS or by_mask or repeats:
            own = [frame.name for frame in traceback.extract_stack() if "/unweave/" in frame.filename]
            if own and own[-1] != CPU_ONLY:
                self.found[own[-1]] += 1
        return func(*args, **(kwargs or {}))


def waits_of(config: SAEConfig, n_dead: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What the third of three steps asks; `n_dead` latents are dead from the first one on."""
    monkeypatch.setenv("UNWEAVE_KERNELS", "reference")
    trainee = Trainee(config, torch.randn(300, D), steps=100, tokens=100 * N, seed=0)
    assert trainee.fused is None
    with torch.no_grad():
        trainee.sae.b_enc[:n_dead] = -100.0
    trainee.tokens_since_fired[:n_dead] = trainee.dead_after
    for _ in range(2):
        trainee.step(torch.randn(N, D))
    waits, tolist = Waits(), torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        waits.found["read_norm" if tensor.shape == (2,) else "tolist"] += 1
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with waits:
        trainee.step(torch.randn(N, D))
    monkeypatch.undo()
    assert int(trainee.dead.sum()) >= n_dead
    return waits.found


SELECTION = {"select_by_rows": 1, "_top_indices": 1}
"""Of a chunk of 512 rows: is all of it finite, and do values tie?"""


@pytest.mark.parametrize("n_dead", [0, 5])
def test_dead_latents_are_counted_without_a_wait(n_dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """pitfall_119, 303: their number comes with the gradient's norm, and only selections ask for more."""
    found = waits_of(SAEConfig(d_sae=M, activation=TopK(4), auxk=AuxK(k=3)), n_dead, monkeypatch)
    selections = 2 if n_dead else 1  # of all latents, and of the dead ones
    assert found == {"read_norm": 1} | {name: count * selections for name, count in SELECTION.items()}


def test_without_auxk_nothing_more_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = waits_of(SAEConfig(d_sae=M, activation=TopK(4), auxk=AuxK(coefficient=0)), 5, monkeypatch)
    assert found == {"read_norm": 1} | SELECTION


@pytest.mark.parametrize(
    "config",
    [
        SAEConfig(d_sae=M, activation=JumpReLU(), auxk=AuxK(k=3)),
        SAEConfig(d_sae=M, activation=ReLU(), pre_act=PreActivation(), ghost=GhostGradients()),
    ],
    ids=["jumprelu", "ghost"],
)
def test_of_thresholds_only_the_number_of_active_entries_is_asked(
    config: SAEConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = waits_of(config, 5, monkeypatch)
    assert found.pop("read_norm") == 1
    assert found.keys() <= {"select_by_rows", "_top_indices", "above"}
    assert found["above"] == 1


def test_what_was_counted_holds_until_somebody_changes_it() -> None:
    config = SAEConfig(d_sae=M, activation=TopK(1), dead_after=2 * N, error="token")
    trainee = Trainee(config, torch.randn(300, D), steps=100, tokens=100 * N, seed=0)
    counts = []
    for _ in range(8):
        trainee.step(torch.randn(N, D))
        assert trainee.dead_counted is not None
        assert torch.equal(dead_latents(trainee), trainee.dead.nonzero().flatten())
        counts.append(len(dead_latents(trainee)))
    assert len(set(counts)) > 2  # they die and come back
    trainee.tokens_since_fired[:7] = trainee.dead_after
    assert dead_latents(trainee)[:7].tolist() == list(range(7))
    state = trainee.state_dict()
    state["tokens_since_fired"] = torch.zeros_like(state["tokens_since_fired"])
    trainee.load_state_dict(state)
    assert len(dead_latents(trainee)) == 0
