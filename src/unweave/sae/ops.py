"""The differentiable steps of a sparse forward pass.

`encode_at` gives the selected pre-activations a gradient, `decode` multiplies codes with a decoder. Their backward
passes follow the active latents only. The gradient that reaches the pre-encoder bias is a mat-vec on the summed
gradient (every row's gradient passes through the same `W_enc`), never another large product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from unweave import kernels
from unweave.sae.codes import Codes, DenseCodes, SparseCodes

AnyCodes = TypeVar("AnyCodes", bound=Codes)
Decoder = Float[Tensor, "d_sae d"] | Sequence[Float[Tensor, "m d_b"]]
"""A decoder, whole or in blocks of latents; the first block writes to all of the output, others to its last `d_b`."""


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, b_pre: Tensor, W_enc: Tensor, b_enc: Tensor, codes: Codes) -> Tensor:
        ctx.save_for_backward(x, b_pre, W_enc)
        ctx.codes = codes
        return codes.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, None]:
        x, b_pre, W_enc = ctx.saved_tensors
        centred = x - b_pre
        if isinstance(ctx.codes, DenseCodes):
            grad_W = (grad.T @ centred).T
            grad_b = grad.sum(0)
            grad_x = grad @ W_enc.T if ctx.needs_input_grad[0] else None
        else:
            indices, offsets = ctx.codes.indices, ctx.codes.offsets
            grad_W = kernels.scatter_outer(indices, grad, offsets, centred, ctx.codes.d_sae).T
            grad_b = ctx.codes.sum_by_latent(grad)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = kernels.gather_sum(ctx.codes.indices, grad, ctx.codes.offsets, W_enc.T)
        grad_b_pre = -(W_enc @ grad_b) if ctx.needs_input_grad[1] else None
        return grad_x, grad_b_pre, grad_W, grad_b, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, codes: SparseCodes) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.codes = codes
        return kernels.gather_sum(codes.indices, values, codes.offsets, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, W_dec = ctx.saved_tensors
        of_values, of_W, _ = ctx.needs_input_grad
        return *_back(ctx.codes.with_values(values), W_dec, grad, of_values, of_W), None


def _back(
    codes: SparseCodes, W_dec: Tensor, grad: Tensor, of_values: bool, of_W: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `codes @ W_dec`."""
    grad = grad.contiguous()
    grad_values = kernels.sddmm(codes.indices, codes.offsets, grad, W_dec) if of_values else None
    grad_W = None
    if of_W:
        grad_W = kernels.scatter_outer(codes.indices, codes.values, codes.offsets, grad, codes.d_sae)
    return grad_values, grad_W


class _DecodeBlocks(torch.autograd.Function):
    """One block after the other, so that no block's output is kept beside the sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, codes: SparseCodes, *blocks: Tensor) -> Tensor:
        ctx.save_for_backward(*blocks)
        ctx.parts, ctx.order = codes.with_values(values).blocks([len(block) for block in blocks])
        products = (
            kernels.gather_sum(part.indices, part.values, part.offsets, block)
            for part, block in zip(ctx.parts, blocks, strict=True)
        )
        made = next(products)
        for product in products:
            _last(made, product.shape[1]).add_(product)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_values, _, *of_blocks = ctx.needs_input_grad
        found = [
            _back(part, block, _last(grad, block.shape[1]), of_values, of_block)
            for part, block, of_block in zip(ctx.parts, ctx.saved_tensors, of_blocks, strict=True)
        ]
        grad_values = None
        if of_values:
            in_order = torch.cat([of_part for of_part, _ in found if of_part is not None])
            grad_values = torch.empty_like(in_order).index_copy_(0, ctx.order, in_order)
        return grad_values, None, *(of_block for _, of_block in found)


class _AddDense(torch.autograd.Function):
    """What blocks make of dense codes, added up; the first has the full width, the others the last dimensions."""

    @staticmethod
    def forward(ctx: Any, *products: Tensor) -> Tensor:
        ctx.widths = [product.shape[1] for product in products]
        made = products[0].clone()
        for product in products[1:]:
            _last(made, product.shape[1]).add_(product)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(_last(grad, width) for width in ctx.widths)


def _last(x: Tensor, width: int) -> Tensor:
    return x[:, x.shape[1] - width :]


def encode_at(
    x: Float[Tensor, "n d_in"],
    b_pre: Float[Tensor, " d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    pre: AnyCodes,
) -> AnyCodes:
    """Give pre-activations `(x - b_pre) @ W_enc + b_enc`, already computed at some entries, their gradients.

    Args:
        x: Inputs.
        b_pre: Bias subtracted from the inputs.
        W_enc: Encoder weights.
        b_enc: Encoder bias.
        pre: The entries and the pre-activations there, without a graph.

    Returns:
        The same entries, whose values are part of the graph.
    """
    return cast(AnyCodes, pre.with_values(_EncodeAt.apply(x, b_pre, W_enc, b_enc, pre)))


def decode(codes: Codes, W_dec: Decoder) -> Float[Tensor, "n d"]:
    """`codes @ W_dec`, with gradients for the values and for `W_dec`."""
    blocks = (W_dec,) if isinstance(W_dec, Tensor) else W_dec
    if isinstance(codes, DenseCodes):
        parts = codes.values.split([len(block) for block in blocks], 1)
        products = [part @ block for part, block in zip(parts, blocks, strict=True)]
        return products[0] if len(products) == 1 else _AddDense.apply(*products)
    if len(blocks) == 1:
        return _Decode.apply(codes.values, blocks[0], codes)
    return _DecodeBlocks.apply(codes.values, codes, *blocks)


def row_norms(W: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Norm of each row, with a finite gradient for a row of zeros."""
    return W.square().sum(1).clamp(min=torch.finfo(W.dtype).tiny).sqrt()
