"""What fine-tuning end to end is worth on the shipped model: the commands and the table of the page on fine-tuning.

    .venv/bin/python benchmarks/finetuning.py        # about two minutes

Learning rates, of which only the first run names one, and seeds are the defaults.
"""

from __future__ import annotations

import os
import tempfile

from unweave.cli import main as unweave

COMMANDS = (
    "train --activation jumprelu --d-sae 512 --target-l0 16 --lr 2e-3 --batch-size 1024 --tokens 200_000 "
    "--eval-tokens 0 --out first",
    "finetune first/sae --what end_to_end --batch-size 1024 --tokens 60_000 --out tuned",
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for command in COMMANDS:
            print(f"unweave {command}", flush=True)
            if unweave(command.split()):
                raise SystemExit(1)


if __name__ == "__main__":
    main()
