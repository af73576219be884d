"""Peak memory of training runs beside what their plans say, for shuffling rings from 64 MB to 4 GB.

    .venv/bin/python benchmarks/memory.py --write      # about two minutes

Each run has a process of its own, warmed up by a tiny run. Planned is `Plan.memory` less the model, which is there
before; measured is how much the process' resident memory grows at its peak, from before planning to after saving. The
model is an embedding of random weights, so that even 4 GB fill in seconds. The largest ratio has to stay below 1.2.
`--write` puts the table into `benchmarks/results/memory.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gpt2_small
import measure
import unweave as uw
from unweave.models import LoadedModel
from unweave.training.buffers import size

WIDTH, CONTEXT, VOCABULARY, BATCH = 1024, 128, 1000, 4096
LIMIT = 1.2


class Embedding(torch.nn.Module):
    """A model that gives activations as fast as memory takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.out = torch.nn.Identity()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(ids))


def run(ring: int, d_sae: int, out: str | None) -> tuple[Any, Any, Any]:
    """A config with a ring of so many bytes, the model, and the data."""
    torch.manual_seed(0)
    model = LoadedModel(Embedding().eval().requires_grad_(False), gpt2_small.tokenizer(), "embedding")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2000, CONTEXT))
    config = uw.TrainConfig(
        model="embedding",
        hooks=("out",),
        saes=(uw.SAEConfig(d_sae=d_sae),),
        tokens=4 * BATCH,
        batch_size=BATCH,
        buffer=ring // (4 * WIDTH),
        text=uw.DataConfig(context=CONTEXT, held_out=0.0, bos=False),
        masks=uw.MaskConfig(special_tokens=False),
        model_precision="fp32",
        device="cpu",
        out=out,
    )
    return config, model, ids


def one(ring: int, d_sae: int) -> dict[str, int]:
    """Planned and measured bytes of a run in this process, which must be a fresh one."""
    config, model, ids = run(4 * WIDTH * BATCH, 256, None)
    uw.train(config, model=model, data=ids, progress=False)
    measure.check_peak_resident()
    with tempfile.TemporaryDirectory() as folder:
        config, model, ids = run(ring, d_sae, str(Path(folder) / "run"))
        before = measure.resident()
        peak = measure.peak_resident(lambda: uw.train(config, model=model, data=ids, progress=False))
    plan = uw.plan(config, model=model, data=ids, seconds=0)
    return {"planned": sum(plan.memory.values()) - plan.buffer("model"), "measured": peak - before}


def in_fresh_process(ring: int, d_sae: int) -> dict[str, int]:
    out = subprocess.run(
        [sys.executable, __file__, "--one", str(ring), str(d_sae)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    result: dict[str, int] = json.loads(out.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rings", type=int, nargs="+", default=[64, 256, 1024, 4096], metavar="MB")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 16_384], metavar="D_SAE")
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/memory.md")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*args.one)))
        return
    lines, worst = [], 0.0
    for megabytes in args.rings:
        for d_sae in args.widths:
            got = in_fresh_process(megabytes * 1_000_000, d_sae)
            ratio = got["measured"] / got["planned"]
            worst = max(worst, ratio)
            lines.append([
                f"{megabytes:,} MB", f"{d_sae:,}", size(got["planned"]), size(got["measured"]), f"{ratio:.2f}",
            ])  # fmt: skip
            print(lines[-1], file=sys.stderr, flush=True)
    text = "\n\n".join([
        *measure.machine(),
        f"TopK SAEs on activations of width {WIDTH}, batches of {BATCH}.",
        measure.table(["ring", "latents", "planned", "peak", "peak / planned"], lines),
    ])  # fmt: skip
    print(text)
    if args.write:
        measure.write("memory.md", text)
    if worst > LIMIT:
        raise SystemExit(f"a run took more than {LIMIT} times what was planned.")


if __name__ == "__main__":
    main()
