from __future__ import annotations

import subprocess
import sys

import unweave.activations


def test_nothing_heavy_is_imported() -> None:
    script = "import sys, unweave.activations; print(*{'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_exported_name_exists() -> None:
    assert all(hasattr(unweave.activations, name) for name in unweave.activations.__all__)
