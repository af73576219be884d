"""Which kernels run: chosen in one place, from where the tensors are and what they hold."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from unweave._errors import UnweaveError, nearest
from unweave.kernels import cpu

Backend = Literal["reference", "cpu", "cuda"]
VARIABLE = "UNWEAVE_KERNELS"
WIDEST_ON_GPU = 1 << 15
"""Elements of a matrix' rows where one program of a GPU's kernels takes a row whole."""


def forced() -> Backend | None:
    """The back-end that the environment variable UNWEAVE_KERNELS names, if it is set.

    Raises:
        UnweaveError: If there is no such back-end, or it is not installed.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    if name not in ("reference", "cpu", "cuda"):
        options = ["reference", "cpu", "cuda"]
        hint = nearest(name, options) or f"; there are {', '.join(options)}."
        raise UnweaveError(f"{VARIABLE}={name!r} names no kernels{hint}")
    if name == "cpu" and not cpu.available():
        raise UnweaveError(f"{VARIABLE}=cpu, but the compiled kernels are not installed.")
    if name == "cuda" and not _has_triton():
        raise UnweaveError(f"{VARIABLE}=cuda, but Triton is not installed.")
    return name  # type: ignore[return-value]


def backend(operation: str, *tensors: Tensor) -> Backend:
    """The kernels for some tensors, which are on one device.

    Compiled kernels compute in float32; any other floating-point dtype is computed by the reference. Where Triton
    interprets its kernels (TRITON_INTERPRET=1), UNWEAVE_KERNELS=cuda runs them on CPU tensors, for tests.

    Raises:
        UnweaveError: If the tensors are on different devices, or UNWEAVE_KERNELS does not fit them.
    """
    check_devices(operation, *tensors)
    device = tensors[0].device.type
    choice = forced()
    if choice == "cuda" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        device = "cuda"  # Triton's interpreter runs its kernels on CPU tensors
    if choice in ("cpu", "cuda") and choice != device:
        raise UnweaveError(f"{operation}: {VARIABLE}={choice}, but the tensors are on {device}.")
    if choice == "reference" or any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors):
        return "reference"
    if device == "cpu" and cpu.available():
        return "cpu"
    return "cuda" if device == "cuda" and _has_triton() else "reference"


def compiled(operation: str, *tensors: Tensor) -> ModuleType | None:
    """The module with the compiled kernels for some tensors, `kernels.cpu` or `kernels.cuda`; None if there are none.

    Raises:
        UnweaveError: As `backend`.
    """
    match backend(operation, *tensors):
        case "cpu":
            return cpu
        case "cuda":
            from unweave.kernels import cuda

            return cuda
    return None


def check_devices(operation: str, *tensors: Tensor) -> None:
    """Refuse tensors that are on different devices.

    Raises:
        UnweaveError: If they are.
    """
    if len(devices := dict.fromkeys(str(t.device) for t in tensors)) > 1:
        raise UnweaveError(f"{operation}: the tensors are on different devices ({', '.join(devices)}).")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
