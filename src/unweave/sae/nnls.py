"""Non-negative least squares for many small problems at once."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

_TOLERANCE = 1e-10
_FULL_EXCHANGES = 3
"""Rounds without progress after which a problem exchanges one variable at a time, which cannot cycle."""


def nonnegative_least_squares(
    products: Float64[Tensor, "n s s"], targets: Float64[Tensor, "n s"]
) -> Float64[Tensor, "n s"]:
    """The `a >= 0` that minimise `|x - a @ W|` for each row, by block principal pivoting (Judice and Pires 1994).

    Args:
        products: `W @ W.T` of each problem.
        targets: `W @ x` of each problem.

    Returns:
        Solutions, exact up to rounding: `targets - products @ a` is 0 where `a` is positive and at most 0 elsewhere.
    """
    n, s = targets.shape
    scale = products.diagonal(dim1=1, dim2=2).amax(1).clamp(min=torch.finfo(products.dtype).tiny)
    bound = _TOLERANCE * targets.abs().amax(1)  # of gradients; divided by the scale, of solutions
    ridge = (1e-12 * scale)[:, None, None] * torch.eye(s, dtype=products.dtype, device=products.device)
    identity = torch.eye(s, dtype=torch.bool, device=products.device)
    solution = torch.zeros_like(targets)
    free = torch.ones_like(targets, dtype=torch.bool)
    fewest = torch.full((n,), s + 1, device=targets.device)
    patience = torch.full_like(fewest, _FULL_EXCHANGES)
    rows = torch.arange(n, device=targets.device)
    for _ in range(100 + 10 * s):
        of_free = free[rows]
        both = of_free[:, :, None] & of_free[:, None, :]
        system = torch.where(both, products[rows] + ridge[rows], (identity & ~of_free[:, :, None]).to(products.dtype))
        a = torch.linalg.solve(system, targets[rows] * of_free)
        gradient = targets[rows] - (products[rows] @ a.unsqueeze(2)).squeeze(2)
        limit = bound[rows, None]
        wrong = torch.where(of_free, a < -limit / scale[rows, None], gradient > limit)
        solution[rows] = a.clamp(min=0)
        count = wrong.sum(1)
        open_ = count > 0
        rows, wrong, count = rows[open_], wrong[open_], count[open_]
        if len(rows) == 0:
            break
        better = count < fewest[rows]
        fewest[rows] = torch.where(better, count, fewest[rows])
        patience[rows] = torch.where(better, _FULL_EXCHANGES, patience[rows] - 1)
        last = torch.zeros_like(wrong).scatter_(1, s - 1 - wrong.flip(1).int().argmax(1, keepdim=True), True)
        free[rows] ^= torch.where((patience[rows] >= 0)[:, None], wrong, last)
    return solution
