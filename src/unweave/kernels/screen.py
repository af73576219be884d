"""What a screening product takes, and how far its results can be from the true ones.

An encoder's rows are kept in the precisions that products are made in, each with the norm of what rounding took away;
so are the inputs. By Cauchy-Schwarz these norms bound the error of every pre-activation, which is what makes selection
from a low-precision product exact (csrc/select.h).
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from unweave.kernels.scratch import scratch

Precision = Literal["auto", "fp32", "bf16"]
Kind = Literal["fp32", "bf16", "int8"]

_COARSEST = 0.02
"""Relative rounding of inputs above which int8 leaves too many candidates: a few large dimensions take its range."""
_NARROWEST = 256
"""Width from which an int8 product saves more than its candidates cost."""
_WIDEST = 2**30 // 128**2
"""Width up to which two sums of an int8 product together fit into int32."""


@functools.cache
def fast_bf16(device: str) -> bool:
    """Whether matrix products are faster in bf16 than in fp32 on a kind of device."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def _fast_int8() -> bool:
    return torch.cpu._is_vnni_supported() and hasattr(torch, "_int_mm")


def low(precision: Precision, device: str) -> bool:
    """Whether dense products are made in bf16."""
    return fast_bf16(device) if precision == "auto" else precision == "bf16"


def kind_of(precision: Precision, d: int) -> Kind:
    """Which product screens inputs of width d on a CPU: with "auto" the fastest."""
    if precision == "auto":
        return "int8" if _fast_int8() and _NARROWEST <= d <= _WIDEST else "bf16" if fast_bf16("cpu") else "fp32"
    return precision


@dataclass(frozen=True, eq=False)
class Images:
    """The rows of a matrix in lower precisions. Fields that a kind of product does not need are None."""

    norms: Float[Tensor, " m"]
    half: Tensor | None = None
    """`(m, d)` in bf16."""
    half_errors: Float[Tensor, " m"] | None = None
    """Norm of what rounding to bf16 changed."""
    bytes: Int8[Tensor, "m d"] | None = None
    byte_scales: Float[Tensor, " m"] | None = None
    """The worth of one unit of each int8 row."""
    byte_errors: Float[Tensor, " m"] | None = None
    """Norm of what rounding to int8 changed."""
    rest: Int8[Tensor, "m d"] | None = None
    """What rounding to int8 changed, in units 254 times as small."""
    rest_errors: Float[Tensor, " m"] | None = None
    """Norm of what rounding the rest to int8 changed."""

    @classmethod
    def room_for(cls, weight: Float[Tensor, "m d"], kind: Kind, reused: str | None = None) -> Images:
        """Images of a matrix, yet to be made. Those in `reused` memory are overwritten by the next ones in it."""
        half, bytes = kind == "bf16", kind == "int8"

        def vector(wanted: bool) -> Tensor | None:
            return weight.new_empty(len(weight)) if wanted else None

        def rows(name: str, dtype: torch.dtype) -> Tensor:
            shape = tuple(weight.shape)
            return scratch(f"{name} of {reused}", shape, dtype) if reused else weight.new_empty(shape, dtype=dtype)

        return cls(
            weight.new_empty(len(weight)),
            rows("halves", torch.bfloat16) if half else None,
            vector(half),
            rows("bytes", torch.int8) if bytes else None,
            vector(bytes),
            vector(bytes),
            rows("rests", torch.int8) if bytes else None,
            vector(bytes),
        )

    def struct(self) -> ctypes.Structure:
        """As the kernels read it."""
        return _ImagesStruct(*(None if t is None else t.data_ptr() for t in vars(self).values()))


class _ImagesStruct(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in Images.__dataclass_fields__]


class _ScreenStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "bias", "norms", "errors", "scales", "bytes", "rest", "rest_errors",
            "by_norm", "by_error", "row_bytes", "row_rest", "row_scales",
            "finer_by_norm", "finer_by_error", "finer_by_rest",
        )),
        *((name, ctypes.c_float) for name in ("rel", "max_bias", "max_norm", "max_error", "max_rest_error")),
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Screen:
    """An encoder as screening products take it; valid until the encoder changes."""

    kind: Kind
    images: Images

    @classmethod
    def room_for(cls, weight: Float[Tensor, "m d"], precision: Precision) -> Screen:
        """A screen whose images are yet to be made."""
        kind = kind_of(precision, weight.shape[1])
        return cls(kind, Images.room_for(weight, kind))

    def fits(self, m: int, d: int) -> bool:
        """Whether it can be that of an encoder of m latents and width d."""
        matrices = [t for t in (self.images.half, self.images.bytes, self.images.rest) if t is not None]
        return len(self.images.norms) == m and all(t.shape == (m, d) for t in matrices)


def too_coarse(inputs: Images) -> bool:
    """Whether int8 images of inputs are of no use."""
    assert inputs.byte_errors is not None
    assert inputs.bytes is not None
    rough = inputs.byte_errors > _COARSEST * inputs.norms
    # torch._int_mm leaves its result unwritten at width 1.
    return inputs.bytes.shape[1] == 1 or bool(rough.sum() > len(rough) / 8)


class Screening:
    """The operands of one screening product.

    Args:
        screen: Of the encoder.
        inputs: Images of the inputs' rows, in the screen's kinds.
        x: The inputs.
        weight: The encoder's rows.
        bias: The encoder's bias.
    """

    def __init__(
        self, screen: Screen, inputs: Images, x: Float[Tensor, "n d"], weight: Float[Tensor, "m d"], bias: Tensor
    ) -> None:
        images, sums = screen.images, 4 * x.shape[1] * 2.0**-24  # rounding of two sums of d products, relative
        self.kind, self.bias, self.images, self.inputs = screen.kind, bias, images, inputs
        self.finer: list[Tensor | None] = [None, None, None]
        rounded, errors = torch.zeros_like(inputs.norms), torch.zeros_like(images.norms)
        if self.kind == "fp32":
            self.x, self.weight, self.rel = x, weight, 2.0**-23
        elif self.kind == "bf16":
            assert inputs.half is not None
            assert images.half is not None
            self.x, self.weight, self.rel = inputs.half, images.half, 2.0**-8
            rounded, errors = inputs.half_errors, images.half_errors  # type: ignore[assignment]
        else:
            assert inputs.bytes is not None
            assert inputs.rest_errors is not None
            assert images.bytes is not None
            assert images.rest_errors is not None
            self.x, self.weight, self.rel = inputs.bytes, images.bytes, 2.0**-21
            rounded, errors = inputs.byte_errors, images.byte_errors  # type: ignore[assignment]
            sums = (2 * x.shape[1] + 16) * 2.0**-24  # one sum: the product itself is made of whole numbers
            # With x = x' + x" + left, and w alike, x'w' + x'w" + x"w' lacks left . w, (x' + x") . (what is left of w)
            # and x" . w", where |x"| <= |dx| + |left|.
            left, both = inputs.rest_errors, rounded + inputs.rest_errors
            self.finer = [left + sums * inputs.norms, both, inputs.norms + left + both]
        self.errors = errors
        self.by_norm, self.by_error = rounded + sums * inputs.norms, inputs.norms + rounded
        largest = (bias.abs(), images.norms, errors, images.rest_errors)
        self.largest = [0.0 if t is None else t.max().item() for t in largest]

    def products(self, rows: slice, latents: slice, buffer: Tensor) -> Tensor:
        """The products of some rows with some latents, in a reused buffer."""
        x, weight = self.x[rows], self.weight[latents]
        tile = buffer[: len(x) * len(weight)].view(len(x), len(weight))
        if self.kind == "int8":
            return torch._int_mm(x, weight.T, out=tile)
        return torch.mm(x, weight.T, out=tile)

    def fits_int8(self) -> bool:
        """Whether products are made of int8 and no pre-activation, as they give it, can leave fp32's range."""
        if self.kind != "int8":
            return False
        assert self.inputs.byte_scales is not None
        assert self.images.byte_scales is not None
        units = self.inputs.byte_scales.max().item() * self.images.byte_scales.max().item()
        return units * 127**2 * self.x.shape[1] + self.largest[0] < 1e38

    @property
    def product_dtype(self) -> torch.dtype:
        return torch.int32 if self.kind == "int8" else self.x.dtype

    def struct(self, first_row: int) -> ctypes.Structure:
        """As the kernels read it, for rows from `first_row` on."""
        w, x = self.images, self.inputs
        of_latents = (self.bias, w.norms, self.errors, w.byte_scales, w.bytes, w.rest, w.rest_errors)
        of_rows = (self.by_norm, self.by_error, x.bytes, x.rest, x.byte_scales, *self.finer)
        pointers = [None if t is None else t.data_ptr() for t in of_latents]
        pointers += [None if t is None else t[first_row:].data_ptr() for t in of_rows]
        return _ScreenStruct(*pointers, self.rel, *self.largest)
