"""Results do not depend on the number of threads, by a single bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.kernels import (
    Above,
    Largest,
    LargestOfBatch,
    LargestOfGroups,
    adam_rows,
    encode_select,
    gather_sum,
    scatter_outer,
    screen,
    sddmm,
    spread,
    squared_norm,
    transpose,
)
from unweave.objectives import L1, AuxK, Matryoshka, TargetL0
from unweave.sae import BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.training import SAEConfig
from unweave.training.trainee import Trainee

THREADS = (1, 2, 3)
# More rows than a thread takes at a time, and none of these a multiple of three.
N, M, D, K = 1100, 700, 130, 20


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same_on_any_number(compute: Callable[[], Any]) -> Any:
    """What it computes, always from the same seed."""
    outcomes = []
    for n in THREADS:
        torch.set_num_threads(n)
        torch.manual_seed(5)
        outcomes.append(compute())
    for n, outcome in zip(THREADS[1:], outcomes[1:], strict=True):
        compare(outcomes[0], outcome, f"with {n} threads")
    return outcomes[0]


def compare(one: Any, other: Any, where: str) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one.nan_to_num(1e30), other.nan_to_num(1e30)), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            compare(one[key], other[key], f"{where}: {key}")
    elif isinstance(one, tuple):
        for i, pair in enumerate(zip(one, other, strict=True)):
            compare(*pair, f"{where}: {i}")
    else:
        assert one == other, where


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
@pytest.mark.parametrize(
    "spec",
    [Largest(K), Largest(K, magnitude=True), LargestOfGroups(35), Above(15.0), LargestOfBatch(K * N)],
    ids=repr,
)
def test_encode_select(target, monkeypatch, spec, precision):
    monkeypatch.setattr(screen, "_fast_int8", lambda: True)
    monkeypatch.setattr(screen, "_NARROWEST", 1)
    same_on_any_number(
        lambda: encode_select(torch.randn(N, D), torch.randn(M, D).T, torch.randn(M), spec, precision=precision)
    )


def codes() -> tuple[Tensor, Tensor, Tensor]:
    """Rows of very different length, so that threads have different amounts of work."""
    counts = torch.randint(0, 2 * K, (N,))
    counts[::7], counts[3] = 0, M
    indices = torch.cat([torch.randperm(M)[:count].sort().values for count in counts])
    return indices, torch.randn(len(indices)), torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def sums_of_products() -> tuple[Tensor, ...]:
    indices, values, offsets = codes()
    weight, rows = torch.randn(M, D), torch.randn(N, D)
    inputs = [t.requires_grad_() for t in (values, weight, rows)]
    made = [
        gather_sum(indices, values, offsets, weight),
        sddmm(indices, offsets, rows, weight),
        scatter_outer(indices, values, offsets, rows, M),
    ]
    grads = [torch.autograd.grad(t, inputs, torch.randn(t.shape), allow_unused=True) for t in made]
    return *(t.detach() for t in made), *(g for found in grads for g in found if g is not None)


def test_products_and_their_gradients(backend):
    same_on_any_number(sums_of_products)


@pytest.mark.parametrize("n", [10, N])
def test_transpose(backend, n):
    """10 rows have so few entries that the compiled kernel does not divide them."""
    same_on_any_number(lambda: tuple(transpose(torch.randint(0, M, (n * K,)), torch.arange(n + 1) * K, M)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_rows(backend, dtype):
    def steps() -> dict[str, Tensor]:
        weight, slot = torch.randn(M, D), torch.full((M,), -1)
        slot[torch.randperm(M)[:300]] = torch.arange(300)
        first, second = torch.zeros(M, D, dtype=dtype), torch.zeros(M, D, dtype=dtype)
        for step in (1, 2, 3):
            made = adam_rows(
                weight, torch.randn(300, D), slot, first, second,
                lr=0.01, betas=(0.9, 0.999), eps=1e-8, step=step, unit=True, screen="bf16",
            )  # fmt: skip
        images = {} if made is None else {name: t for name, t in vars(made.images).items() if t is not None}
        return {"weight": weight, "first": first, "second": second} | images

    same_on_any_number(steps)


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("shape", [(1, 65_600), (13, 40_001), (2, 300_000), (N, D), (0, D)])
def test_squared_norm(backend, shape, differentiated):
    """One row of many elements is a bias of a wide dictionary. PyTorch holds 13 of 40,001 6, 6 and 1 at a time."""

    def norm_and_gradient() -> tuple[Tensor, Tensor | None]:
        x = (10 * torch.randn(shape)).requires_grad_(differentiated)
        norm = squared_norm(x)
        return norm.detach(), torch.autograd.grad(norm, x)[0] if differentiated else None

    found, gradient = same_on_any_number(norm_and_gradient)
    torch.manual_seed(5)
    x = 10 * torch.randn(shape)
    torch.testing.assert_close(found.double(), x.double().square().sum(), rtol=1e-6, atol=0)
    if gradient is not None:
        assert torch.equal(gradient, 2 * x)


def test_spread(backend):
    same_on_any_number(lambda: spread(torch.randn(N, D)))


OF_ALL = {"d_sae": 300, "auxk": AuxK(1 / 32, k=16)}
CONFIGS = {
    "TopK": SAEConfig(activation=TopK(8), **OF_ALL),
    "BatchTopK": SAEConfig(activation=BatchTopK(8), **OF_ALL),
    "Matryoshka BatchTopK": SAEConfig(activation=BatchTopK(8), matryoshka=Matryoshka((0.1, 0.5)), **OF_ALL),
    "ReLU": SAEConfig(activation=ReLU(), sparsity=L1(0.1), **OF_ALL),
    "JumpReLU": SAEConfig(activation=JumpReLU(1.5, 0.5), sparsity=TargetL0(8), **OF_ALL),
    "Gated": SAEConfig(activation=Gated(), sparsity=L1(0.1), **OF_ALL),
}
EXECUTIONS = [*((name, "sparse") for name in CONFIGS), ("ReLU", "dense"), ("JumpReLU", "dense")]


@pytest.mark.parametrize(("name", "execution"), EXECUTIONS)
def test_training(monkeypatch, name, execution):
    """Five steps with dead latents: weights, moments, counts, and what is logged."""
    config = CONFIGS[name]

    def steps() -> dict[str, Any]:
        batches = [torch.randn(N, D) * (1 + torch.arange(D) / D) + 0.3 for _ in range(5)]
        trainee = Trainee(config, batches[0], steps=20, tokens=20 * N, seed=0)
        if execution == "sparse":  # two or three standard deviations
            trainee.sae.b_enc.data.fill_({"ReLU": -0.3, "JumpReLU": -1.5, "Gated": -2.0}.get(name, 0.0))
        logged = []
        for x in batches:
            trainee.tokens_since_fired[:30] = trainee.dead_after
            logged.append(tuple(trainee.step(x)))
            if trainee.fused is not None:
                assert trainee.fused.dense == (execution == "dense")
        return {"state": trainee.state_dict(), "logged": tuple(logged)}

    found = same_on_any_number(steps)
    assert found["logged"][-1][3] > 0  # latents fired
