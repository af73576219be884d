"""Tensors of a file are copied out of it once, and a file that is not what it was is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from unweave import UnweaveError, _mapped
from unweave._mapped import fill, is_own, map_tensors, own
from unweave.kernels import copy_checked, dispatch

BACKENDS = pytest.mark.parametrize("backend", ["", "reference"])


@BACKENDS
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64])
@pytest.mark.parametrize("shape", [(250, 2000), (7, 11), (40, 3, 5), (9,), (), (0, 3)])
def test_tensors_are_copied_out_of_their_file(
    shape: tuple[int, ...], stored: torch.dtype, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    tensor = (torch.randn(shape) * 5).to(stored)
    save_file({"other": torch.zeros(3), "W": tensor}, tmp_path / "a.safetensors")
    found = map_tensors(tmp_path / "a.safetensors")["W"]
    backwards = tuple(reversed(range(tensor.ndim)))
    for view, expected in ((found, tensor), (found.permute(backwards), tensor.permute(backwards))):
        made, finite = own(view, torch.float32)
        assert finite
        assert is_own(made)
        assert torch.equal(made, expected.float())
    assert torch.equal(found.float(), tensor.float()), "the file's values are gone after they were copied"
    assert tensor.numel() == 0 or not is_own(found)


@BACKENDS
@pytest.mark.parametrize("turned", [False, True])
def test_one_value_of_a_file_that_is_not_finite_is_found(
    turned: bool, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    tensor = torch.randn(300, 500)
    tensor[299, 498] = float("inf")
    save_file({"W": tensor}, tmp_path / "a.safetensors")
    found = map_tensors(tmp_path / "a.safetensors")["W"]
    assert not own(found.T if turned else found, torch.float32)[1]
    assert own(found[:299].T if turned else found[:299], torch.float32)[1]


@BACKENDS
@pytest.mark.parametrize("change", ["cut off", "written to"])
def test_a_file_that_was_changed_since_is_refused(
    change: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pitfall: the pages of a file that was cut off end the process that looks at them."""
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    path = tmp_path / "a.safetensors"
    save_file({"W": torch.randn(300, 500), "b": torch.zeros(3), "D": torch.randn(9, 30, 50)}, path)
    mapped = map_tensors(path)
    assert own(mapped["W"].T, torch.float32)[1]
    if change == "cut off":
        os.truncate(path, 1000)
    else:
        with path.open("r+b") as file:
            file.seek(5000)
            file.write(b"xyz")
        os.utime(path, (1, 1))  # clocks of file systems may stand still for some milliseconds
    for tensor in (mapped["W"], mapped["W"].T, mapped["b"], mapped["D"], mapped["D"].permute(2, 0, 1)):
        with pytest.raises(UnweaveError, match=r"a\.safetensors' was changed while it was read"):
            own(tensor, torch.float32)
        with pytest.raises(UnweaveError, match="was changed"):
            fill(torch.empty(tensor.shape), tensor, 2.0)


def test_a_file_that_is_changed_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"W": torch.randn(30, 50)}, path)
    found = map_tensors(path)["W"]

    def changed_before_the_end(*arguments: Any, **named: Any) -> bool:
        finite = copy_checked(*arguments, **named)
        os.utime(path, (1, 1))
        return finite

    monkeypatch.setattr(_mapped, "copy_checked", changed_before_the_end)
    with pytest.raises(UnweaveError, match="was changed while it was read"):
        own(found, torch.float32)


@pytest.mark.parametrize("replace", [os.replace, None])
def test_a_file_that_was_replaced_or_deleted_is_read_as_it_was(replace: object, tmp_path: Path) -> None:
    path, tensor = tmp_path / "a.safetensors", torch.randn(300, 500)
    save_file({"W": tensor}, path)
    found = map_tensors(path)["W"]
    if replace is None:
        path.unlink()
    else:
        save_file({"W": torch.zeros(2)}, tmp_path / "b.safetensors")
        os.replace(tmp_path / "b.safetensors", path)
    assert torch.equal(own(found.T, torch.float32)[0], tensor.T)


def test_shapes_are_copied_as_shapes() -> None:
    made, finite = own(torch.empty(30, 40, device="meta").T, torch.bfloat16)
    assert finite
    assert made.is_meta
    assert made.shape == (40, 30)


def test_what_is_its_own_needs_no_copy() -> None:
    made = torch.randn(4, 6)
    assert is_own(made)
    assert not is_own(made.T)
    assert not is_own(made[1:])
