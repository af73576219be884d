"""Does the fast way to train end in an equally good SAE? The demo's run, trained fast and trained by the reference.

    .venv/bin/python benchmarks/quality.py --write

Each seed is trained twice on the model that ships: `precision="auto"` with the compiled kernels, and
`precision="fp32"` with the reference kernels. Explained variance and loss recovered on held-out text must be within
0.5 % of each other, or the exit status is 1. `--write` puts the table into `benchmarks/results/quality.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import measure
from unweave import BatchTopK, JumpReLU, SAEConfig, TopK, evaluate, train
from unweave.cli.demo import demo_config
from unweave.kernels.dispatch import VARIABLE
from unweave.sae import Activation

METRICS = ("explained_variance", "ce_loss_score")
TOLERANCE = 0.005


@contextmanager
def kernels(name: str | None) -> Iterator[None]:
    """Run with these kernels, or with the ones that unweave chooses."""
    before = os.environ.pop(VARIABLE, None)
    if name is not None:
        os.environ[VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def quality(sae: SAEConfig, precision: Literal["auto", "fp32"], tokens: int, seed: int) -> list[float]:
    """The metrics of a trained SAE on held-out text."""
    config = demo_config(None, tokens, seed)
    config = dataclasses.replace(config, saes=(dataclasses.replace(sae, precision=precision),))
    with kernels("reference" if precision == "fp32" else None):
        result = train(config)
    with kernels("reference"):
        report = evaluate(
            result.saes[0], model=result.model, data=config.data, tokens=100_000,
            data_config=config.text, masks=config.masks, seed=seed,
        )  # fmt: skip
    values = [report[name] for name in METRICS]
    assert all(value is not None for value in values)
    return [float(value) for value in values if value is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_600_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--activation", choices=["batchtopk", "topk", "jumprelu"], default="batchtopk")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/quality.md")
    args = parser.parse_args()
    activations: dict[str, Activation] = {"batchtopk": BatchTopK(30), "topk": TopK(30), "jumprelu": JumpReLU()}
    sae = dataclasses.replace(demo_config(None, args.tokens, 0).saes[0], activation=activations[args.activation])
    lines, worst = [], 0.0
    for seed in range(args.seeds):
        reference, fast = (quality(sae, p, args.tokens, seed) for p in ("fp32", "auto"))
        differences = [b / a - 1 for a, b in zip(reference, fast, strict=True)]
        worst = max(worst, *map(abs, differences))
        columns = zip(reference, fast, differences, strict=True)
        lines.append([str(seed), *(s for a, b, d in columns for s in (f"{a:.4f}", f"{b:.4f}", f"{d:+.2%}"))])
    text = "\n\n".join([
        *measure.machine(),
        f"{sae}, {args.tokens:,} tokens of the demo's run, evaluated on 100,000 held-out tokens. *reference*: fp32, "
        'reference kernels; *fast*: `precision="auto"`, compiled kernels.',
        measure.table(
            ["seed", "explained variance, reference", "fast", "difference", "loss recovered, reference", "fast",
             "difference"],
            lines,
        ),
        f"Largest difference {worst:.2%}, allowed {TOLERANCE:.1%}.",
    ])  # fmt: skip
    print(text)
    if args.write:
        measure.write("quality.md", text)
    if worst > TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    main()
