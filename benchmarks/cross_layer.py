"""A cross-layer transcoder beside four transcoders of the same size, on the model that ships.

    .venv/bin/python benchmarks/cross_layer.py --write      # some minutes

Every layer has 256 latents, TopK 8 and 200,000 tokens of the standard library's sources; scored on 20,000 held-out
ones. Each seed trains both. `--write` puts the table into `benchmarks/results/cross_layer.md`.
"""

from __future__ import annotations

import argparse
import statistics

import measure
import unweave as uw
from unweave.sae import by_target

LAYERS, TOKENS, EVAL_TOKENS, D_SAE, K = 4, 200_000, 20_000, 256, 8
METRIC = "reconstruction/explained_variance"
INPUTS = tuple(f"h.{i}.mlp:in" for i in range(LAYERS))
OUTPUTS = tuple(f"h.{i}.mlp" for i in range(LAYERS))


def explained(hooks: tuple[str, ...], targets: tuple[str, ...], coder: str, seed: int) -> list[float]:
    """Held-out explained variance at each target."""
    config = uw.TrainConfig(
        model="demo",
        hooks=hooks,
        targets=targets,
        saes=[uw.SAEConfig(d_sae=D_SAE, activation=uw.TopK(K), coder=coder)],  # type: ignore[arg-type]
        tokens=TOKENS,
        seed=seed,
    )
    result = uw.train(config, progress=False)
    parts = [part for sae in result.saes for part in (by_target(sae).values() if coder == "clt" else [sae])]
    return [
        uw.evaluate(part, model=result.model, data="stdlib", tokens=EVAL_TOKENS).metrics[METRIC] or 0.0
        for part in parts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/cross_layer.md")
    args = parser.parse_args()
    whole, single = [], []
    for seed in range(args.seeds):
        whole.append(explained(INPUTS, OUTPUTS, "clt", seed))
        single.append([
            explained((source,), (target,), "transcoder", seed)[0]
            for source, target in zip(INPUTS, OUTPUTS, strict=True)
        ])  # fmt: skip
    rows = [
        [name, *(f"{statistics.mean(values):.2f}" for values in zip(*runs, strict=True))]
        for name, runs in (("cross-layer transcoder", whole), ("a transcoder for each layer", single))
    ]
    spread = max(statistics.stdev(values) for runs in (whole, single) for values in zip(*runs, strict=True))
    text = "\n\n".join([
        *measure.machine([]),
        f"{D_SAE} latents a layer, TopK {K}, {TOKENS:,} tokens; means of {args.seeds} seeds, whose standard deviation "
        f"is {spread:.3f} at most.",
        measure.table(["explained variance", *OUTPUTS], rows),
    ])  # fmt: skip
    print(text)
    if args.write:
        measure.write("cross_layer.md", text)


if __name__ == "__main__":
    main()
