"""Each kernel of a training step against the bound that this machine sets it.

    .venv/bin/python benchmarks/pieces.py --write

A kernel cannot be faster than its bytes over the memory's bandwidth, nor than its multiply-adds over the rate of the
best matrix product, both measured here. Bytes count every operand once, so a kernel whose operands are still in cache
may beat its bound. The second time is that of the same operation by the reference kernels, which are PyTorch's own.
`--write` puts the table into `benchmarks/results/pieces.md`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.functional import pad

import measure
from cases import Case, make_problem
from unweave import kernels
from unweave.kernels import cpu, reference
from unweave.kernels.adam import adam_rows
from unweave.kernels.dispatch import VARIABLE, backend
from unweave.kernels.screen import kind_of


class Piece(NamedTuple):
    """One operation, what it has to move, and what it has to compute."""

    name: str
    run: Callable[[object], object]
    n_bytes: float
    flops: float
    in_bf16: bool = False
    """Whether the multiply-adds are those of a bf16 product."""


@contextmanager
def by_reference() -> Iterator[None]:
    """Run the reference kernels."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "reference"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def pieces(d_in: int, d_sae: int, batch: int, k: int, l0: float) -> list[Piece]:
    """The operations of a step on random weights: `k` latents of each token, `l0` for what thresholds keep."""
    problem = make_problem(Case("relu", d_in, d_sae, batch, k, l0=l0), n_batches=1)
    x, W_dec = problem.batches[0], problem.W
    rows = W_dec.clone()
    W_enc, b_enc = rows.T, torch.zeros(d_sae)
    compiled = backend("pieces", x) == "cpu"
    screen = None
    if compiled:
        screen = kernels.Screen.room_for(rows, "auto")
        cpu.make_images(rows, screen.images)
    low = compiled and kernels.low("auto", "cpu")  # the reference's product is fp32

    largest = kernels.Largest(k)
    selection = kernels.encode_select(x, W_enc, b_enc, largest)
    indices, values = selection.indices, selection.values.relu()
    offsets = pad(selection.counts.cumsum(0), (1, 0))
    nnz, n = len(indices), batch
    winners = kernels.encode_select(x, W_enc, b_enc, kernels.LargestOfBatch(k * batch)).values
    selections: dict[str, kernels.Spec] = {
        f"encode_select, TopK {k}": largest,
        f"encode_select, BatchTopK {k}": kernels.LargestOfBatch(k * batch, hint=0.99 * float(winners.min())),
        f"encode_select, GroupMax {k}": kernels.LargestOfGroups(k),
        f"encode_select, above thresholds (L0 {l0:g})": kernels.Above(-problem.bias),
    }
    weight, gradients, codes = 4.0 * d_sae * d_in, 4.0 * n * d_in, 12.0 * nnz
    product = 2.0 * n * d_in * d_sae
    in_fp32, in_bf16 = (measure.product(x, rows, dtype) for dtype in (torch.float32, torch.bfloat16))
    found = [
        Piece("encoder product, fp32", in_fp32, weight + gradients, product),
        Piece("encoder product, bf16", in_bf16, (weight + gradients) / 2, product, True),
    ]
    for name, spec in selections.items():
        found.append(Piece(
            name, lambda _, spec=spec: kernels.encode_select(x, W_enc, b_enc, spec, screen=screen),  # type: ignore[misc]
            weight + gradients, product, low,
        ))  # fmt: skip

    scales = torch.full((1,), 2.0 / n)
    b_dec = torch.zeros(d_in)
    updated, grad = rows.clone(), torch.randn(d_sae, d_in)
    moments = torch.zeros(d_sae, d_in), torch.zeros(d_sae, d_in)

    def fused(_: object) -> object:
        kernel = cpu.squared_error_rows if backend("pieces", x) == "cpu" else reference.squared_error_rows
        return kernel(indices, values, offsets, scales, W_dec, b_dec, x)

    def scatter(_: object) -> object:
        if backend("pieces", x) != "cpu":
            return kernels.scatter_outer(indices, values, offsets, x, d_sae)
        # As in a step, into the gradient of the step before: fresh memory of this size costs more than the sums.
        return cpu.scatter_outer(cpu.transpose(indices, offsets, d_sae), values, x, out=grad)

    def adam(_: object) -> object:
        return adam_rows(
            updated, grad, None, *moments, lr=1e-9, betas=(0.9, 0.999), eps=1e-8, step=10, unit=True, screen="auto"
        )

    image = {"int8": 0.25, "bf16": 0.5, "fp32": 0}[kind_of("auto", d_in)] if compiled else 0
    found += [
        Piece("gather_sum", lambda _: kernels.gather_sum(indices, values, offsets, W_dec),
              weight + gradients + codes, 2 * nnz * d_in),
        Piece("decode, loss, gradients of output and codes", fused,
              weight + 2 * gradients + codes + 4 * nnz, 4 * nnz * d_in),
        Piece("sddmm", lambda _: kernels.sddmm(indices, offsets, x, W_dec),
              weight + gradients + codes, 2 * nnz * d_in),
        Piece("transpose", lambda _: kernels.transpose(indices, offsets, d_sae), 24.0 * nnz + 8 * d_sae, 0.0),
        Piece("scatter_outer", scatter, weight + gradients + codes, 2 * nnz * d_in),
        Piece("adam_rows, unit rows", adam, (7 + image) * weight, 0.0),
    ]  # fmt: skip
    return found


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="768x12288", metavar="D_INxD_SAE")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--l0", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/pieces.md")
    args = parser.parse_args()
    d_in, d_sae = map(int, args.shape.split("x"))
    found = pieces(d_in, d_sae, args.batch, args.k, args.l0)
    functions = {piece.name: piece.run for piece in found}
    times = measure.medians(functions, [None], args.rounds)
    with by_reference():
        plain = measure.medians({p.name: p.run for p in found[2:]}, [None], max(1, args.rounds // 4))
    bandwidth = measure.memory_bandwidth()
    peaks = {low: measure.matmul_peak(torch.bfloat16 if low else torch.float32) for low in (True, False)}
    for piece in found[:2]:  # a product of this benchmark may beat the square ones
        peaks[piece.in_bf16] = max(peaks[piece.in_bf16], piece.flops / times[piece.name])
    lines = []
    for piece in found:
        moving, computing = piece.n_bytes / bandwidth, piece.flops / peaks[piece.in_bf16]
        bound, t = max(moving, computing), times[piece.name]
        lines.append([
            piece.name, milliseconds(t), milliseconds(plain.get(piece.name)), milliseconds(bound),
            "memory" if moving > computing else f"{'bf16' if piece.in_bf16 else 'fp32'} product", f"{bound / t:.0%}",
        ])  # fmt: skip
    text = "\n\n".join([
        *measure.machine(),
        f"{d_in} → {d_sae}, batch {args.batch}; medians of {args.rounds} rounds, in ms. Best matrix products: "
        f"{peaks[True] / 1e9:.0f} GFLOP/s in bf16, {peaks[False] / 1e9:.0f} in fp32; a large copy moves "
        f"{bandwidth / 1e9:.0f} GB/s (bytes read and written).",
        measure.table(["operation", "ms", "reference, ms", "bound, ms", "set by", "of the bound"], lines),
    ])  # fmt: skip
    print(text)
    if args.write:
        measure.write("pieces.md", text)


if __name__ == "__main__":
    main()
