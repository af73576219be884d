"""What loading an SAE of 2 GB costs, against reading the bytes of its file: time, and peak memory.

    python benchmarks/loading.py [--write] [--formats saelens gemma_scope ...] [--d-in 4096 --d-sae 65536]

The file is in the page cache for both, and both end with its bytes in fresh memory: read by one thread and no more, or
as weights, which were checked and, where the format stores them the other way round, transposed. Each round does both,
in one process; times are medians, memory is the highest resident set beyond that before the call. The files are made
one after another in a temporary folder, of 2 GB at a time. `--write` puts the table into
`benchmarks/results/loading.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import measure
from unweave.sae import SAE

ROUNDS = 5
ABOUT = (
    "float32 weights, the file in the page cache. Its bytes are read by one thread into fresh memory; `SAE.load` uses "
    "all threads."
)


def saelens(folder: Path, d: int, m: int) -> Path:
    config = {
        "architecture": "standard", "d_in": d, "d_sae": m, "dtype": "float32", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "metadata": {"sae_lens_version": "6.54.12"},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(weights((d, m)), folder / "sae_weights.safetensors")
    return folder / "sae_weights.safetensors"


def gemma_scope(folder: Path, d: int, m: int) -> Path:
    made = {name: tensor.numpy() for name, tensor in weights((d, m)).items()}
    np.savez(folder / "params.npz", threshold=np.ones(m, np.float32), **made)  # type: ignore[arg-type]
    return folder / "params.npz"


def sparsify(folder: Path, d: int, m: int) -> Path:
    made = weights((m, d))
    named = {"encoder.weight": made["W_enc"], "encoder.bias": made["b_enc"]}
    save_file(named | {"W_dec": made["W_dec"], "b_dec": made["b_dec"]}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": d, "num_latents": m, "k": 32}))
    return folder / "sae.safetensors"


def dictionary_learning(folder: Path, d: int, m: int) -> Path:
    made = weights((m, d))
    named = {"encoder.weight": made["W_enc"], "encoder.bias": made["b_enc"], "bias": made["b_dec"]}
    torch.save(named | {"decoder.weight": made["W_dec"].view(d, m)}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    return folder / "ae.pt"


def saev(folder: Path, d: int, m: int) -> Path:
    config = {"d_model": d, "d_sae": m, "activation": {"cls": "Relu", "params": {}}}
    with (folder / "sae.pt").open("wb") as file:
        file.write(json.dumps({"schema": 5, "cfg": config, "commit": "", "lib": ""}).encode() + b"\n")
        torch.save(weights((d, m)), file)
    return folder / "sae.pt"


WRITERS: dict[str, Callable[[Path, int, int], Path]] = {
    made.__name__: made for made in (saelens, gemma_scope, sparsify, dictionary_learning, saev)
}


TURNED = {"saelens": "W_enc", "gemma_scope": "W_enc", "sparsify": "", "dictionary_learning": "W_dec", "saev": "W_enc"}
"""Which weight is stored the other way round than in memory."""


def weights(encoder: tuple[int, int]) -> dict[str, Tensor]:
    """Weights of an SAE whose encoder is stored in this shape; their values cost nothing."""
    d, m = sorted(encoder)
    some = torch.randn(1 << 20).repeat(-(-d * m >> 20))[: d * m]
    biases = {"b_enc": torch.zeros(m), "b_dec": torch.zeros(d)}
    return {"W_enc": some.view(encoder), "W_dec": some.view(m, d).clone()} | biases


def read_bytes(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return file.read()


def row(name: str, d: int, m: int, rounds: int) -> list[str]:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        path = WRITERS[name](folder, d, m)
        with path.open("rb") as file:
            os.fsync(file.fileno())  # or it would be written to disk while it is read
        size, times = path.stat().st_size, []
        for _ in range(rounds + 1):  # the first warms up
            times.append((measure.seconds(lambda: read_bytes(path)), measure.seconds(lambda: SAE.load(folder))))
        read, load = (statistics.median(column) for column in zip(*times[1:], strict=True))
        before = measure.resident()
        peak = measure.peak_resident(lambda: SAE.load(folder)) - before
    cells = f"{size / 1e9:.2f} GB", f"{read:.2f} s", f"{load:.2f} s", f"{load / read:.2f}", f"{peak / size:.2f}"
    return [name, TURNED[name], *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=list(WRITERS), choices=WRITERS)
    parser.add_argument("--d-in", type=int, default=4096)
    parser.add_argument("--d-sae", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    measure.check_peak_resident()
    heading = ["format", "transposed", "file", "reading its bytes", "`SAE.load`", "times as long", "peak memory / file"]
    rows = [row(name, args.d_in, args.d_sae, args.rounds) for name in args.formats]
    text = "\n\n".join(
        ["\n".join(measure.machine()), f"{ABOUT} Medians of {args.rounds} rounds.", measure.table(heading, rows)]
    )
    print(text)
    if args.write:
        measure.write("loading.md", text)


if __name__ == "__main__":
    main()
