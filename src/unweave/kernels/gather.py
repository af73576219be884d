"""Rows out of arrays that lie ready, such as mapped files: in PyTorch and in C++."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.kernels import cpu, dispatch

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


class RowTable:
    """Rows of one width and type that lie in several arrays, one array behind the other. Nothing is copied.

    Args:
        parts: Arrays on the CPU of float32, bfloat16, float16 or int8: `(n, d)`, or `(n_groups, per_group, d)`, whose
            rows are numbered group by group. Strides are free but for the last, which must be 1.
        scales: For int8: one float32 factor for each row of each part.

    Attributes:
        starts: Number of each part's first row, and the number of rows at the end.

    Raises:
        UnweaveError: Parts of other shapes or types, or scales that do not fit them.
    """

    def __init__(self, parts: Sequence[Tensor], scales: Sequence[Tensor] | None = None) -> None:
        if not parts:
            raise UnweaveError("gather_rows: there are no arrays to take rows from.")
        self.dtype, self.d = parts[0].dtype, parts[0].shape[-1]
        self._parts = [part if part.ndim == 3 else part[:, None] for part in parts]
        self._scales = None if scales is None else list(scales)
        for part in self._parts:
            if part.ndim != 3 or part.dtype != self.dtype or part.shape[-1] != self.d or part.device.type != "cpu":
                raise UnweaveError("gather_rows: the arrays are not all of one width and type on the CPU.")
            if part.numel() and self.d > 1 and part.stride(2) != 1:
                raise UnweaveError("gather_rows: the numbers of a row do not lie side by side.")
        if self.dtype not in _KINDS:
            raise UnweaveError(f"gather_rows: rows of {self.dtype} are not known.")
        if (self.dtype == torch.int8) != (scales is not None):
            raise UnweaveError("gather_rows: int8 rows have scales, and no others do.")
        lengths = [part.shape[0] * part.shape[1] for part in self._parts]
        for scale, n in zip(self._scales or (), lengths, strict=self._scales is not None):
            if scale.shape != (n,) or scale.dtype != torch.float32 or not scale.is_contiguous():
                raise UnweaveError(f"gather_rows: {n} rows need as many float32 scales.")
        self.starts = torch.tensor([0, *lengths]).cumsum(0)
        self._table = (_Stretch * len(parts))(*map(self._stretch, range(len(parts))))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _stretch(self, i: int) -> _Stretch:
        part, size = self._parts[i], self.dtype.itemsize
        scales = None if self._scales is None else self._scales[i].data_ptr()
        # A part without rows has no group to divide by; no row is ever looked for in it.
        return _Stretch(part.data_ptr(), scales, max(part.shape[1], 1), part.stride(0) * size, part.stride(1) * size)


class _Stretch(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("per_group", ctypes.c_int64),
        ("group_stride", ctypes.c_int64), ("row_stride", ctypes.c_int64),
    )  # fmt: skip


def gather_rows(
    table: RowTable, rows: Int64[Tensor, " n"], dtype: torch.dtype | None = None, *, threads: int = 0
) -> Float[Tensor, "n d"]:
    """Copies of some rows of a table, in the order asked for.

    Args:
        table: The rows there are.
        rows: Which ones; a row may come more than once.
        dtype: Type of the result; None: the table's own, float32 for int8.
        threads: Threads to use, 0: as many as PyTorch does.

    Raises:
        UnweaveError: A row number is out of range.
    """
    if rows.ndim != 1 or rows.dtype != torch.int64 or rows.device.type != "cpu":
        raise UnweaveError(f"gather_rows: row numbers are int64 on the CPU, not {rows.dtype} on {rows.device}.")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(table):
        raise UnweaveError(f"gather_rows: rows {int(rows.min())} to {int(rows.max())} of {len(table)} were asked for.")
    wide = table.dtype == torch.int8 or dtype == torch.float32
    copy = _compiled if _has_compiled() else _reference
    found = copy(table, rows.contiguous(), wide, threads or torch.get_num_threads())
    return found if dtype is None else found.to(dtype)


def _has_compiled() -> bool:
    return dispatch.forced() in (None, "cpu") and cpu.available()


def _compiled(table: RowTable, rows: Tensor, wide: bool, threads: int) -> Tensor:
    out = _recycled.empty(len(rows), table.d, torch.float32 if wide else table.dtype)
    arguments = table._table, table.starts, len(table._parts), _KINDS[table.dtype], int(wide), out, threads
    cpu.call("gather_rows", rows, *out.shape, *arguments)
    return out


def _reference(table: RowTable, rows: Tensor, wide: bool, threads: int) -> Tensor:
    part_of = torch.searchsorted(table.starts, rows, right=True) - 1
    out = torch.empty(len(rows), table.d, dtype=torch.float32 if wide else table.dtype)
    for i in part_of.unique().tolist():
        here = (part_of == i).nonzero().squeeze(1)
        part, at = table._parts[i], rows[here] - table.starts[i]
        found = part[at // part.shape[1], at % part.shape[1]].to(out.dtype)
        out[here] = found if table._scales is None else found * table._scales[i][at, None]
    return out


class _Recycled:
    """Memory for results, taken again once nothing looks at it any more.

    The allocator gives large pieces back to the operating system, which hands them out page by page and zeroed: that
    costs more than copying the rows.
    """

    least, most, sizes = 1 << 20, 4, 4  # bytes worth the trouble; free pieces of a size; sizes

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}

    def empty(self, n: int, d: int, dtype: torch.dtype) -> Tensor:
        size = n * d * dtype.itemsize
        if size < self.least:
            return torch.empty(n, d, dtype=dtype)
        free = self._free.get(size)
        try:
            piece = free.pop() if free else torch.empty(size, dtype=torch.uint8)
        except IndexError:  # another thread was faster
            piece = torch.empty(size, dtype=torch.uint8)
        seen = piece.numpy()  # lives as long as any tensor that shares the result's memory
        weakref.finalize(seen, self._take_back, piece).atexit = False
        return torch.from_numpy(seen).view(dtype).view(n, d)

    def _take_back(self, piece: Tensor) -> None:
        free = self._free.setdefault(len(piece), [])
        if len(free) < self.most:
            free.append(piece)
        while len(self._free) > self.sizes:
            self._free.pop(next(iter(self._free)), None)


_recycled = _Recycled()
