"""What is said of shards on a disk."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from unweave.activations.cache.shards import size_below


def test_the_size_is_taken_while_other_processes_rename_theirs(tmp_path: Path) -> None:
    (tmp_path / "train_00000").mkdir()
    (tmp_path / "train_00000" / "a.npy").write_bytes(b"123")
    names, stop = [tmp_path / ".train_00001.1.tmp", tmp_path / "train_00001"], threading.Event()
    names[0].mkdir()
    for i in range(20):
        (names[0] / f"{i}.npy").write_bytes(b"12345")

    def rename() -> None:
        while not stop.is_set():
            os.replace(names[0], names[1])
            os.replace(names[1], names[0])

    thread = threading.Thread(target=rename)
    thread.start()
    try:
        sizes = {size_below(tmp_path) for _ in range(300)}
    finally:
        stop.set()
        thread.join()
    assert min(sizes) >= 3
    assert size_below(tmp_path) == 103
