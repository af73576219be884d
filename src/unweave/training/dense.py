"""Dense execution: for the first steps of ReLU and JumpReLU, when half the latents fire, and for AuxK's dead latents.

Chunks of rows go through dense products of the chosen precision, so that no `(batch, d_sae)` tensor exists. In bf16
the products round to 8 bits: gradients are bf16's, unlike those of sparse execution.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave import kernels
from unweave._errors import UnweaveError
from unweave.kernels import cpu
from unweave.kernels.dispatch import compiled
from unweave.kernels.scratch import LIKE_W_DEC, LIKE_W_ENC, scratch_like
from unweave.objectives import L1, TargetL0
from unweave.sae import SAE, JumpReLU
from unweave.training.config import SAEConfig
from unweave.training.optimizer import RowGrad, squares_of
from unweave.training.step import Step

CHUNK_ROWS = CHUNK_LATENTS = 512
_ROOMS = ("pre-activations", "codes")
DENSE_SCRATCH = (*_ROOMS, "rounded W_dec", "rounded W_enc")
"""Uses of scratch memory that only dense execution has, or that it has much of."""


class Aux(NamedTuple):
    """AuxK's loss, coefficient included, and its gradients for the dead latents."""

    loss: Float[Tensor, ""]
    latents: Int64[Tensor, " c"]
    W_dec: Float[Tensor, "c d_in"]
    W_enc: Float[Tensor, "c d_in"]
    b_enc: Float[Tensor, " c"]


def auxk_gradients(
    sae: SAE, coefficient: float, residual: Float[Tensor, "n d_in"], centred: Float[Tensor, "n d_in"],
    latents: Int64[Tensor, " c"], k: int, low: bool,
) -> Aux:  # fmt: skip
    """The dead latents' own problem: a dense one on a few columns. See `unweave.objectives.auxk_loss`.

    Args:
        sae: The SAE.
        coefficient: Of the loss.
        residual: What the main codes leave over.
        centred: Inputs of the encoder.
        latents: The dead ones; `d_sae` stands for none.
        k: How many a token uses.
        low: Whether products are made in bf16.
    """
    ops: Any = compiled("training step", residual)
    dtype, d, c = torch.bfloat16 if low else torch.float32, residual.shape[1], len(latents)
    exists, own = latents < sae.d_sae, latents.clamp(max=sae.d_sae - 1)
    W_dec, W_enc = sae.W_dec.detach()[own].to(dtype), sae.W_enc.detach().T[own].to(dtype)
    bias = torch.where(exists, sae.b_enc.detach()[own], -torch.inf).to(dtype)  # what does not exist stays silent
    spread = kernels.spread(residual)
    weight = torch.where(spread > 0, coefficient * d * (exists.sum() / k).clamp(max=1) / spread, 0.0)
    loss, none, g_bias = residual.new_zeros(()), residual.new_zeros(c), residual.new_zeros(c)
    g_dec, g_enc = (scratch_like(residual, f"gradient of dead {name}", (c, d)).zero_() for name in ("W_dec", "W_enc"))
    rows = _auxk_rows(len(residual), c)
    rooms = [scratch_like(residual, name, (min(rows, len(residual)), c), dtype) for name in _ROOMS]
    for e, x in zip(residual.split(rows), centred.split(rows), strict=True):
        x = x.to(dtype)
        codes, back = (room[: len(x)] for room in rooms)
        torch.addmm(bias, x, W_enc.T, out=codes)
        if k < c:
            ops.keep_largest_(codes, k)
        else:
            codes.relu_()
        error = (codes @ W_dec).float().sub_(e)
        loss = loss + weight * kernels.squared_norm(error)
        out = error.mul_(2 * weight).to(dtype)
        torch.mm(out, W_dec.T, out=back)
        ops.dense_back(back, codes, none, none, 0.0, g_bias, none, none)
        _add_products(g_dec, codes, out)
        _add_products(g_enc, back, x)
    return Aux(loss, latents, g_dec, g_enc, g_bias)


def auxk_bytes(n: int, d: int, c: int, low: bool) -> int:
    """Memory that `auxk_gradients` takes: both weights in the products' type, their gradients, and a chunk.

    Args:
        n: Tokens of a batch.
        d: Width of the activations.
        c: Dead latents.
        low: Whether products are made in bf16.
    """
    size, rows = 2 if low else 4, min(n, _auxk_rows(n, c))
    return c * d * (2 * size + 8) + min(c, CHUNK_LATENTS) * d * size + rows * (2 * c * size + 8 * d)


def _auxk_rows(n: int, c: int) -> int:
    return max(CHUNK_ROWS, min(n, 2**22 // max(c, 1)))


def dense_gradients(
    sae: SAE, config: SAEConfig, centred: Float[Tensor, "n d_in"], latents: Int64[Tensor, " c"], k_aux: int,
    penalty: float, low: bool,
) -> Step:  # fmt: skip
    """A step of a ReLU or JumpReLU SAE by dense products.

    Args:
        sae: The SAE.
        config: How it is trained.
        centred: Inputs, less `b_dec`.
        latents: Dead latents.
        k_aux: How many of them a token uses.
        penalty: Coefficient of the sparsity term.
        low: Whether products are made in bf16.
    """
    ops: Any = compiled("training step", centred)
    dtype, (n, d), m = torch.bfloat16 if low else torch.float32, centred.shape, sae.d_sae
    scratch = partial(scratch_like, centred)
    rows_dec, rows_enc = sae.W_dec.detach(), sae.W_enc.detach().T
    W_dec, W_enc = (
        w if w.dtype == dtype else scratch(name, (m, d), dtype).copy_(w)
        for name, w in (("rounded W_dec", rows_dec), ("rounded W_enc", rows_enc))
    )
    bias = sae.b_enc.detach().to(dtype)
    jump = sae.activation if isinstance(sae.activation, JumpReLU) else None
    theta = centred.new_zeros(m) if sae.threshold is None else sae.threshold.detach()
    norms = rows_dec.norm(dim=1) if isinstance(config.sparsity_term, L1) else None
    add = centred.new_zeros(m) if norms is None else penalty / n * norms

    g_dec, g_enc = scratch(LIKE_W_DEC, (m, d)).zero_(), scratch(LIKE_W_ENC, (m, d)).zero_()
    g_bias, out_sum = centred.new_zeros(m), centred.new_zeros(d)
    sums, active, towards, windows = (centred.new_zeros(m) for _ in range(4))
    residual = scratch("residual", centred.shape) if len(latents) else None
    # A CPU works in its caches; a GPU, which has memory, adds few large products to the weights' gradients.
    chunk = max(16, min(CHUNK_ROWS, 2**24 // m)) if centred.device.type == "cpu" else max(CHUNK_ROWS, 2**27 // m)
    squared_error = centred.new_zeros((), dtype=torch.float64)
    rooms = [scratch(name, (min(chunk, n), m), dtype) for name in _ROOMS]
    rooms += [scratch(name, (min(chunk, n), d), dtype) for name in ("rounded inputs", "rounded output")]
    errors = scratch("errors", (min(chunk, n), d))
    bounds, kept = None, centred.new_zeros((), dtype=torch.int64)
    if ops is not cpu:  # what a sparse step would keep decides there what the next ones are
        spec = sae.activation.selection(sae.threshold, n)
        assert isinstance(spec, kernels.Above)
        bounds = ops.lowered(centred, rows_enc.T, sae.b_enc.detach(), spec.bounds, low)
    for start in range(0, n, chunk):
        rows = slice(start, start + chunk)
        target = centred[rows]  # what is centred is reconstructed without the bias
        pre, codes, inputs, out, error = (room[: len(target)] for room in (*rooms, errors))
        inputs.copy_(target)
        torch.addmm(bias, inputs, W_enc.T, out=pre)
        if not ops.dense_codes(pre, theta, codes, active, sums):
            bad = int((~pre.isfinite()).any(1).nonzero()[0])
            raise UnweaveError(f"training step: pre-activations of row {start + bad} are NaN or infinite.")
        if bounds is not None:
            kept += ops.count_above(pre, bounds.of_rows(rows)).sum()
        error.copy_(torch.mm(codes, W_dec, out=out)).sub_(target)
        squared_error += kernels.squared_norm(error)
        if residual is not None:
            torch.neg(error, out=residual[rows])
        out_sum += ops.sum_rows(error.mul_(2 / n))
        out.copy_(error)
        _add_products(g_dec, codes, out)
        back = torch.mm(out, W_dec.T, out=codes)  # which are done with
        ops.dense_back(back, pre, theta, add, jump.bandwidth / 2 if jump else 0.0, g_bias, windows, towards)
        _add_products(g_enc, back, inputs)

    loss, l0 = (squared_error / n).float(), kernels.ordered_sum(active)
    if norms is not None:
        loss = loss + penalty / n * kernels.ordered_sum(sums * norms)
        g_dec.addcmul_((penalty / n * sums / norms.clamp(min=torch.finfo(norms.dtype).tiny))[:, None], rows_dec)
    if isinstance(config.sparsity_term, TargetL0):
        value, slope = TargetL0.of(l0 / n / config.sparsity_term.l0 - 1)
        loss = loss + penalty * value
        towards -= penalty * slope / (config.sparsity_term.l0 * n) * windows
    if residual is not None:
        aux = auxk_gradients(sae, config.auxk.coefficient, residual, centred, latents, k_aux, low)
        loss = loss + aux.loss
        for total, own in ((g_dec, aux.W_dec), (g_enc, aux.W_enc), (g_bias, aux.b_enc)):
            add_rows_(total, aux.latents, own)
    if config.decoder_is_unit:
        products = scratch("weight products", (min(CHUNK_LATENTS, m), d))
        for g, w in zip(g_dec.split(CHUNK_LATENTS), rows_dec.split(CHUNK_LATENTS), strict=True):
            along = torch.mul(g, w, out=products[: len(g)]).sum(1)
            g.addcmul_(along[:, None], w, value=-1)
    grads: dict[str, Tensor | RowGrad] = {
        "W_dec": g_dec, "W_enc": g_enc.T, "b_enc": g_bias, "b_dec": out_sum - ops.sum_rows(rows_enc, g_bias),
    }  # fmt: skip
    if jump is not None:
        grads["threshold"] = towards
    squares = squares_of(grads)
    density = (l0 if bounds is None else kept) / (n * m)
    return Step(loss, squared_error, l0, active > 0, None, grads, squares, density)


def add_rows_(total: Float[Tensor, "m ..."], latents: Int64[Tensor, " c"], rows: Float[Tensor, "c ..."]) -> None:
    """Add rows to those of some latents, in place; a latent that does not exist stands for rows of zeros."""
    total.index_add_(0, latents.clamp(max=len(total) - 1), rows)


def _add_products(total: Float[Tensor, "m d"], codes: Float[Tensor, "r m"], x: Float[Tensor, "r d"]) -> None:
    """Add `codes.T @ x` in place: on a CPU a few latents at a time, whose products are still in cache when added."""
    ops: Any = compiled("training step", total)
    count = min(CHUNK_LATENTS, len(total)) if total.device.type == "cpu" else len(total)
    products = scratch_like(total, "weight products", (count, total.shape[1]), codes.dtype)
    for rows, some in zip(total.split(count), codes.split(count, dim=1), strict=True):
        product = torch.mm(some.T, x, out=products[: len(rows)])
        if product.dtype == torch.bfloat16:
            ops.add_halves_(rows, product)
        else:
            rows += product
