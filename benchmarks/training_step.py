"""Training steps of unweave and of other libraries, on the same weights and batches, in one process.

    .venv-oracles/bin/pip install --no-deps -r benchmarks/requirements.txt      # the other libraries, see there
    .venv-oracles/bin/python benchmarks/training_step.py --write                # all tables, about an hour
    .venv-oracles/bin/python benchmarks/training_step.py --quick                # TopK, unweave and sae-lens, a minute
    .venv-oracles/bin/python benchmarks/training_step.py --huge                 # a million latents, unweave alone

Every number is the median of steps that the contestants take in turn. Libraries run at their defaults
(`benchmarks/peers.py` says what that is). Before and after timing, the mean L0 and the number of dead latents are
checked in every library. `--write` puts the tables into `benchmarks/results/training_step.md`.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import measure
import ours
import peers
from cases import KINDS, Case, Contestant, make_problem

SHAPES = ("768x12288", "768x24576", "384x6144")
DEAD = (0.01, 0.1, 0.3)
OURS, BASELINE = "unweave", "sae-lens"
LIMIT = 20 << 30
ALONE = 3
"""Times as many rounds for our own step and its product, which take little time."""


class Peaks(NamedTuple):
    """Best measured rates of a matrix product, FLOP/s."""

    bf16: float
    fp32: float


class Row(NamedTuple):
    """What was measured for a case: seconds of a step by library, and bytes.

    `alone` has our step and the products "bf16" and "fp32", with no other library's steps between them.
    """

    case: Case
    steps: dict[str, float]
    alone: dict[str, float]
    extra_memory: float


def contest(case: Case, names: Sequence[str], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each library's step in turn, of our step and its product in turn, and of that in fp32."""
    problem = make_problem(case)
    contestants: dict[str, Contestant] = {OURS: ours.make(problem)}
    for name in names:
        if (contestant := peers.PEERS[name].make(problem)) is not None:
            contestants[name] = contestant
    for contestant in contestants.values():
        contestant.check(problem)
    functions: dict[str, Callable[[Tensor], object]] = {name: c.step for name, c in contestants.items()}
    times = measure.medians(functions, problem.batches, rounds)
    bf16, fp32 = (measure.product(problem.batches[0], problem.W, dtype) for dtype in (torch.bfloat16, torch.float32))
    by_itself = measure.medians({OURS: functions[OURS], "bf16": bf16}, problem.batches, ALONE * rounds)
    by_itself |= measure.medians({"fp32": fp32}, problem.batches, rounds)
    if case.frozen:
        for contestant in contestants.values():
            contestant.check(problem)
    return times, by_itself


def run(case: Case, names: Sequence[str], rounds: int) -> Row:
    """Measure a case."""
    print(f"{case}, {case.shape} ...", file=sys.stderr, flush=True)
    steps, alone = contest(case, names, rounds)
    gc.collect()
    return Row(case, steps, alone, ours.in_fresh_process(ours.memory, case)["extra"])


def cases(kinds: Sequence[str], shapes: Sequence[str], batch: int, k: int, l0: float) -> list[Case]:
    """The TopK family at every shape; the others at the first, at a working density and at that of the first steps."""
    plain = [Case("topk", *sizes(shape), batch, k) for shape in shapes]
    found: list[Case] = []
    for kind in kinds:
        if kind in ("topk", "batchtopk"):
            found += [replace(case, kind=kind) for case in plain]
        elif kind == "matryoshka":
            found.append(replace(plain[0], kind=kind))
        else:
            densities = [l0] if kind == "gated" else [l0, plain[0].d_sae / 2]
            found += [replace(plain[0], kind=kind, l0=density) for density in densities]
    return found


def sizes(shape: str) -> tuple[int, int]:
    """d_in and d_sae of a shape such as "768x12288"."""
    d_in, d_sae = map(int, shape.split("x"))
    return d_in, d_sae


def ms(times: dict[str, float], name: str) -> str:
    if name not in times:
        return "–"
    return f"{1000 * times[name]:.0f}" if times[name] >= 0.01 else f"{1000 * times[name]:.2f}"


def ratio(a: float | None, b: float) -> str:
    return "–" if a is None else f"{a / b:.1f}×"


def step_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Milliseconds of a step by library."""
    lines = []
    for row in rows:
        t = row.steps
        others = [seconds for name, seconds in t.items() if name not in (OURS, BASELINE)]
        lines.append([
            str(row.case), row.case.shape, f"**{ms(t, OURS)}**", *(ms(t, name) for name in names),
            ratio(t.get(BASELINE), t[OURS]), ratio(min(others, default=None), t[OURS]),
        ])  # fmt: skip
    return measure.table(["case", "shape", OURS, *names, f"{BASELINE} takes", "the fastest other takes"], lines)


def product_table(rows: Sequence[Row], peaks: Peaks) -> str:
    """Our step beside its encoder product and the machine's limits."""
    lines = []
    for row in rows:
        case, step = row.case, row.alone[OURS]
        flops = 2 * case.batch * case.d_in * case.d_sae
        lines.append([
            str(case), case.shape, *(ms(row.alone, name) for name in (OURS, "bf16", "fp32")),
            f"{step / row.alone['bf16']:.2f}×", f"{flops / step / peaks.bf16:.0%}",
            f"{row.extra_memory / (4 * case.batch * case.d_sae):.2f}",
        ])  # fmt: skip
    heading = ["case", "shape", "step", "bf16 product", "fp32 product", "step / bf16 product", "of bf16 peak", "memory"]
    return measure.table(heading, lines)


def extra(plain: Case, fuller: Case, names: Sequence[str], rounds: int) -> list[str]:
    """By library: milliseconds of a step without and with what `fuller` has beyond `plain`, in one contest."""
    print(f"{fuller}, beside {plain} ...", file=sys.stderr, flush=True)
    makers = {OURS: ours.make, **{name: peers.PEERS[name].make for name in names}}
    problems = {case: make_problem(case) for case in (plain, fuller)}
    contestants = {
        (name, case): contestant
        for name, make in makers.items()
        for case, problem in problems.items()
        if (contestant := make(problem)) is not None
    }
    for (_, case), contestant in contestants.items():
        contestant.check(problems[case])
    functions = {f"{name}, {case}": contestant.step for (name, case), contestant in contestants.items()}
    t = measure.medians(functions, problems[plain].batches, rounds)  # both problems have the same batches
    for (_, case), contestant in contestants.items():
        if case.frozen:
            contestant.check(problems[case])
    line = [f"{fuller}, beside {plain}"]
    for name in makers:
        before, after = t.get(f"{name}, {plain}"), t.get(f"{name}, {fuller}")
        if before is None or after is None:
            line.append("–")
        else:
            line.append(f"{1000 * before:.0f} → {1000 * after:.0f} ({after / before - 1:+.0%})")
    return line


def extras(names: Sequence[str], shape: str, batch: int, k: int, rounds: int) -> str:
    """What AuxK and Matryoshka add to a step."""
    names = [name for name in (BASELINE, "dictionary_learning", "sparsify") if name in names]
    topk, batchtopk = (Case(kind, *sizes(shape), batch, k) for kind in ("topk", "batchtopk"))
    lines = [extra(topk, replace(topk, dead=share), names, rounds) for share in DEAD]
    lines.append(extra(batchtopk, replace(batchtopk, kind="matryoshka"), names, rounds))
    return measure.table(["step", OURS, *names], lines)


def huge(rounds: int) -> str:
    """A million latents: seconds of a step and the process's peak memory."""
    case = Case("topk", 768, 1 << 20, 1024, 64)
    result = ours.in_fresh_process(ours.huge, case, rounds, LIMIT)
    peak = result["peak"] / 2**30
    text = (
        f"{case}, {case.shape}, batch {case.batch}, moments in bf16: {result['seconds']:.2f} s a step, peak {peak:.1f} "
        f"GiB of resident memory for the whole process (limit {LIMIT >> 30} GiB)."
    )
    if result["peak"] > LIMIT:
        raise SystemExit(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(peers.available())
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="D_INxD_SAE")
    parser.add_argument("--peers", nargs="*", choices=known, default=known)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--l0", type=float, default=100, help="working density of ReLU, JumpReLU and Gated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="TopK at the first shape, unweave and sae-lens only")
    parser.add_argument("--no-extras", action="store_true", help="leave out what AuxK and Matryoshka add")
    parser.add_argument("--huge", action="store_true", help="only a dictionary of 1,048,576 latents")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/training_step.md")
    args = parser.parse_args()
    if args.quick:
        args.kinds, args.shapes, args.peers, args.no_extras = ["topk"], args.shapes[:1], [BASELINE], True
    intro = measure.machine(list(dict.fromkeys(peers.PEERS[name].distribution for name in args.peers)))
    if args.huge:
        print("\n\n".join([*intro, huge(args.rounds)]))
        return
    widest = huge(rounds=2) if args.write and not args.quick else ""
    peaks = Peaks(measure.matmul_peak(torch.bfloat16), measure.matmul_peak(torch.float32))
    rows = [run(c, args.peers, args.rounds) for c in cases(args.kinds, args.shapes, args.batch, args.k, args.l0)]
    # A product of this benchmark may beat the square ones.
    for row in rows:
        flops = 2 * row.case.batch * row.case.d_in * row.case.d_sae
        peaks = Peaks(max(peaks.bf16, flops / row.alone["bf16"]), max(peaks.fp32, flops / row.alone["fp32"]))
    parts = [
        *intro,
        f"Batch {args.batch}; medians of {args.rounds} interleaved steps, in ms. Best matrix products: "
        f"{peaks.bf16 / 1e9:.0f} GFLOP/s in bf16, {peaks.fp32 / 1e9:.0f} in fp32.",
        step_table(rows, args.peers),
        "unweave's step beside its encoder product in bf16 alone (row chunks of 512, one reused buffer), medians of "
        f"{ALONE * args.rounds} in turn, with nothing between them, which would empty the caches as "
        "nothing in a training run does; the product in fp32 is taken after them. *of bf16 peak*: the "
        "FLOPs of that product over the time of the whole step. *memory*: peak of a step in a fresh process beyond "
        "weights, gradients, moments and the batch, as a share of one fp32 (batch, d_sae) tensor.",
        product_table(rows, peaks),
    ]
    if not args.no_extras:
        parts += [
            "What dead latents (AuxK) and Matryoshka's five prefixes add to a step:",
            extras(args.peers, args.shapes[0], args.batch, args.k, args.rounds),
        ]
    text = "\n\n".join(part for part in (*parts, widest) if part)
    print(text)
    if args.write:
        measure.write("training_step.md", text)


if __name__ == "__main__":
    main()
