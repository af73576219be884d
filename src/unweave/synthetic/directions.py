"""Directions in a space: their cosines, and how to spread them, orthogonal or no nearer to each other than a bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.synthetic.arguments import require_count, require_number

BLOCK_ELEMENTS = 2**25  # of a block of cosines, 128 MiB in float32
TIGHT = 1e-6  # how far above its least value, as a share of it, the sum of squared cosines may end


def cosine_similarities(mat1: Float[Tensor, "n d"], mat2: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """The cosine of every row of one matrix with every row of another; 0 where a row is 0.

    Raises:
        UnweaveError: If they are not two matrices of equal width.
    """
    if mat1.ndim != 2 or mat2.ndim != 2 or mat1.shape[1] != mat2.shape[1]:
        raise UnweaveError(
            f"cosines are between the rows of two matrices of equal width, got mat1 of shape {tuple(mat1.shape)} and "
            f"mat2 of shape {tuple(mat2.shape)}."
        )
    return (unit_rows(mat1) @ unit_rows(mat2).T).clamp(-1, 1)


def unit_rows(matrix: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The rows at norm 1, in float32 at least; rows of 0 stay 0."""
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    norms = torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
    if not ((norms > 1e-15) & (norms < 1e15)).all():  # squares of such rows' entries may vanish or overflow
        matrix = matrix / _nonzero(torch.linalg.vector_norm(matrix, math.inf, dim=1, keepdim=True))
        norms = torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
    return matrix / _nonzero(norms)


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1, x)


@torch.no_grad()
def normalize_rows_(matrix: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """`unit_rows` in place, and with little memory beside it."""
    for rows in matrix.split(2**11):
        rows.copy_(unit_rows(rows))
    return matrix


def directions_of(
    name: str, matrix: Float[Tensor, "n d"], device: torch.device | str | None = None
) -> Float[Tensor, "n d"]:
    """`unit_rows` as a copy outside any graph, in the memory of that copy alone; on another device if asked.

    Raises:
        UnweaveError: If it is no matrix with rows, or a row is 0 or not finite. The message calls the matrix `name`.
    """
    if matrix.ndim != 2 or not matrix.numel():
        raise UnweaveError(f"{name} must be a matrix with rows, got the shape {tuple(matrix.shape)}.")
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    vectors = normalize_rows_(matrix.detach().to(device or matrix.device, dtype, copy=True))
    wrong = (~(torch.linalg.vector_norm(vectors, dim=1) > 0.5)).nonzero()  # 0, or NaN
    if len(wrong):
        raise UnweaveError(f"{name} must be finite and not 0 in every row, and row {int(wrong[0])} is not.")
    return vectors


def blocks(n_rows: int, n_columns: int, chunk_size: int) -> Iterator[slice]:
    """Ranges of at most `chunk_size` rows, fewer where a block of them would exceed `BLOCK_ELEMENTS`."""
    size = max(1, min(chunk_size, BLOCK_ELEMENTS // max(n_columns, 1)))
    return (slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size))


@torch.no_grad()
def orthogonalize_embeddings(
    embeddings: Float[Tensor, "n d"],
    num_steps: int = 200,
    lr: float = 0.01,
    show_progress: bool = False,
    chunk_size: int = 1024,
) -> Float[Tensor, "n d"]:
    """Rows of norm 1 that are as orthogonal as the space allows.

    Up to `n = d` rows are made exactly orthogonal, by a QR decomposition in which each keeps its side (Gram-Schmidt).
    More cannot be: they take steps of Adam on `sum_{i != j} (v_i · v_j)^2 + n sum_i (|v_i|^2 - 1)^2`, until the squared
    cosines sum to no more than a millionth above `n^2 / d`, the least that is possible. The gradient needs no cosines
    but only the d × d matrix of second moments `V.T @ V`, so a step costs `4 n d^2` operations rather than some
    `6 n^2 d`, and three copies of the embeddings are all the memory.

    Args:
        embeddings: The rows to start from, none of them 0; not modified.
        num_steps: Largest number of steps, at least 1.
        lr: Learning rate of Adam, above 0.
        show_progress: Whether to draw a progress bar.
        chunk_size: Rows updated at a time. It changes nothing but speed.

    Returns:
        `(n, d)`, in float32 at least, outside any graph.

    Raises:
        UnweaveError: If an argument is out of range, or a row is 0 or not finite.
    """
    require_count("num_steps", num_steps)
    require_number("lr", lr, above=0)
    require_count("chunk_size", chunk_size)
    vectors = directions_of("embeddings", embeddings)
    n, d = vectors.shape
    if n <= d:
        q, r = torch.linalg.qr(vectors.T)
        return (q * torch.where(r.diagonal() < 0, -1, 1)).T.contiguous()
    mean, square = torch.zeros_like(vectors), torch.zeros_like(vectors)
    for step in _progress(range(1, num_steps + 1), "orthogonalising", show_progress):
        moments = vectors.T @ vectors
        # Never below 0, and 0 for a tight frame, in which the cosines are as small as they get in sum.
        if d * moments.double().square().sum() / moments.trace().double() ** 2 - 1 <= TIGHT:
            break
        for rows in blocks(n, d, chunk_size):
            v = vectors[rows]
            norms = v.square().sum(1, keepdim=True)
            grad = torch.addmm((n * (norms - 1) - norms) * v, v, moments).mul_(4)
            mean[rows].lerp_(grad, 1 - 0.9)
            square[rows].mul_(0.999).addcmul_(grad, grad, value=1 - 0.999)
            scale = square[rows].sqrt().div_(math.sqrt(1 - 0.999**step)).add_(1e-8)
            v.addcdiv_(mean[rows], scale, value=-lr / (1 - 0.9**step))
    return normalize_rows_(vectors)


@torch.no_grad()
def bound_cosines(
    embeddings: Float[Tensor, "n d"],
    max_cosine: float,
    num_steps: int = 500,
    show_progress: bool = False,
    chunk_size: int = 1024,
) -> Float[Tensor, "n d"]:
    """Rows of norm 1 of which no two have a cosine above `max_cosine` in absolute value.

    Rows that come too near to others are pushed away from them, again and again until none is left. Each pass computes
    all cosines, block by block.

    Args:
        embeddings: The rows to start from, none of them 0; not modified.
        max_cosine: The bound, at most 1. Of more than d rows, some two are always as near as
            `sqrt((n - d) / (d (n - 1)))` (Welch 1974), and what can be reached lies well above that.
        num_steps: Passes after which to give up.
        show_progress: Whether to draw a progress bar.
        chunk_size: Rows moved at a time, fewer where a block of their cosines would exceed 128 MiB.

    Returns:
        `(n, d)`, in float32 at least, outside any graph.

    Raises:
        UnweaveError: If an argument is out of range, a row is 0 or not finite, or the bound is not reached.
    """
    require_number("max_cosine", max_cosine, least=0, most=1)
    require_count("num_steps", num_steps)
    require_count("chunk_size", chunk_size)
    vectors = directions_of("embeddings", embeddings)
    n, d = vectors.shape
    welch = math.sqrt(max(n - d, 0) / (d * max(n - 1, 1)))
    if max_cosine < welch:
        raise UnweaveError(
            f"max_cosine={max_cosine} is impossible: among {n} vectors in {d} dimensions some two have a cosine of at "
            f"least {welch:.4f}."
        )
    if n <= d and max_cosine < 1e-3:  # nearer to 0 than passes get quickly
        return orthogonalize_embeddings(vectors)
    aim = 0.99 * max_cosine  # so that rows which meet again soon stay below the bound
    for _ in _progress(range(num_steps), "bounding cosines", show_progress):
        largest = 0.0
        for rows in blocks(n, n, chunk_size):
            cosines = vectors[rows] @ vectors.T
            cosines.diagonal(rows.start).zero_()
            worst = float(cosines.abs().max())
            largest = max(largest, worst)
            if worst <= max_cosine:
                continue
            excess = cosines - cosines.clamp(-aim, aim)
            # The largest eigenvalue of the second moments of k random directions is near (1 + sqrt(k / d))^2, and a
            # step of more than its inverse would overshoot.
            crowd = 1 + ((excess != 0).sum(1, keepdim=True) / d).sqrt()
            vectors[rows] = unit_rows(vectors[rows] - (excess @ vectors) / crowd.square())
        if largest <= max_cosine:  # then nothing has moved in this pass, so it has seen every pair as it is
            return vectors
    raise UnweaveError(
        f"max_cosine={max_cosine} was not reached in num_steps={num_steps} for {n} vectors in {d} dimensions: the "
        f"largest is {largest:.4f}."
    )


def _progress(steps: Iterable[int], description: str, show: bool) -> Iterable[int]:
    if not show:
        return steps
    from rich.progress import track

    return track(steps, description)
