"""Safetensors files, written without a copy and byte for byte as the safetensors package writes them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unweave._errors import UnweaveError
from unweave._files import remove_leftovers, write_tensors
from unweave._mapped import DTYPES, blocks, map_tensors


def random_of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    x = torch.randn(shape) * 3
    return x > 0 if dtype == torch.bool else x.to(dtype)


def test_files_are_those_of_the_safetensors_package(tmp_path: Path) -> None:
    """All types, no dimension, no element, names that JSON has to escape; in any order."""
    tensors = {}
    for i, dtype in enumerate(reversed(DTYPES.values())):
        tensors |= {
            f'z/{i}é"\n': random_of(dtype, 3, 5), f"b{i}": random_of(dtype), f"a{i}": random_of(dtype, 2, 0),
        }  # fmt: skip
    for some in (tensors, {}):
        save_file(some, tmp_path / "theirs")
        write_tensors(tmp_path / "ours", some)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


VIEWS = {
    "transposed": torch.randn(700, 1100).T,
    "in bf16": torch.randn(1500, 1100).bfloat16().T,
    "columns": torch.randn(900, 2000)[:, 3:1203],
    "every other row": torch.randn(50, 3)[::2],
    "three axes": torch.randn(40, 50, 600).permute(2, 0, 1),
    "expanded": torch.randn(1).expand(1000),
    "with a gradient": torch.randn(4, 5, requires_grad=True),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_written_as_their_copies_are(tmp_path: Path, name: str) -> None:
    tensor = VIEWS[name]
    save_file({"x": tensor.detach().contiguous()}, tmp_path / "theirs")
    write_tensors(tmp_path / "ours", {"x": tensor})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_large_views_go_block_by_block_and_what_lies_in_order_is_not_copied() -> None:
    x = torch.randn(1024, 4096)
    assert len([*blocks(x.T)]) > 4
    assert b"".join(blocks(x.T)) == x.T.contiguous().numpy().tobytes()
    (whole,) = blocks(x)
    x[0, 0] = 5.0
    assert bytes(whole[:4]) == torch.tensor(5.0).numpy().tobytes()


def test_tensors_that_share_memory_are_written_each_by_itself(tmp_path: Path) -> None:
    x = torch.randn(30, 20)
    write_tensors(tmp_path / "x", {"x": x, "same": x, "transposed": x.T, "part": x[3:7]})
    read = load_file(tmp_path / "x")
    assert torch.equal(read["same"], x)
    assert torch.equal(read["transposed"], x.T)
    assert torch.equal(read["part"], x[3:7])
    assert all(torch.equal(tensor, read[name]) for name, tensor in map_tensors(tmp_path / "x").items())


def test_types_that_no_file_holds_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match=r"x is of type torch\.complex64"):
        write_tensors(tmp_path / "x", {"x": torch.zeros(3, dtype=torch.complex64)})
    assert not any(tmp_path.iterdir())


FULL = """
import resource, signal, torch
from pathlib import Path
from unweave._errors import UnweaveError
from unweave._files import atomic_path, write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with atomic_path("x") as path:
        write_tensors(path, {"x": torch.zeros(1 << 20)})
except UnweaveError as error:
    assert "could not be written" in str(error), error
    print("refused", *Path().iterdir())
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit can be set")
def test_pitfall_186_no_space_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, "-c", FULL], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert out.stdout == "refused\n", out.stderr


def test_writing_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """In what Python allocates; of PyTorch's, `blocks` gives views."""
    x = torch.zeros(8 << 20)
    tracemalloc.start()
    write_tensors(tmp_path / "x", {"x": x})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="says so of no process that nobody waited for")
def test_a_process_that_ended_is_dead_before_it_was_waited_for(tmp_path: Path) -> None:
    """So that what it left is removed by those that were started with it."""
    left, kept = tmp_path / ".a.{}.tmp", tmp_path / ".b.{}.tmp"
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as ended, subprocess.Popen(["sleep", "60"]) as lives:
        paths = [Path(str(path).format(process.pid)) for path, process in ((left, ended), (kept, lives))]
        for path in paths:
            path.mkdir()
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        remove_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == paths[1:]
        lives.kill()
