"""The CUDA kernels on a machine without a GPU: they are interpreted, and compiled down to machine code.

What they compute is tested where `INTERPRETED` says, which Triton's interpreter runs on CPU tensors, in processes of
their own, because the interpreter must be chosen before Triton is imported. That the kernels compile is tested with the
launches that the wrappers really make.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

TESTS = Path(__file__).parent.parent
INTERPRETED = [
    ["kernels/triton"],
    ["training/triton"],
    ["training/test_fused.py", "-k", "autograd or dense_execution_equals or odd_batches or of_zeros"],
]
"""What runs in Triton's interpreter: paths below the tests."""
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tests", INTERPRETED)
def test_in_the_interpreter(tests: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=TESTS,
        env=environment | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "UNWEAVE_KERNELS": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_imports_triton_where_there_is_no_gpu() -> None:
    """pitfall_302"""
    program = "import unweave, unweave.kernels, unweave.sae, unweave.training, sys; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class Absent:
    """Stands for the driver of a GPU of some architecture: enough to compile for it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # compiled variants are remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> list[Any]:
    """What the wrappers' launches compile to, in place of running."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets everything in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from unweave.kernels.triton import launch

    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, warmup=True, **kwargs))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(launch, "interpreted", lambda: True)  # so that CPU tensors are taken
    monkeypatch.setattr(driver, "_active", Absent(request.param))
    return kernels


OPERATIONS = (
    "gather_sum", "segment_sum", "sddmm", "squared_error", "topk", "group_max", "above", "row_gradient",
    "adam_rows",
)  # fmt: skip
COMPOSED = ("screened",)
ARCHITECTURES = [pytest.param(80, marks=pytest.mark.slow), 90]


def calls(
    operation: str, dtype: torch.dtype, n: int, m: int, d: int, device: str = "cpu"
) -> list[Callable[[], object]]:
    """Calls that start every kernel of an operation."""
    from unweave.kernels import triton as kernels

    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    indices, values = ones(400, dtype=torch.long), ones(400)  # enough for a latent of several pieces
    offsets, groups = ones(n + 1, dtype=torch.long), ones(2 * n + 1, dtype=torch.long)
    x, weight, pre = ones(n, d, dtype=dtype), ones(m, d, dtype=dtype), ones(n, m, dtype=dtype)
    bias, bounds, prefixes = ones(d), ones(m), ones(2)
    rows, grad, first, second = ones(m, d), ones(m, d), ones(m, d, dtype=dtype), ones(m, d, dtype=dtype)
    starts, slot, image = ones(n, dtype=torch.long), ones(m, dtype=torch.long), ones(m, d, dtype=torch.bfloat16)

    def fused(offsets: torch.Tensor, prefixes: torch.Tensor) -> object:
        return kernels.squared_error(indices, values, offsets, weight, bias, x, prefixes, 1.0)

    def adam(**options: Any) -> object:
        return kernels.adam_rows(rows, grad, first, second, lr=0.1, step=1, **options)

    by_name: dict[str, list[Callable[[], object]]] = {
        "gather_sum": [lambda: kernels.gather_sum(indices, values, offsets, weight)],
        "segment_sum": [lambda: kernels.scatter_outer(indices, values, offsets, x, m)],
        "sddmm": [lambda: kernels.sddmm(indices, offsets, x, weight)],
        "squared_error": [lambda: fused(offsets, prefixes[:1]), lambda: fused(groups, prefixes)],
        "topk": [lambda: kernels.topk(pre, 3), lambda: kernels.topk(pre, 3, magnitude=True)],
        "group_max": [lambda: kernels.group_max(pre, 2)],
        "above": [
            lambda: kernels.count_above(pre, kernels.Bounds(bounds)),
            lambda: kernels.count_above(pre, kernels.Bounds(bounds, bounds, ones(n))),
            lambda: kernels.write_above(pre, kernels.Bounds(bounds, bounds, ones(n)), starts, indices, values),
        ],
        "screened": [lambda: kernels.topk_screened(pre, ones(n, d), rows, bounds, 2, spare=1)],
        "row_gradient": [
            lambda: kernels.finish_rows(grad, None, None, False),
            lambda: kernels.finish_rows(grad, rows, ones(m), True),
        ],
        "adam_rows": [adam, lambda: adam(slot=slot, clip=ones(), unit=True, image=image)],
    }
    return by_name[operation]


@needs_triton
@pytest.mark.parametrize("compiled", ARCHITECTURES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 2560, 2304)], ids=["odd", "aligned"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles(compiled: list[Any], operation: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    for call in calls(operation, dtype, *shape):
        call()
    assert compiled
    assert all(kernel.asm["cubin"] for kernel in compiled)


@needs_triton
@pytest.mark.parametrize("compiled", ARCHITECTURES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_registers_suffice(compiled: list[Any], tmp_path: Path, operation: str, dtype: torch.dtype) -> None:
    """At the width of a large model's activations no kernel spills registers, and its shared memory fits anywhere."""
    import triton

    for call in calls(operation, dtype, 2, 2560, 4096):
        call()
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    for kernel in compiled:
        source = tmp_path / "kernel.ptx"
        source.write_text(kernel.asm["ptx"], encoding="utf-8")
        target = kernel.asm["ptx"].partition(".target ")[2].split()[0].rstrip(",")
        told = subprocess.run(
            [assembler, "-v", f"-arch={target}", source, "-o", os.devnull], capture_output=True, text=True, check=True
        ).stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in told, told
        assert kernel.metadata.shared <= 48 << 10


@needs_triton
@pytest.mark.parametrize("operation", OPERATIONS + COMPOSED)
def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """A fake tensor has no data, so whatever has to look at data between two kernels raises an error."""
    from unweave.kernels.triton import launch

    started: list[Any] = []
    for name, module in list(sys.modules.items()):
        if name.startswith(str(launch.__package__)) and callable(getattr(module, "launch", None)):
            monkeypatch.setattr(module, "launch", lambda kernel, *args, **kwargs: started.append(kernel))
    monkeypatch.setattr(launch, "interpreted", lambda: True)  # so that CPU tensors are taken
    with FakeTensorMode():
        for call in calls(operation, torch.bfloat16, 2, 6, 5):
            call()
    assert started


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("operation", OPERATIONS + COMPOSED)
def test_nothing_waits_for_a_real_device(operation: str) -> None:
    made = calls(operation, torch.bfloat16, 2, 6, 5, device="cuda")
    for call in made:
        call()  # compiled and loaded, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in made:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
