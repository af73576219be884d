"""Sampling activations of synthetic features: at 16k features against sae-lens, and at a million by itself.

Dense tensors are compared with dense tensors, and `SparseCodes` with sae-lens' COO tensors (`use_sparse_tensors=True`),
on equal parameters. The million has no peer: a dense batch would take 4 GiB, and its random numbers more.

    .venv-oracles/bin/python benchmarks/synthetic_sampling.py --write

`--write` puts the tables into `benchmarks/results/synthetic_sampling.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from torch import Tensor

import measure
from unweave import SparseCodes
from unweave.synthetic.correlation import generate_random_low_rank_correlation_matrix
from unweave.synthetic.generator import ActivationGenerator
from unweave.synthetic.model import SyntheticModel, SyntheticModelConfig
from unweave.synthetic.probabilities import zipfian_firing_probabilities

FEATURES, RANK, SCALE = 16_384, 32, 0.1
MILLION, D_MILLION, L0_MILLION = 1_000_000, 512, 50


def check_equal(ours: SparseCodes, theirs: Tensor, p: Tensor) -> None:
    """Raise unless both fire as often as they should, within 6 standard deviations and 2 % for correlated features."""
    expected = float(len(theirs) * p.sum())
    for found in (len(ours.values), int((theirs > 0).sum())):
        if abs(found - expected) > 6 * expected**0.5 + 0.02 * expected:
            raise RuntimeError(f"{found} features fired, and {expected:.0f} were expected.")


def against_sae_lens(batch: int, rounds: int) -> list[list[str]]:
    """A line for each kind of firing and form of the result: times in ms, and how many times ours theirs takes."""
    from sae_lens.synthetic import ActivationGenerator as Theirs

    p = zipfian_firing_probabilities(FEATURES)
    correlation = generate_random_low_rank_correlation_matrix(FEATURES, RANK, SCALE, seed=0)
    lines = []
    cases: list[tuple[str, float, Any]] = [
        ("independent", 0.0, None),
        ("independent, random magnitudes", 0.2, None),
        (f"copula of rank {RANK}", 0.0, correlation),
    ]
    for name, std, c in cases:
        ours = ActivationGenerator(FEATURES, p, std, correlation_matrix=c, seed=0)
        theirs, sparse = (
            Theirs(FEATURES, p, std, correlation_matrix=c, use_sparse_tensors=coo) for coo in (False, True)
        )
        check_equal(ours.sample_codes(batch), theirs.sample(batch), p)
        contestants: dict[str, Callable[[int], Any]] = {
            "ours, dense": ours.sample,
            "theirs, dense": theirs.sample,
            "ours, sparse": ours.sample_codes,
            "theirs, sparse": sparse.sample,
        }
        t = measure.medians(contestants, [batch], rounds)
        for form in ("dense", "sparse"):
            one, other = t[f"ours, {form}"], t[f"theirs, {form}"]
            lines.append([name, form, f"{1000 * other:.1f}", f"{1000 * one:.1f}", f"{other / one:.1f}×"])
    return lines


def a_million(batch: int, rounds: int) -> list[str]:
    """Seconds of a batch and peak memory of the process."""
    shape = SyntheticModelConfig(MILLION, D_MILLION, seed=0)
    # Zipf's law down to a tenth of the mean rate, scaled so that L0_MILLION features fire.
    p = zipfian_firing_probabilities(MILLION, 0.5, 0.3, 1e-4)
    generator = ActivationGenerator(MILLION, p * (L0_MILLION / p.sum()), 0.2, seed=0)
    seconds: list[float] = []

    def run() -> None:
        model = SyntheticModel(shape, activation_generator=generator)
        contestants: dict[str, Callable[[int], Any]] = {"sample": model.sample_with_codes}
        seconds.append(measure.medians(contestants, [batch], rounds)["sample"])

    made: list[float] = []
    peak = measure.peak_resident(lambda: made.append(measure.seconds(run)))
    l0 = float(generator.sample_codes(batch).l0().mean())
    return [f"{l0:.1f}", f"{seconds[0]:.3f} s", f"{peak / 2**30:.2f} GiB"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024, help="rows of a batch")
    parser.add_argument("--rounds", type=int, default=15, help="measured batches of each contestant")
    parser.add_argument("--skip-million", action="store_true", help="leave out the million features (2 GiB)")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/synthetic_sampling.md")
    args = parser.parse_args()
    parts = [
        *measure.machine(["sae-lens"]),
        f"{FEATURES} features at Zipf's rates from 0.3 to 0.01, batches of {args.batch}; medians of {args.rounds} "
        "interleaved batches, in ms. Sparse: SparseCodes here, a COO tensor there.",
        measure.table(
            ["firing", "form", "sae-lens", "unweave", "sae-lens takes"], against_sae_lens(args.batch, args.rounds)
        ),
    ]
    if not args.skip_million:
        parts += [
            f"{MILLION} features in {D_MILLION} dimensions, batches of {args.batch} with their hidden activations "
            f"`codes @ V + bias`; median of {args.rounds}, and the highest resident memory of the whole process.",
            measure.table(["L0", "a batch", "peak memory"], [a_million(args.batch, args.rounds)]),
        ]
    text = "\n\n".join(parts)
    print(text)
    if args.write:
        measure.write("synthetic_sampling.md", text)


if __name__ == "__main__":
    main()
