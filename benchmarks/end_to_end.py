"""Training an SAE on a live model, end to end: unweave beside what its parts reach alone, and SAELens' runner.

    .venv-oracles/bin/pip install --no-deps -r benchmarks/requirements.txt      # the other library, see there
    .venv-oracles/bin/python benchmarks/end_to_end.py --write                   # about five minutes

A model of GPT-2 small's shape with random weights, context 128, the residual stream in front of the seventh block, a
TopK SAE with k 32 and 768 -> 12,288, batches of 4096. Both libraries train through their public entry point, at their
defaults; a step is timed from one batch to the next, filling and saving are left out. unweave's harvest and step alone
are timed in turn with it. `--write` puts the table into `benchmarks/results/end_to_end.md`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import gpt2_small
import measure
import unweave as uw
from unweave.activations import ShuffledBatches
from unweave.training.session import Session
from unweave.training.train import prepare
from unweave.training.trainee import Trainee
from unweave.training.trainees import new_trainee

BATCH, D_SAE, K = 4096, 12_288, 32
LEAST_GAIN, LEAST_SHARE = 8.0, 0.85


def config(steps: int) -> uw.TrainConfig:
    return uw.TrainConfig(
        model="gpt2-small-random",
        hooks=(gpt2_small.HOOK,),
        saes=(uw.SAEConfig(d_sae=D_SAE, activation=uw.TopK(K)),),
        tokens=steps * BATCH,
        batch_size=BATCH,
        buffer=8 * BATCH,  # a quarter of the default: filling takes time, and a step costs the same
        text=uw.DataConfig(context=gpt2_small.CONTEXT, held_out=0.0),
        device="cpu",
    )


def trained(model: Any, steps: int) -> list[float]:
    """Seconds of each step of `uw.train`, from batch to batch."""
    marks: list[float] = []
    step = Trainee.step

    def timed(self: Any, *args: Any) -> Any:
        out = step(self, *args)
        marks.append(time.perf_counter())
        return out

    with patch.object(Trainee, "step", timed):
        uw.train(config(steps), model=model, data=gpt2_small.tokens(), progress=False)
    ends = marks[-steps:]  # the plan takes steps too
    return [b - a for a, b in pairwise(ends)]


def parts(model: Any, rounds: int) -> tuple[float, float]:
    """Seconds of a batch of harvesting, and of a step, each alone."""
    session = prepare(config(1000), model, gpt2_small.tokens())
    assert isinstance(session, Session)
    batches = ShuffledBatches(session.stream, BATCH, 2 * BATCH)
    batch = next(batches)
    trainee = new_trainee(session.config.saes[0], session.sites[0][0], batch, steps=1000, tokens=1000 * BATCH, seed=0)
    rows = session.sites[0][0].rows(batch)
    times = measure.medians({"harvest": lambda _: next(batches), "step": lambda _: trainee.step(*rows)}, [None], rounds)
    return times["harvest"], times["step"]


def peer(steps: int) -> list[float]:
    """Seconds of each step of SAELens' runner, from batch to batch."""
    from sae_lens.training.sae_trainer import SAETrainer

    marks: list[float] = []
    step = SAETrainer.step

    def timed(self: Any, batch: Any) -> Any:
        out = step(self, batch)
        marks.append(time.perf_counter())
        return out

    with patch.object(SAETrainer, "step", timed):
        gpt2_small.runner(steps * BATCH, D_SAE, K).run()
    return [b - a for a, b in pairwise(marks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="turns of both libraries")
    parser.add_argument("--steps", type=int, default=24, help="unweave's steps in a turn")
    parser.add_argument("--peer-steps", type=int, default=9, help="SAELens' steps in a turn; 0 leaves it out")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/end_to_end.md")
    args = parser.parse_args()
    model = gpt2_small.ours()
    whole, alone, others = [], [], []
    for _ in range(args.rounds):
        alone.append(parts(model, 5))
        whole += trained(model, args.steps)
        if args.peer_steps:
            others += peer(args.peer_steps)
    harvest, step = (statistics.median(times) for times in zip(*alone, strict=True))
    ours = statistics.mean(whole)  # a mean: a pass of the model ends in one step or another
    share = (harvest + step) / ours
    lines = [
        ["unweave, harvesting alone", f"{BATCH / harvest:,.0f}"],
        ["unweave, training alone", f"{BATCH / step:,.0f}"],
        ["both, one after the other", f"{BATCH / (harvest + step):,.0f}"],
        ["**unweave, end to end**", f"**{BATCH / ours:,.0f}**"],
    ]
    found = f"{share:.0%} of what both would reach one after the other."
    if others:
        theirs = statistics.mean(others)
        lines.append(["SAELens' runner, defaults", f"{BATCH / theirs:,.0f}"])
        found += f" {theirs / ours:.1f}× SAELens."
    text = "\n\n".join([
        *measure.machine(["transformers", *(["sae-lens", "transformer-lens"] if others else [])]),
        f"TopK {K}, 768 → {D_SAE:,}, batches of {BATCH}; {args.rounds} turns of {args.steps} steps (SAELens: "
        f"{args.peer_steps}), means over the steps.",
        measure.table(["", "tokens/s"], lines),
        found,
    ])  # fmt: skip
    print(text)
    if args.write:
        measure.write("end_to_end.md", text)
    if share < LEAST_SHARE:
        raise SystemExit(f"end to end reached less than {LEAST_SHARE:.0%} of its parts.")
    if others and statistics.mean(others) < LEAST_GAIN * ours:
        raise SystemExit(f"end to end was less than {LEAST_GAIN:.0f} times as fast as SAELens' runner.")


if __name__ == "__main__":
    main()
