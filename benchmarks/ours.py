"""Unweave's own step on a case, by itself or in a fresh process that measures its memory.

    python benchmarks/ours.py '["memory", {"kind": "topk", "d_in": 768, "d_sae": 12288, "batch": 4096}]'

prints JSON: seconds of a step, bytes at its peak (`peak`), and bytes at its peak beyond the weights, their gradients,
their moments and the batch (`extra`).
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import measure
from cases import TINY_LR, Case, Contestant, Problem, make_problem
from unweave import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, SAEConfig, TopK
from unweave.sae import Activation
from unweave.training.trainee import Trainee

DEAD_AFTER = 10_000_000


def config(case: Case) -> SAEConfig:
    """The case as a config: the defaults, but for a learning rate that keeps densities where they must be kept."""
    activations: dict[str, Activation] = {
        "topk": TopK(case.k),
        "batchtopk": BatchTopK(case.k),
        "matryoshka": BatchTopK(case.k),
        "relu": ReLU(),
        "jumprelu": JumpReLU(),
        "gated": Gated(),
    }
    frozen: dict[str, Any] = {"lr": TINY_LR, "threshold_lr": TINY_LR} if case.frozen else {}
    return SAEConfig(
        d_sae=case.d_sae,
        activation=activations[case.kind],
        matryoshka=Matryoshka(tuple(case.prefixes)) if case.kind == "matryoshka" else None,
        dead_after=DEAD_AFTER,
        **frozen,
    )


def make(problem: Problem) -> Contestant:
    """A trainee with the problem's weights."""
    case = problem.case
    trainee = Trainee(config(case), problem.batches[0], steps=1000, tokens=1000 * case.batch, seed=0)
    state = trainee.state_dict()
    weights = state["sae"]
    bias = problem.bias + (JumpReLU().init_threshold if case.kind == "jumprelu" else 0.0)
    state["sae"] = {
        **weights,
        "W_enc": problem.encoder.T,
        "W_dec": problem.W,
        "b_enc": weights["b_enc"].new_full((case.d_sae,), bias),
        "b_dec": weights["b_dec"].new_zeros(case.d_in),
    }
    if case.kind == "gated":
        state["sae"]["b_mag"] = state["sae"]["b_enc"].clone()
    state["tokens_since_fired"] = DEAD_AFTER * problem.dead.long()
    state["scale"] = 1.0
    trainee.load_state_dict(state)

    def l0(x: Tensor) -> float:
        sums = trainee.step(x)
        return float(sums.l0 / sums.tokens)

    return Contestant(trainee.step, l0, lambda: int(trainee.dead.sum()))


def weight_bytes(case: Case) -> int:
    """fp32 weights, their gradients and two moments of them."""
    return 4 * 4 * (2 * case.d_in * case.d_sae + case.d_in + case.d_sae)


def memory(case: Case, rounds: int = 3) -> dict[str, float]:
    """Seconds and bytes of a step, in this process, which must be a fresh one."""
    for l0 in (None,) if case.l0 is None else (4.0, 128.0):  # sparse and dense: each path loads what it needs
        small = make_problem(dataclasses.replace(case, d_in=64, d_sae=256, batch=64, k=8, l0=l0), n_batches=1)
        step = make(small).step
        for _ in range(2):
            step(small.batches[0])
    del small, step
    measure.check_peak_resident()
    empty = measure.resident()
    problem = make_problem(case, n_batches=1)
    contestant = make(problem)
    x = problem.batches[0].clone()
    del problem
    contestant.step(x)
    measure.resident()
    peak = measure.peak_resident(lambda: contestant.step(x))
    times = [measure.seconds(lambda: contestant.step(x)) for _ in range(rounds)]
    known = weight_bytes(case) + 4 * x.numel()
    return {"seconds": statistics.median(times), "peak": peak, "extra": peak - empty - known}


def huge(case: Case, rounds: int, limit: int) -> dict[str, float]:
    """Seconds of a step and the peak of this process, which must be a fresh one, over everything it ever did.

    Args:
        case: What to train, from unweave's own initial weights, with moments in bf16.
        rounds: Steps to time, after one to warm up.
        limit: Bytes of private memory beyond which an allocation fails, so that the machine does not.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (limit + (2 << 30), limit + (2 << 30)))  # counts untouched pages too
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, case.d_in, generator=generator)
    wide = dataclasses.replace(config(case), moments="bf16")
    trainee = Trainee(wide, x, steps=1000, tokens=1000 * case.batch, seed=0)
    trainee.step(x)
    times = [measure.seconds(lambda: trainee.step(x)) for _ in range(rounds)]
    return {"seconds": statistics.median(times), "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def in_fresh_process(function: Callable[..., dict[str, float]], case: Case, *arguments: int) -> dict[str, float]:
    """`memory` or `huge`, run in a process of its own."""
    call = json.dumps([function.__name__, dataclasses.asdict(case), *arguments])
    out = subprocess.run([sys.executable, __file__, call], check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(out.splitlines()[-1])
    return result


if __name__ == "__main__":
    name, fields, *rest = json.loads(sys.argv[1])
    functions: dict[str, Callable[..., dict[str, float]]] = {"memory": memory, "huge": huge}
    print(json.dumps(functions[name](Case(**fields), *rest)))
