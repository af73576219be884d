"""One training step of unweave and of sae-lens in turn, on the same batch, in one process.

    .venv-oracles/bin/python benchmarks/training_step.py

Prints the median of interleaved steps, the encoder product by itself, and the ratio. sae-lens runs at its defaults:
fp32, no autocast. The environment of `make oracles` has both libraries.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from unweave import BatchTopK, SAEConfig, TopK
from unweave.training.trainee import Trainee


def sae_lens_step(kind: str, d_in: int, d_sae: int, k: int, batch: int) -> Callable[[torch.Tensor], Any]:
    """A step of sae-lens' own trainer."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    make, config = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    }[kind]
    sae = make(config(d_in=d_in, d_sae=d_sae, k=k))
    trainer = SAETrainer(
        cfg=SAETrainerConfig(total_training_samples=batch * 1000, train_batch_size_samples=batch, lr_end=3e-4),
        sae=sae,
        data_provider=iter(()),
    )
    return lambda x: trainer._train_step(sae=sae, sae_in=x)


def our_step(kind: str, d_in: int, d_sae: int, k: int, batch: int) -> Callable[[torch.Tensor], Any]:
    """A step of unweave's trainer."""
    config = SAEConfig(d_sae=d_sae, activation=TopK(k) if kind == "topk" else BatchTopK(k))
    trainee = Trainee(config, torch.randn(batch, d_in), steps=1000, tokens=batch * 1000, seed=0)
    return trainee.step


def seconds(step: Callable[[torch.Tensor], Any], x: torch.Tensor) -> float:
    started = time.perf_counter()
    step(x)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    machine = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(f"torch {torch.__version__}, {machine}, fp32")
    print(f"batch {args.batch}, k {args.k}, medians of {args.rounds} interleaved steps, in ms\n")
    print("| step | sae-lens | unweave | of which encoder product | ratio |")
    print("|---|---|---|---|---|")
    for kind, d_in, d_sae in (("topk", 224, 4096), ("topk", 768, 12_288), ("batchtopk", 768, 12_288)):
        x = torch.randn(args.batch, d_in) @ torch.randn(d_in, d_in) / d_in**0.5
        W = torch.randn(d_sae, d_in).T
        shape = (kind, d_in, d_sae, args.k, args.batch)
        contestants: dict[str, Callable[[torch.Tensor], Any]] = {
            "theirs": sae_lens_step(*shape),
            "ours": our_step(*shape),
            "product": partial(torch.matmul, other=W),
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for step in contestants.values():
            step(x)  # warm up
        for _ in range(args.rounds):
            for name, step in contestants.items():
                times[name].append(seconds(step, x))
        ms = {name: 1000 * statistics.median(values) for name, values in times.items()}
        print(
            f"| {kind}, {d_in} → {d_sae} | {ms['theirs']:.0f} | {ms['ours']:.0f} | {ms['product']:.0f} "
            f"| {ms['theirs'] / ms['ours']:.1f}× |",
            flush=True,
        )


if __name__ == "__main__":
    main()
