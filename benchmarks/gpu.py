"""A TopK step on a GPU: beside sae-lens' with autocast and torch.compile, where its time goes, whether its host waits.

    .venv-oracles/bin/python benchmarks/gpu.py --write                                # 4096 → 65,536, k 64, batch 8192
    .venv-oracles/bin/python benchmarks/gpu.py --device cpu --shape 64x1024 --batch 256   # tries the script, no more

Times are of many steps in a row, started one after the other as training does and waited for at the end; the libraries
take turns, and medians of the turns are shown. `--write` puts the tables into `benchmarks/results/gpu.md`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import measure
import ours
import peers
from cases import Case, Problem, make_problem
from unweave.kernels import low

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize")
Step = Callable[[Tensor], object]


def finish(device: str) -> None:
    """Wait until the device has done everything that it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def seconds_each(step: Step, problem: Problem, steps: int, device: str) -> float:
    """Seconds of a step, of several in a row."""
    finish(device)
    started = time.perf_counter()
    for i in range(steps):
        step(problem.batches[i % len(problem.batches)])
    finish(device)
    return (time.perf_counter() - started) / steps


def medians(contestants: dict[str, Step], problem: Problem, rounds: int, steps: int, device: str) -> dict[str, float]:
    """Median seconds of a step of each library, all of which take turns."""
    for step in contestants.values():
        seconds_each(step, problem, 3, device)  # compiles what it compiles
    times = [{n: seconds_each(s, problem, steps, device) for n, s in contestants.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in contestants}


def product(problem: Problem) -> Step:
    """The encoder product by itself, in the precision and the pieces of a step."""
    dtype = torch.bfloat16 if low("auto", problem.W.device.type) else torch.float32
    rows = max(1, (1 << 29) // (dtype.itemsize * len(problem.W)))
    W, out = problem.W.to(dtype).T, problem.W.new_empty(rows, len(problem.W), dtype=dtype)

    def run(x: Tensor) -> None:
        for part in x.to(dtype).split(rows):
            torch.mm(part, W, out=out[: len(part)])

    return run


def waits_and_kernels(step: Step, problem: Problem, steps: int) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """How often a step's host waits, by call, and the device's milliseconds in each kernel; of a step."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(problem.batches[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    finish("cuda")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for i in range(steps):
            step(problem.batches[i % len(problem.batches)])
    events = seen.key_averages()
    # The profiler itself waits once, at its end.
    waits = {name: sum(e.count for e in events if e.key == name) / steps for name in WAITS}
    on_device = [(e.key, e.self_device_time_total / steps / 1e3) for e in events if e.device_type.name == "CUDA"]
    return waits, sorted(on_device, key=lambda pair: -pair[1])


def extra_memory(step: Step, problem: Problem) -> int:
    """Bytes that a step takes at its peak beside what is there before it."""
    finish("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(problem.batches[0])
    finish("cuda")
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="4096x65536", help="d_in x d_sae")
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="in a row, in each round")
    parser.add_argument("--alone", action="store_true", help="without sae-lens")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; `--device cpu` tries the script.")
    d_in, d_sae = (int(width) for width in options.shape.split("x"))
    problem = make_problem(Case("topk", d_in, d_sae, options.batch, options.k))
    there = [x.to(options.device) for x in problem.batches]
    problem = problem._replace(batches=there, W=problem.W.to(options.device), dead=problem.dead.to(options.device))

    step = ours.make(problem).step
    contestants: dict[str, Step] = {"unweave": step}
    if not options.alone:
        for name, settings in {
            "sae-lens": {},
            "sae-lens, autocast, compiled": {"autocast": True, "compiled": True},
        }.items():
            peer = peers.sae_lens(problem, **settings)
            assert peer is not None
            contestants[name] = peer.step
    contestants["encoder product"] = product(problem)
    times = medians(contestants, problem, options.rounds, options.steps, options.device)
    rows = [
        [name, f"{1e3 * t:.2f}", f"{t / times['unweave']:.1f}×", f"{times['encoder product'] / t:.0%}"]
        for name, t in times.items()
    ]
    name = torch.cuda.get_device_name() if options.device != "cpu" else measure.processor()
    lines = [
        f"{name}. PyTorch {torch.__version__}. {problem.case}, {problem.case.shape}, batch {options.batch}; medians of "
        f"{options.rounds} turns of {options.steps} steps.",
        "",
        measure.table(["step", "ms", "of ours", "encoder product's share"], rows),
    ]
    if options.device != "cpu":
        extra = extra_memory(step, problem)  # the weights' gradients among it
        waits, kernels = waits_and_kernels(step, problem, options.steps)
        shown = ", ".join(f"{count:.1f} {call}" for call, count in waits.items())
        dense = 4 * options.batch * d_sae
        lines += [
            "",
            f"Waits of a step (the profiler's own, at the end, among them): {shown}. Beside weights and moments it "
            f"takes {extra / 2**30:.1f} GiB, {extra / dense:.2f} of an fp32 (batch, d_sae) tensor.",
            "",
            measure.table(["kernel", "ms of a step"], [[f"`{key[:80]}`", f"{ms:.2f}"] for key, ms in kernels[:12]]),
        ]
    text = "\n".join(lines)
    print(text)
    if options.write:
        measure.write("gpu.md", text)


if __name__ == "__main__":
    main()
