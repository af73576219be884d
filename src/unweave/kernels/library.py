"""The compiled kernels: a shared library with a C interface, found, checked and loaded here, called through ctypes."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import os
import sys
import warnings
from pathlib import Path

import torch  # noqa: F401  # loads the OpenMP runtime that the kernels run on

import unweave.kernels
from unweave._errors import UnweaveError

ABI_VERSION = 7  # the same number as in csrc/targets.cpp
FILE = "libunweave_kernels" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
VARIABLE = "UNWEAVE_KERNELS_LIBRARY"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none: then PyTorch does their work, and one warning says so.

    The environment variable `UNWEAVE_KERNELS_LIBRARY` names a file to load in place of the installed one.

    Raises:
        UnweaveError: The named file does not exist, or the library cannot be loaded or is of another version.
    """
    if named := os.environ.get(VARIABLE):
        path, remedy = Path(named), "build it again"
        if not path.is_file():
            raise UnweaveError(f"{VARIABLE} names {named!r}, which is no file.")
    else:
        # An editable install has two folders: the sources and, beside the other packages, what was compiled.
        found = [path for folder in unweave.kernels.__path__ if (path := Path(folder, FILE)).is_file()]
        if not found:
            _warn(f"{FILE} is not installed", "install a C++ compiler, then unweave again with pip's --no-cache-dir")
            return None
        path, remedy = found[0], "reinstall unweave"
    if sys.platform == "linux" and not _find_openmp():
        _warn("there is no OpenMP runtime (libgomp)", "install libgomp")
        return None
    try:
        library = ctypes.CDLL(str(path))
        version = library.uw_abi_version()
    except (OSError, AttributeError) as error:
        raise UnweaveError(f"The compiled kernels cannot be loaded: {error}; {remedy}.") from error
    if version != ABI_VERSION:
        raise UnweaveError(f"{path} has version {version} of the kernels, this unweave needs {ABI_VERSION}; {remedy}.")
    return library


def targets(library: ctypes.CDLL) -> list[str]:
    """The instruction sets that the library is compiled for and this processor has, best first."""
    function = library.uw_targets
    function.restype = ctypes.c_char_p
    return str(function().decode()).split(",")


def _find_openmp() -> bool:
    """Whether the process has GCC's OpenMP symbols: PyTorch's own or, where it brings none, the system's.

    The library is linked with no OpenMP runtime, so that it shares the threads of PyTorch: a second pool would spin on
    the same cores.
    """
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return True
    name = ctypes.util.find_library("gomp")
    if name is None:
        return False
    ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    return True


def _warn(why: str, remedy: str) -> None:
    warnings.warn(
        f"unweave runs without its compiled kernels, and so more slowly: {why}; {remedy}.",
        RuntimeWarning,
        stacklevel=3,  # whoever called load()
    )
