"""Encoding with a finished SAE: unweave's `encode_sparse` beside sae-lens' `encode`, the same weights and batches.

    .venv-oracles/bin/python benchmarks/encode.py --write

sae-lens reads the SAE from the folder that unweave saved, and both must give the same codes: latents that only one of
them finds active must be near-ties. `--write` puts the table into `benchmarks/results/encode.md`.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import measure
from cases import Case, Problem, make_problem
from unweave import SAE, BatchTopK, TopK


def our_sae(problem: Problem) -> SAE:
    """A finished SAE with the problem's weights; a BatchTopK one has a threshold that `k` latents pass on average."""
    case = problem.case
    sae = SAE(case.d_in, case.d_sae, TopK(case.k) if case.kind == "topk" else BatchTopK(case.k))
    with torch.no_grad():
        sae.W_enc.copy_(problem.encoder.T)
        sae.W_dec.copy_(problem.W)
        if sae.threshold is not None:
            pre = (problem.batches[0][:512] @ sae.W_enc).flatten()
            sae.threshold.copy_(pre.topk(case.k * 512).values[-1])
    return sae


def in_sae_lens(sae: SAE) -> Any:
    """The SAE as sae-lens loads it."""
    from sae_lens import SAE as TheirSAE

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TheirSAE.load_from_disk(sae.save(f"{folder}/sae"))


def check_equal(ours: Tensor, theirs: Tensor) -> None:
    """Raise unless two dense codes are the same but for rounding."""
    differ = (ours != 0) != (theirs != 0)
    share = float(differ.sum() / (theirs != 0).sum())
    torch.testing.assert_close(ours[~differ], theirs[~differ], atol=1e-4, rtol=1e-4)
    if share > 1e-3:
        raise RuntimeError(f"{share:.2%} of the active latents differ from sae-lens'.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["768x12288", "768x24576", "384x6144"], metavar="D_INxD_SAE")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/encode.md")
    args = parser.parse_args()
    lines = []
    for kind in ("topk", "batchtopk"):
        for shape in args.shapes:
            d_in, d_sae = map(int, shape.split("x"))
            problem = make_problem(Case(kind, d_in, d_sae, args.batch, args.k))
            sae = our_sae(problem)
            theirs = in_sae_lens(sae)
            contestants: dict[str, Callable[[Tensor], Any]] = {
                "ours": sae.encode_sparse,
                "theirs": theirs.encode,
                "product": measure.product(problem.batches[0], problem.W, torch.bfloat16),
            }
            with torch.no_grad():
                rows = problem.batches[0][:256]
                check_equal(sae.encode_sparse(rows).to_dense(), theirs.encode(rows))
                t = measure.medians(contestants, problem.batches, args.rounds)
            lines.append([
                kind, problem.case.shape, *(f"{1000 * t[name]:.1f}" for name in ("theirs", "ours", "product")),
                f"{t['theirs'] / t['ours']:.1f}×",
            ])  # fmt: skip
    text = "\n\n".join([
        *measure.machine(["sae-lens"]),
        f"Encoding {args.batch} tokens, k {args.k}; medians of {args.rounds} interleaved calls without gradients, in "
        "ms. unweave returns codes, sae-lens a dense tensor. A finished BatchTopK SAE compares with a threshold.",
        measure.table(["SAE", "shape", "sae-lens", "unweave", "bf16 encoder product", "sae-lens takes"], lines),
    ])  # fmt: skip
    print(text)
    if args.write:
        measure.write("encode.md", text)


if __name__ == "__main__":
    main()
