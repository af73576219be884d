"""Files are mapped, not read: of every kind, with the strides and the sharing that they were saved with."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from unweave import _mapped
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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("turned", [False, True])
def test_one_value_that_is_not_finite_is_found(bad: float, turned: bool) -> None:
    """pitfall: the sum of finite values may overflow, which is no mistake of theirs."""
    large = torch.full((1000, 300), 1e38)
    made, finite = own(large.T if turned else large, torch.float32)
    assert finite
    assert made.is_contiguous()
    large[999, 298] = bad
    assert not own(large.T if turned else large, torch.float32)[1]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("turned", [False, True])
def test_several_threads_fill_an_ordinary_tensor(
    mode: Callable[[], AbstractContextManager[None]], turned: bool
) -> None:
    """pitfall: the mode in which PyTorch runs is a thread's own."""
    matrix = torch.randn(1100, 4100, requires_grad=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with mode():
            made, finite = own(matrix.T if turned else matrix, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert finite
    assert made.is_leaf
    assert not made.requires_grad
    assert torch.equal(made, matrix.T if turned else matrix)


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), DTYPES, DTYPES, st.booleans(), st.booleans(), st.data())
def test_a_copy_is_equal_whatever_the_shape(
    n: int, m: int, stored: torch.dtype, wanted: torch.dtype, turned: bool, part: bool, data: st.DataObject
) -> None:
    """pitfall: blocks at the edges are smaller, and the only value that is not finite may be in any of them."""
    matrix = torch.randn(n, m).to(stored)
    matrix = matrix[: n // 2, m // 3 :] if part else matrix
    tensor = matrix.T if turned else matrix
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_mapped, "_BLOCK", (2, 3))
        patch.setattr(_mapped, "_PIECE", 4)
        made, finite = own(tensor, wanted)
        assert finite
        assert is_own(made)
        torch.testing.assert_close(made, tensor.to(wanted), rtol=0, atol=0)
        if tensor.numel():
            row, column = (data.draw(st.integers(0, length - 1)) for length in tensor.shape)
            tensor[row, column] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
            assert not own(tensor, wanted)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(250, 2000), (1, 5000), (119, 1921), (241, 1920)])
def test_matrices_larger_than_a_block_are_transposed_out_of_a_file(
    shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    matrix = torch.randn(shape).to(dtype)
    save_file({"W": matrix}, tmp_path / "a.safetensors")
    found = _mapped.map_tensors(tmp_path / "a.safetensors")["W"]
    made, finite = own(found.T, torch.float32)
    assert finite
    assert torch.equal(made, matrix.T.float())
    assert torch.equal(found, matrix), "the file's values are gone after they were copied"


def test_what_is_its_own_needs_no_copy() -> None:
    made = torch.randn(4, 6)
    assert is_own(made)
    assert not is_own(made.T)
    assert not is_own(made[1:])


def test_a_single_file_hides_its_neighbours(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        write(tmp_path, name, tensors())
    assert Source(tmp_path / "b.pt").find("*.pt", "*.bin") == ["b.pt"]
    assert Source(tmp_path).find("*.pt") == ["a.pt", "b.pt"]
    assert Source(tmp_path / "b.pt").has("a.pt")
