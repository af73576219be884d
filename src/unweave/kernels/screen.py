"""What a screening product takes, and how far its results can be from the true ones.

An encoder's rows are kept in the precision that products are made in, with what rounding may have changed; so are the
inputs. That bounds the error of every pre-activation, which is what makes selection from a low-precision product exact
(csrc/candidates.h).
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from unweave.kernels.scratch import scratch_if_small

Precision = Literal["auto", "fp32", "bf16"]
Kind = Literal["fp32", "bf16", "int8"]

_COARSEST = 0.2
"""Unit of an int8 row, in root mean squares of the row, above which it leaves too many candidates: a few large
dimensions take its range."""
_UNITS = 2.65
"""By how many units of an int8 row, times the norm of another, rounding of the one may change their product. 2.63 leave
a chance of exp(-6 * 2.63**2) = 1e-18 (csrc/candidates.h); what is above is for the rounding of shifts and sums."""
_NARROWEST = 256
"""Width from which an int8 product saves more than its candidates cost."""
_WIDEST = 2**30 // 128**2
"""Width up to which an int8 product, its shifts and what its sums begin at fit into int32."""


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


@functools.cache
def _dithers(d: int) -> tuple[Tensor, Tensor]:
    """Random numbers between -1/2 and 1/2 for each column of an encoder's rows, and of inputs; always the same."""
    # A seed that nobody's data or weights are made from: bounds hold for what is independent of these numbers.
    own = torch.Generator("cpu").manual_seed(zlib.crc32(b"unweave: dither of int8 images"))
    encoder, inputs = torch.rand(2, d, generator=own, dtype=torch.float32, device="cpu") - 0.5
    return encoder, inputs


@dataclass(frozen=True, eq=False)
class Images:
    """The rows of a matrix in lower precisions. Fields that a kind of product does not need are None."""

    norms: Float[Tensor, " m"]
    """Empty on a GPU, where nothing bounds the errors of a product."""
    half: Tensor | None = None
    """`(m, d)` in bf16."""
    half_errors: Float[Tensor, " m"] | None = None
    """Norm of what rounding to bf16 changed."""
    bytes: Int8[Tensor, "m d"] | None = None
    byte_scales: Float[Tensor, " m"] | None = None
    """The worth of one unit of each int8 row."""
    byte_shifts: Int32[Tensor, " m"] | None = None
    """What is to be added to each int8 row's products, for the dithers."""
    dither: Float[Tensor, " d"] | None = None
    """What was added to every int8 row, in units, before rounding."""
    other_dither: Float[Tensor, " d"] | None = None
    """The dither of the matrix that this one is multiplied with."""

    @classmethod
    def room_for(
        cls, weight: Float[Tensor, "m d"], kind: Kind, reused: str | None = None, *, inputs: bool = False
    ) -> Images:
        """Images of a matrix, yet to be made.

        Args:
            weight: The matrix.
            kind: Of the product.
            reused: Name of memory that they are made in, where they stay until that name is used again (`scratch`).
            inputs: Whether they are of inputs, and not of an encoder.
        """
        m, d = weight.shape

        def rows(dtype: torch.dtype) -> Tensor:
            if reused is None:
                return weight.new_empty((m, d), dtype=dtype)
            return scratch_if_small(reused, (m, d), dtype)

        norms = weight.new_empty(m)
        if kind == "bf16":
            return cls(norms, half=rows(torch.bfloat16), half_errors=torch.empty_like(norms))
        if kind == "int8":
            own, other = reversed(_dithers(d)) if inputs else _dithers(d)
            shifts = weight.new_empty(m, dtype=torch.int32)
            return cls(norms, None, None, rows(torch.int8), torch.empty_like(norms), shifts, own, other)
        return cls(norms)

    def struct(self) -> ctypes.Structure:
        """As the kernels read it."""
        return _ImagesStruct(*(None if t is None else t.data_ptr() for t in vars(self).values()))


class _ImagesStruct(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in Images.__dataclass_fields__]


class _ScreenStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "bias", "norms", "errors", "scales", "bytes", "shifts",
            "by_norm", "by_error", "row_bytes", "row_scales", "row_shifts",
        )),
        *((name, ctypes.c_float) for name in ("rel", "of_smaller", "max_bias", "max_norm", "max_error")),
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Screen:
    """An encoder as screening products take it; valid until the encoder changes."""

    kind: Kind
    images: Images

    @classmethod
    def room_for(cls, weight: Float[Tensor, "m d"], precision: Precision, reused: str | None = None) -> Screen:
        """A screen whose images are yet to be made; see `Images.room_for`."""
        kind = kind_of(precision, weight.shape[1])
        return cls(kind, Images.room_for(weight, kind, reused))

    @classmethod
    def of_gpu(cls, weight: Float[Tensor, "m d"]) -> Screen:
        """The screen of an encoder's rows for bf16 products on a GPU."""
        return cls("bf16", Images(weight.new_empty(0), half=weight.to(torch.bfloat16)))

    def fits(self, m: int, d: int) -> bool:
        """Whether it can be that of an encoder of m latents and width d."""
        matrices = [t for t in (self.images.half, self.images.bytes) if t is not None]
        return all(t.shape == (m, d) for t in matrices) if matrices else len(self.images.norms) == m


def too_coarse(inputs: Images) -> bool:
    """Whether int8 images of inputs are of no use."""
    assert inputs.byte_scales is not None
    assert inputs.bytes is not None
    d = inputs.bytes.shape[1]
    rough = inputs.byte_scales * d**0.5 > _COARSEST * inputs.norms
    # torch._int_mm leaves its result unwritten at width 1.
    return d == 1 or bool(rough.sum() > len(rough) / 8)


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
        self.of_smaller = 1.0
        if self.kind == "fp32":
            self.x, self.weight, self.rel = x, weight, 2.0**-23
            self.by_norm, self.by_error = sums * inputs.norms, inputs.norms
            self.errors = torch.zeros_like(images.norms)
        elif self.kind == "bf16":
            assert inputs.half is not None
            assert inputs.half_errors is not None
            assert images.half is not None
            assert images.half_errors is not None
            self.x, self.weight, self.rel = inputs.half, images.half, 2.0**-8
            self.by_norm, self.by_error = inputs.half_errors + sums * inputs.norms, inputs.norms + inputs.half_errors
            self.errors = images.half_errors
        else:
            assert inputs.bytes is not None
            assert inputs.byte_scales is not None
            assert images.bytes is not None
            assert images.byte_scales is not None
            self.x, self.weight, self.rel = inputs.bytes, images.bytes, 2.0**-21
            sums = (2 * x.shape[1] + 16) * 2.0**-24  # one sum: the product itself is made of whole numbers
            # The root of a sum of squares is at most the larger number and this share of the smaller. It grows by at
            # least what is added to both numbers, so that both have the rounding of the sum, which is not random.
            self.of_smaller = 2**0.5 - 1
            self.by_norm = _UNITS * inputs.byte_scales + sums * inputs.norms
            self.errors = _UNITS * images.byte_scales + sums * images.norms
            self.by_error = inputs.norms + x.shape[1] ** 0.5 / 2 * inputs.byte_scales
        self.largest = [t.max().item() for t in (bias.abs(), images.norms, self.errors)]

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
        return units * 128**2 * self.x.shape[1] + self.largest[0] < 1e38

    @property
    def product_dtype(self) -> torch.dtype:
        return torch.int32 if self.kind == "int8" else self.x.dtype

    def struct(self, first_row: int) -> ctypes.Structure:
        """As the kernels read it, for rows from `first_row` on."""
        w, x = self.images, self.inputs
        of_latents = (self.bias, w.norms, self.errors, w.byte_scales, w.bytes, w.byte_shifts)
        of_rows = (self.by_norm, self.by_error, x.bytes, x.byte_scales, x.byte_shifts)
        pointers = [None if t is None else t.data_ptr() for t in of_latents]
        pointers += [None if t is None else t[first_row:].data_ptr() for t in of_rows]
        return _ScreenStruct(*pointers, self.rel, self.of_smaller, *self.largest)
