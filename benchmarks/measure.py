"""Measuring: medians of interleaved steps, matmul peaks, memory bandwidth, peak memory, and which machine it was."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
CHUNK_ROWS = 512
Batch = TypeVar("Batch")


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    finally:
        gc.enable()


def medians(
    contestants: Mapping[str, Callable[[Batch], object]], batches: Sequence[Batch], rounds: int
) -> dict[str, float]:
    """Median seconds of a call of each contestant, after one call each to warm up.

    In each round every contestant has its turn, so that a machine that slows down slows down all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for function in contestants.values():
        function(batches[-1])
    for i in range(rounds):
        x = batches[i % len(batches)]
        for name, function in contestants.items():
            times[name].append(seconds(lambda function=function, x=x: function(x)))  # type: ignore[misc]
    return {name: statistics.median(values) for name, values in times.items()}


def product(
    x: Float[Tensor, "n d_in"], rows: Float[Tensor, "d_sae d_in"], dtype: torch.dtype
) -> Callable[[object], None]:
    """The encoder product `x @ rows.T` by itself, as fast as PyTorch does it: in row chunks, into one reused buffer.

    (A fresh (n, d_sae) output costs more in page faults than what the product takes.)
    """
    x, W = x.to(dtype), rows.to(dtype)
    out = torch.empty(min(CHUNK_ROWS, len(x)), len(W), dtype=dtype)

    def run(_: object) -> None:
        for part in x.split(CHUNK_ROWS):
            torch.mm(part, W.T, out=out[: len(part)])

    return run


def matmul_peak(dtype: torch.dtype, sizes: Sequence[int] = (1024, 2048, 4096), rounds: int = 5) -> float:
    """The best measured rate of a square matrix product, in FLOP/s."""
    best = 0.0
    for n in sizes:
        a, b, out = (torch.randn(n, n).to(dtype) for _ in range(3))
        fastest = min(seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) for _ in range(rounds))  # type: ignore[misc]
        best = max(best, 2 * n**3 / fastest)
    return best


def memory_bandwidth(size: int = 1 << 29, rounds: int = 5) -> float:
    """The best measured rate of a large copy, in bytes read and written per second."""
    source, target = torch.ones(size // 4), torch.empty(size // 4)
    target.copy_(source)
    return 2 * size / min(seconds(lambda: target.copy_(source)) for _ in range(rounds))


def _status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only.")


def resident() -> int:
    """Resident memory of this process in bytes, after handing back what the allocator holds in reserve."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak_resident(function: Callable[[], object]) -> int:
    """The highest resident memory of this process while a function runs, in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    function()
    return _status("VmHWM")


def check_peak_resident(size: int = 1 << 28) -> None:
    """Raise unless `peak_resident` sees an allocation of known size that is freed again."""
    before = resident()
    seen = peak_resident(lambda: torch.ones(size, dtype=torch.uint8)) - before
    if not 0.97 < seen / size < 1.03:
        raise RuntimeError(f"an allocation of {size} bytes was measured as {seen} bytes.")


def processor() -> str:
    """The processor's name, number of cores and widest instruction sets."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if info.exists():
        pairs = (line.partition(":")[::2] for line in info.read_text(encoding="utf-8").splitlines())
        fields = {name.strip(): value.strip() for name, value in pairs}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = set(fields.get("flags", "").split())
    wide = [f for f in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if f in flags]
    return f"{fields.get('model name', platform.processor() or platform.machine())}, {cores} cores, {' '.join(wide)}"


def machine(packages: Sequence[str] = ()) -> list[str]:
    """Lines that say what a table was measured on: processor, threads, versions, date, command."""
    versions = [f"PyTorch {torch.__version__}", *(f"{p} {metadata.version(p)}" for p in packages)]
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return [
        f"{processor()}; {torch.get_num_threads()} threads, PyTorch's kernels for {_capability()}.",
        f"{', '.join(versions)}. {datetime.date.today():%d %B %Y}, `{command}`.",
    ]


def _capability() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(line)} |" for line in (heading, *rows)]
    return "\n".join([lines[0], "|---" * len(heading) + "|", *lines[1:]])


def write(name: str, text: str) -> None:
    """Write a result beside this file."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(text.rstrip() + "\n", encoding="utf-8")
    print(f"wrote {RESULTS / name}", file=sys.stderr)
