"""What `import unweave` costs beyond `import torch`: the median of several fresh processes.

    python benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

RUNS = 7
PROGRAM = """
import time
import torch
start = time.perf_counter()
import unweave
bare = time.perf_counter() - start
unweave.SAE
print(bare, time.perf_counter() - start)
"""


def main() -> None:
    runs = [
        [float(s) for s in subprocess.check_output([sys.executable, "-c", PROGRAM], text=True).split()]
        for _ in range(RUNS)
    ]
    for name, seconds in zip(("import unweave", "import unweave; unweave.SAE"), zip(*runs, strict=True), strict=True):
        print(f"{name:<30} {1000 * statistics.median(seconds):6.1f} ms beyond `import torch` (median of {RUNS})")


if __name__ == "__main__":
    main()
