"""What is free: memory, within what a container allows, and disk; and handing memory back."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be allocated on a device, other processes and the container's limit considered."""
    device = torch.device(device)
    if device.type == "cuda":
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + held_back)
    return min([_available(), *_left_to_groups()])


def free_disk(path: str | Path) -> int:
    """Bytes free on the disk where `path` is, or will be."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def trim_memory() -> None:
    """Hand back to the operating system what the C library keeps of freed memory, which may be hundreds of MB."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def _available() -> int:
    info = _PROC / "meminfo"
    if info.exists():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not on Linux: all that there is


def _left_to_groups() -> Iterator[int]:
    """What each control group around this process has left; file pages that it could drop count as left."""
    groups = _PROC / "self" / "cgroup"
    if not groups.exists():
        return
    for line in groups.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        v1 = controllers == "memory"
        root = _CGROUP / "memory" if v1 else _CGROUP
        limit, usage = ("limit_in_bytes", "usage_in_bytes") if v1 else ("max", "current")
        inactive = "total_inactive_file" if v1 else "inactive_file"
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                most = (folder / f"memory.{limit}").read_text(encoding="ascii").strip()
                used = int((folder / f"memory.{usage}").read_text(encoding="ascii"))
                stat = dict(s.split() for s in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            except OSError:  # the root group has none, and a container may not see its own
                continue
            if most != "max":
                yield max(int(most) - used + int(stat.get(inactive, 0)), 0)
