"""Which kernels run where, and what UNWEAVE_KERNELS makes of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from unweave._errors import UnweaveError
from unweave.kernels import cpu, dispatch, gather_sum
from unweave.kernels.dispatch import VARIABLE, backend

CPU, META, HALF = torch.ones(2), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.bfloat16)
INDEX = torch.zeros(2, dtype=torch.int64)


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled kernels and Triton are there unless a test says otherwise, and nothing is chosen."""
    monkeypatch.setattr(cpu, "available", lambda: True)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize("value", [None, ""])
def test_by_itself_the_tensors_choose(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    assert backend("f", CPU, INDEX) == "cpu"
    assert backend("f", META) == "reference"
    assert backend("f", HALF) == backend("f", CPU, CPU.double()) == "reference"


def test_without_compiled_kernels_the_reference_runs(monkeypatch):
    """pitfall_18 of what users ask for: each kernel has a plain fallback."""
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert backend("f", CPU) == "reference"


def test_the_reference_can_be_asked_for(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert backend("f", CPU) == backend("f", META) == "reference"


def test_the_compiled_kernels_can_be_asked_for(monkeypatch):
    """pitfall_252: and then they run, or it is an error."""
    monkeypatch.setenv(VARIABLE, "cpu")
    assert backend("f", CPU) == "cpu"
    assert backend("f", HALF) == "reference"  # there is no compiled kernel for it
    with pytest.raises(UnweaveError, match=r"^f: UNWEAVE_KERNELS=cpu, but the tensors are on meta\.$"):
        backend("f", META)


def test_cuda_asked_for_and_the_tensors_are_elsewhere(monkeypatch):
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(UnweaveError, match=r"^f: UNWEAVE_KERNELS=cuda, but the tensors are on cpu\.$"):
        backend("f", CPU)
    with pytest.raises(UnweaveError, match=r"^gather_sum: UNWEAVE_KERNELS=cuda, but the tensors are on cpu\.$"):
        gather_sum(INDEX, CPU, torch.tensor([0, 2]), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("value", "attribute", "message"),
    [
        ("cpu", (cpu, "available"), r"^UNWEAVE_KERNELS=cpu, but the compiled kernels are not installed\.$"),
        ("cuda", (dispatch, "_has_triton"), r"^UNWEAVE_KERNELS=cuda, but Triton is not installed\.$"),
    ],
)
def test_asked_for_and_not_installed(monkeypatch, value, attribute, message):
    monkeypatch.setenv(VARIABLE, value)
    monkeypatch.setattr(*attribute, lambda: False)
    with pytest.raises(UnweaveError, match=message):
        backend("f", CPU)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("referense", "did you mean 'reference'?"),
        ("CPU", "did you mean 'cpu' or 'cuda'?"),
        ("cdua", "did you mean 'cuda' or 'cpu'?"),
        ("triton", "there are reference, cpu, cuda."),
    ],
)
def test_a_misspelt_name_is_refused(monkeypatch, value, hint):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UnweaveError) as raised:
        backend("f", CPU)
    assert str(raised.value) == f"UNWEAVE_KERNELS={value!r} names no kernels; {hint}"


def test_tensors_on_different_devices():
    with pytest.raises(UnweaveError, match=r"^f: the tensors are on different devices \(cpu, meta\)\.$"):
        backend("f", CPU, META, INDEX)


PROGRAM = """
import torch
from unweave.kernels import gather_sum, library
i, o, w = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]), torch.full((1, 2), 3.0)
print(gather_sum(i, torch.ones(1), o, w).tolist(), library.load.cache_info().currsize)
"""


def test_with_the_reference_the_library_is_not_even_looked_for(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "[[3.0, 3.0]] 0\n"
