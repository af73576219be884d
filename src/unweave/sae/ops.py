"""The differentiable steps of a sparse forward pass.

`encode_at` gives the selected pre-activations a gradient, `decode` multiplies codes with a decoder. Their backward
passes follow the active latents only. The gradient that reaches the pre-encoder bias is a mat-vec on the summed
gradient (every row's gradient passes through the same `W_enc`), never another large product.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from unweave import kernels
from unweave.sae.codes import Codes, DenseCodes, SparseCodes

AnyCodes = TypeVar("AnyCodes", bound=Codes)


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
        codes, grad = ctx.codes, grad.contiguous()
        grad_values = kernels.sddmm(codes.indices, codes.offsets, grad, W_dec) if ctx.needs_input_grad[0] else None
        grad_W = None
        if ctx.needs_input_grad[1]:
            grad_W = kernels.scatter_outer(codes.indices, values, codes.offsets, grad, codes.d_sae)
        return grad_values, grad_W, None


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


def decode(codes: Codes, W_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n d"]:
    """`codes @ W_dec`, with gradients for the values and for `W_dec`."""
    if isinstance(codes, DenseCodes):
        return codes.values @ W_dec
    return _Decode.apply(codes.values, W_dec, codes)


def row_norms(W: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Norm of each row, with a finite gradient for a row of zeros."""
    return W.square().sum(1).clamp(min=torch.finfo(W.dtype).tiny).sqrt()
