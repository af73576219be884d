"""Files are mapped, not read: of every kind, with the strides and the sharing that they were saved with."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unweave._mapped import is_own, own
from unweave.hub.source import Source


def tensors() -> dict[str, Tensor]:
    both = torch.randn(5, 3000)
    return {
        "rows": torch.randn(3000, 5),
        "columns": torch.randn(5, 3000).T,
        "half": torch.randn(40, 30).half(),
        "vector": torch.randn(7)[2:5],
        "number": torch.tensor(3.5),
        "whole": torch.arange(6).view(2, 3),
        "nothing": torch.zeros(0, 3),
        "tied": both,
        "tied_too": both.T,
    }


def write(folder: Path, name: str, values: dict[str, Tensor]) -> None:
    path = folder / name
    if name.endswith(".safetensors"):
        save_file({n: t.clone(memory_format=torch.contiguous_format) for n, t in values.items()}, path)
    elif name == "compressed.npz":
        np.savez_compressed(path, **{n: t.numpy() for n, t in values.items()})  # type: ignore[arg-type]
    elif name.endswith(".npz"):
        np.savez(path, **{n: t.numpy() for n, t in values.items()})  # type: ignore[arg-type]
    else:
        torch.save(values, path, _use_new_zipfile_serialization=name != "old.pt")


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "a.pt", "compressed.npz", "old.pt"])
def test_values_are_those_that_were_saved(name: str, tmp_path: Path) -> None:
    values = tensors()
    write(tmp_path, name, values)
    found = Source(tmp_path).tensors(name)
    assert found.keys() == values.keys()
    for key, value in values.items():
        assert torch.equal(found[key], value), key
        assert found[key].dtype == value.dtype
        assert torch.equal(own(found[key], value.dtype)[0], value)
        assert torch.equal(found[key], value), f"{key} is gone after it was copied"
    if name in ("a.safetensors", "a.npz", "a.pt"):
        assert not any(is_own(found[key]) for key in ("rows", "vector", "number"))  # they are the file's


def test_reading_takes_no_memory_until_values_are_looked_at(tmp_path: Path) -> None:
    """pitfall_277: of a file of 16 MB nothing becomes resident."""
    torch.save({"W_enc": torch.ones(1 << 11, 1 << 11)}, tmp_path / "a.pt")
    save_file({"W_enc": torch.ones(1 << 11, 1 << 11)}, tmp_path / "a.safetensors")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    for name in ("a.pt", "a.safetensors"):
        source = Source(tmp_path / name)
        before = resident()
        tensors = source.torch(name) if name.endswith(".pt") else source.tensors(name)
        assert tensors["W_enc"].shape == (1 << 11, 1 << 11)
        assert resident() - before < 4 << 20
        assert tensors["W_enc"][-1, -1] == 1


def test_of_matrices_only_the_shapes(tmp_path: Path) -> None:
    write(tmp_path, "a.pt", tensors())
    found = Source(tmp_path, shapes_only=True).tensors("a.pt")
    assert {name for name, tensor in found.items() if tensor.is_meta} == {
        "rows", "columns", "half", "whole", "nothing", "tied", "tied_too",
    }  # fmt: skip
    assert found["columns"].shape == (3000, 5)


def test_a_single_file_hides_its_neighbours(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        write(tmp_path, name, tensors())
    assert Source(tmp_path / "b.pt").find("*.pt", "*.bin") == ["b.pt"]
    assert Source(tmp_path).find("*.pt") == ["a.pt", "b.pt"]
    assert Source(tmp_path / "b.pt").has("a.pt")
