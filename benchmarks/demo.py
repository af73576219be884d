"""What `unweave demo` takes and gives: wall time, peak memory, and the numbers of its table.

    .venv/bin/python benchmarks/demo.py
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "demo", time.perf_counter()
        subprocess.run([sys.executable, "-m", "unweave", "demo", "--out", str(out)], check=True)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        report = json.loads((out / "eval.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        page = (out / "features.html").stat().st_size / 1e6
    metrics = {name: value for group in report["eval_result_metrics"].values() for name, value in group.items()}
    training = rows[-1]["tokens"] / rows[-1]["tokens_per_second"]
    print("\n| demo | |\n|---|---|")
    for name, value in (
        ("whole command", f"{seconds:.0f} s"),
        ("of which training", f"{training:.0f} s for {rows[-1]['tokens']:,} tokens"),
        ("peak memory", f"{peak:.2f} GB"),
        ("L0, held out", f"{metrics['l0']:.1f}"),
        ("explained variance", f"{metrics['explained_variance']:.3f}"),
        ("loss recovered", f"{metrics['ce_loss_score']:.3f}"),
        ("cross-entropy: model, with the SAE, ablated", " / ".join(
            f"{metrics[f'ce_loss_{kind}']:.2f}" for kind in ("without_sae", "with_sae", "with_ablation"))),
        ("dead in training", f"{rows[-1]['dead']:.1%}"),
        ("latents alive in the sample", f"{metrics['frac_alive']:.1%}"),
        ("features.html", f"{page:.2f} MB"),
    ):
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
