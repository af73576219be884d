"""Every activation function with every objective that it goes with, on the model that ships and on a known world.

    .venv/bin/python benchmarks/architectures.py --write                  # all rows
    .venv/bin/python benchmarks/architectures.py --tokens 30000           # the same, shorter
    .venv/bin/python benchmarks/architectures.py --rows relu/ "topk/l1"   # rows whose name contains one of these

Rows come from the registers, so a new activation function or penalty is in the table once it is registered. All SAEs
see the same batches and have about the same L0: their k where they have one, else a target of the penalty or the L0
controller's. Rows are printed as they come, and kept in `--keep FILE`, from which a run that was stopped goes on.
`--write` puts the tables into `benchmarks/results/architectures.md`. The exit status is 1 if a row collapses.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

import measure
from combinations import (
    ARCHETYPAL_DELTA,
    FINE_LR,
    FINE_TOKENS,
    HOOK,
    LR,
    LRS,
    PENALISED_LR,
    SEEDS,
    Case,
    Problem,
    activations,
    all_cases,
    goes,
    objectives,
    plain_objective,
    problems,
    score,
    sequences,
    trained,
)
from unweave import UnweaveError
from unweave.sae import ACTIVATIONS

CLOSE = 0.001
"""Explained variances that count as the same."""
ABSORBS = 0.05
"""Absorption below which there is none that Matryoshka could lower."""
Rows = dict[str, dict[str, Any]]
"""What was measured of each row, by its name."""


def work(cases: Sequence[Case], folder: str) -> list[tuple[str, dict[str, Any]]]:
    """Train some rows of a problem on its batches, and score them."""
    torch.set_num_threads(1)
    p, rows = cases[0].problem, []
    for case in cases:
        started = time.perf_counter()
        row: dict[str, Any]
        try:
            row = score(p, trained(case, torch.load(Path(folder, f"{data_of(case)}.pt"), mmap=True)))
        except UnweaveError as error:  # it diverged, or has no latent left to calibrate
            row = {"error": str(error)}
        rows.append((case.name, row | {"seconds": time.perf_counter() - started}))
    return rows


def data_of(case: Case) -> str:
    """Name of what a row is trained on."""
    return "sequences" if case.objective == "temporal" else case.problem.name


def collapsed(row: dict[str, Any], best: float) -> bool:
    """All dead, no L0, or explained variance below 0.5 where others reach 0.8; or training failed."""
    if "error" in row or row["ev"] is None:
        return True
    return row["l0"] < 0.1 or row["dead"] > 0.99 or (best >= 0.8 and row["ev"] < 0.5)


def chunks(cases: Sequence[Case]) -> list[list[Case]]:
    """Rows that one worker does at a time, default objectives first; pursuits, which are slow, one by one."""
    found: list[list[Case]] = []
    for case in sorted(cases, key=lambda case: not case.plain):
        last = found[-1] if found else []
        slow = ACTIVATIONS[case.activation].tied or (last and ACTIVATIONS[last[0].activation].tied)
        if slow or not 0 < len(last) < 4 or last[0].problem != case.problem:
            found.append([case])
        else:
            last.append(case)
    return found


def kept(cases: Sequence[Case], file: Path | None) -> Rows:
    """Rows of these sizes that an earlier run has left in a file, by name."""
    if file is None or not file.exists():
        return {}
    sizes = {case.name: list(case.problem) for case in cases}
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {name: row for name, size, row in lines if sizes.get(name) == size}


def run(cases: Sequence[Case], keep: Path | None, jobs: int) -> tuple[Rows, int]:
    """All rows, by name, each printed as it comes; and how many of them an earlier run had left in `keep`."""
    sizes = {case.name: list(case.problem) for case in cases}
    done = kept(cases, keep)
    left, earlier = [case for case in cases if case.name not in done], len(done)
    fresh = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(jobs, fresh) as pool:
        for name, p in {(data_of(case), case.problem) for case in left}:
            torch.save((sequences if name == "sequences" else activations)(p), Path(folder, f"{name}.pt"))
        futures = [pool.submit(work, part, folder) for part in chunks(left)]
        for future in as_completed(futures):
            for name, row in future.result():
                done[name] = row
                shown = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
                print(f"{len(done)}/{len(cases)} {name}: {', '.join(shown)}", flush=True)
                if keep is not None:
                    with keep.open("a", encoding="utf-8") as file:
                        file.write(json.dumps([name, sizes[name], row]) + "\n")
    return done, earlier


def show(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else f"{value:{form}}"


def main_table(cases: Sequence[Case], rows: Rows) -> str:
    """A line for each activation function and objective: the model beside the world."""
    lines, names = [], dict.fromkeys((case.activation, case.objective) for case in cases)
    for activation, objective in names:
        on = [rows.get(f"{where}/{activation}/{objective}", {}) for where in ("model", "zipfian")]
        if any(on):
            m, w = ({k: row.get(k) for k in ("l0", "ev", "recovered", "dead", "mmcs", "f1")} for row in on)
            plain = objective == plain_objective(activation)
            lines.append([
                f"**{activation}**" if plain else activation, objective,
                show(m["l0"], ".1f"), show(m["ev"]), show(m["recovered"]), show(m["dead"], ".1%"),
                show(w["l0"], ".1f"), show(w["ev"]), show(w["dead"], ".1%"), show(w["mmcs"]), show(w["f1"]),
            ])  # fmt: skip
    heading = ["activation", "objective", "L0", "explained variance", "loss recovered", "dead", "world: L0",
               "explained variance", "dead", "max cosine", "F1"]  # fmt: skip
    return measure.table(heading, lines)


def seeds(rows: Rows, where: str, activation: str, objective: str) -> list[dict[str, Any]]:
    """What was measured of a row, seed by seed, where it was trained."""
    p = Problem(where, 0, 0, 0, 0, 0)
    found = [rows.get(Case(activation, objective, p, seed).name, {}) for seed in SEEDS]
    return [row for row in found if "ev" in row]


def mean(found: Sequence[dict[str, Any]], key: str) -> float:
    """Mean over the seeds that have it; NaN if none has."""
    values = [row[key] for row in found if row[key] is not None]
    return statistics.fmean(values) if values else float("nan")


def spread(found: Sequence[dict[str, Any]], key: str, form: str = ".3f") -> str:
    """Mean over the seeds, and their standard deviation."""
    deviation = statistics.stdev(row[key] for row in found) if len(found) > 1 else 0.0
    return f"{mean(found, key):{form}} ± {deviation:{form}}"


def order_table(rows: Rows) -> str:
    """The activation functions with their default objectives, best first on the model."""
    found = []
    for name in ACTIVATIONS:
        m, w = (seeds(rows, where, name, plain_objective(name)) for where in ("model", "zipfian"))
        if m and w:
            found.append((mean(m, "ev"), [
                name, plain_objective(name), spread(m, "l0", ".1f"), spread(m, "ev"), spread(m, "recovered"),
                spread(w, "l0", ".1f"), spread(w, "ev"), spread(w, "mmcs"), spread(w, "f1"),
            ]))  # fmt: skip
    heading = ["activation", "objective", "L0", "explained variance", "loss recovered", "world: L0",
               "explained variance", "max cosine", "F1"]  # fmt: skip
    return measure.table(heading, [line for _, line in sorted(found, reverse=True)])


def order(rows: Rows) -> str:
    """Whether the order known from the literature appears, on the model and on the world, with the L0 of each."""
    lines = []
    for below, above in (("relu", "topk"), ("relu", "batchtopk"), ("relu", "gated"), ("relu", "jumprelu"),
                         ("gated", "topk"), ("jumprelu", "topk")):  # fmt: skip
        found = []
        for where in ("model", "zipfian"):
            a, b = (seeds(rows, where, name, plain_objective(name)) for name in (below, above))
            if a and b:
                higher = min(row["ev"] for row in b) > max(row["ev"] for row in a)
                answer = "yes" if higher else "no" if mean(b, "ev") < mean(a, "ev") else "within the spread"
                sizes = (f"{mean(row, 'ev'):.3f} at L0 {mean(row, 'l0'):.1f}" for row in (b, a))
                found.append(f"{where} **{answer}** ({', '.join(sizes)})")
        if found:
            lines.append(f"- {above} above {below}: {'; '.join(found)}")
    absorbing = [pair for pair in nested(rows) if mean(pair[1], "absorption") > ABSORBS]
    if absorbing:
        kept = [a for a, without, with_it in absorbing if mean(with_it, "absorption") >= mean(without, "absorption")]
        n = len(absorbing) - len(kept)
        lines.append(
            f"- of the activation functions with an absorption above {ABSORBS}, Matryoshka lowers it in **{n} of "
            f"{len(absorbing)}**" + (f", not in {', '.join(kept)}" if kept else "")
        )
    return "\n".join(lines)


def nested(rows: Rows) -> list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """The activation functions with their seeds on the hierarchical world, without Matryoshka and with it."""
    found = []
    for a in ACTIVATIONS:
        without, with_it = (seeds(rows, "hierarchical", a, o) for o in (plain_objective(a), "Matryoshka"))
        if without and with_it:
            found.append((a, without, with_it))
    return found


def splitting_table(rows: Rows) -> str:
    """Absorption and splitting on the hierarchical world, without and with Matryoshka."""
    columns = (("absorption", ".3f"), ("spread", ".2f"), ("f1", ".3f"), ("dead", ".0%"), ("ev", ".3f"), ("l0", ".1f"))
    lines = [
        [name, *(f"{mean(without, key):{form}} → {mean(with_it, key):{form}}" for key, form in columns)]
        for name, without, with_it in nested(rows)
    ]
    return measure.table(["activation", "absorption", "firing spread", "F1", "dead", "explained variance", "L0"], lines)


def refused(p: Problem) -> str:
    """What is refused, with the reason for the first."""
    lines = []
    for objective in dict.fromkeys(o for activation in ACTIVATIONS for o in objectives(activation)):
        reasons = {a: reason for a in ACTIVATIONS if (reason := goes(Case(a, objective, p)))}
        if reasons:
            lines.append([objective, ", ".join(reasons), next(iter(reasons.values()))])
    return measure.table(["objective", "refused with", "the reason, for the first"], lines)


def compared(rows: Rows, others: Rows) -> str:
    """How rows of two runs agree: those that end elsewhere, and how far."""
    both = [name for name in rows if name in others]
    apart = {name: abs(rows[name]["ev"] - others[name]["ev"]) for name in both}
    far = sorted((name for name in both if apart[name] > CLOSE), key=lambda name: -apart[name])
    lines = [
        [name, *(f"{show(row['ev'])} at L0 {show(row['l0'], '.1f')}" for row in (others[name], rows[name]))]
        for name in far
    ]
    return "\n\n".join([
        "### Trained twice",
        f"{len(both)} rows were trained by an earlier state of the code, too. {len(both) - len(far)} of them end "
        f"within {CLOSE:g} of the same explained variance; the others:",
        measure.table(["row", "earlier", "now"], lines),
    ])  # fmt: skip


def report(cases: Sequence[Case], rows: Rows, bad: Sequence[str], earlier: int, others: Rows) -> str:
    """The page."""
    sizes = "; ".join(
        f"*{p.name}*: d_sae {p.d_sae:,}, L0 {p.l0}, {p.tokens:,} tokens in steps of {p.batch}, scored on "
        f"{p.eval_tokens:,}"
        for p in dict.fromkeys(case.problem for case in cases)
    )
    return "\n\n".join([
        *measure.machine(),
        f"`{HOOK}` of the model that ships, reading Python's documentation and sources; the worlds are those of "
        f"`unweave synth`. {sizes}. Learning rate {LR:g} where latents are ranked, {LRS['tanhrelu']:g} for "
        f"TanhReLU, else {PENALISED_LR:g}. Archetypal atoms may be {ARCHETYPAL_DELTA:g} from their hull. Rows "
        f"named *then ...* go on for {FINE_TOKENS:,} tokens at {FINE_LR:g}. No "
        f"SAE is trained to its end. The first two tables are of {len(SEEDS)} seeds (of pursuits on the model one), ± "
        "their standard deviation; the last is of one."
        + (f" {earlier} of {len(rows)} rows are kept from interrupted runs before this one." if earlier else ""),
        "### In order",
        order_table(rows),
        order(rows),
        "### A hierarchy, without and with Matryoshka",
        splitting_table(rows),
        "### All rows",
        main_table(cases, rows),
        *([compared(rows, others)] if others else []),
        f"{len(bad)} of {len(rows)} rows collapsed" + (f": {', '.join(bad)}." if bad else "."),
        "### Refused",
        refused(problems(None)[0]),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="tokens to train on, everywhere")
    parser.add_argument("--rows", nargs="*", default=[], help="rows whose name contains one of these; all if left out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument(
        "--keep",
        type=Path,
        help="file of finished rows, from which a stopped run goes on; rows of other sizes are trained again",
    )
    parser.add_argument("--against", type=Path, help="file of rows that another run kept, to compare with")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/architectures.md")
    args = parser.parse_args()
    chosen = [c for c in all_cases(problems(args.tokens)) if not args.rows or any(part in c.name for part in args.rows)]
    rows, earlier = run(chosen, args.keep, args.jobs)
    best: dict[str, float] = {}
    for c in chosen:
        best[c.problem.name] = max(best.get(c.problem.name, 0.0), rows[c.name].get("ev") or 0.0)
    bad = [c.name for c in chosen if collapsed(rows[c.name], best[c.problem.name])]
    text = report(chosen, rows, bad, earlier, kept(chosen, args.against))
    print(text)
    if args.write:
        measure.write("architectures.md", text)
    if bad:
        sys.exit("\n".join([f"{len(bad)} rows collapsed:", *(f"  {name}: {rows[name]}" for name in bad)]))


if __name__ == "__main__":
    main()
