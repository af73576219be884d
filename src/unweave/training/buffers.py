"""What takes a run's memory, how much that is at its peak, and whether there is so much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unweave._errors import UnweaveError
from unweave.activations.limits import free_memory

_SLACK = 0.95
"""Share of what is free that a run may ask for."""


@dataclass(frozen=True)
class Buffer:
    """Something that takes memory.

    Attributes:
        name: What it is.
        bytes: How much.
        device: Where.
        lasting: Whether it is held during all of the run. Of the others only the largest counts on a device, since one
            comes after the other.
        present: Whether it has been allocated already.
        lower: Which setting makes it smaller.
    """

    name: str
    bytes: int
    device: str
    lasting: bool = True
    present: bool = False
    lower: str = ""


def peak(buffers: Sequence[Buffer], device: str) -> int:
    """Bytes that buffers take on a device at once."""
    here = [b for b in buffers if b.device == device]
    return sum(b.bytes for b in here if b.lasting) + max((b.bytes for b in here if not b.lasting), default=0)


def check_memory(buffers: Sequence[Buffer], device: str) -> None:
    """Refuse buffers that do not fit into what is free beside what has been allocated already.

    Raises:
        UnweaveError: They do not; the sentence says which setting to lower.
    """
    new = [b for b in buffers if not b.present]
    needed, free = peak(new, device), free_memory(device)
    if needed <= _SLACK * free:
        return
    largest = max((b for b in new if b.device == device and b.lower), key=lambda b: b.bytes)
    raise UnweaveError(
        f"the run needs {size(needed)} of memory on {device}, where {size(free)} are free, {size(largest.bytes)} of it "
        f"for the {largest.name}: lower {largest.lower}."
    )


def size(n: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "kB", "MB"):
        if n < 999.5:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB" if n < 999.5 else f"{n / 1000:.1f} TB"
