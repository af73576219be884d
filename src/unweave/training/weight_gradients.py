"""Gradients of an SAE's two matrices, of the latents that have one: `codes.T @ grad` and what else flows into them."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from unweave.kernels import Transposed, cpu
from unweave.kernels.dispatch import compiled
from unweave.kernels.scratch import LIKE_W_DEC, LIKE_W_ENC, scratch
from unweave.training.dense import Aux
from unweave.training.optimizer import RowGrad

Gradients = tuple[dict[str, Tensor | RowGrad], Tensor]


def weight_gradients(
    by_latent: Transposed,
    codes: Float[Tensor, " nnz"],
    pre_grad: Float[Tensor, " nnz"],
    grad: Float[Tensor, "n*p d"],
    x: Float[Tensor, "n d"],
    W_dec: Float[Tensor, "m d"],
    *,
    groups: int,
    aux: Aux | None,
    along: Float[Tensor, " m"] | None,
    project: bool,
) -> Gradients:
    """Gradients of W_dec and W_enc, and the sum of their squares.

    Args:
        by_latent: The entries of the codes.
        codes: Their values.
        pre_grad: The gradient of their pre-activations.
        grad: That of what they decode to; it may lie where the gradient of W_enc comes, and is overwritten then.
        x: Inputs, less `b_dec`.
        W_dec: The decoder.
        groups: Rows of codes for each row of `x`.
        aux: What AuxK adds.
        along: This much of each row of W_dec is added to its gradient.
        project: Whether what would only change the norm of a row is taken out.
    """
    ops: Any = compiled("training step", W_dec)
    m, d = W_dec.shape
    start_dec = None if aux is None else (aux.W_dec, aux.latents)
    start_enc = None if aux is None else (aux.W_enc, aux.latents)
    latents, slot = None, None
    rooms: tuple[Tensor | None, Tensor | None] = None, None
    if ops is cpu:
        touched = by_latent.offsets.diff() > 0
        if aux is not None:
            touched[aux.latents] = True
        if int(touched.sum()) < m // 2:  # a wide dictionary and few tokens: no memory for the others' zeros
            latents = touched.nonzero().flatten()
            slot = cpu.slots(latents, m)
        else:
            rooms = scratch(LIKE_W_DEC, (m, d)), scratch(LIKE_W_ENC, (m, d))
    squares = x.new_empty(2, m if latents is None else len(latents))
    of_dec = ops.scatter_outer(
        by_latent, codes, grad, latents=latents, start=start_dec, weight=W_dec, along=along, project=project,
        out=rooms[0], squares=squares[0],
    )  # fmt: skip
    of_enc = ops.scatter_outer(
        by_latent, pre_grad, x, latents=latents, rows_per_x=groups, start=start_enc, out=rooms[1], squares=squares[1]
    )
    return {"W_dec": RowGrad(of_dec, slot), "W_enc": RowGrad(of_enc, slot)}, ops.total(squares)
