"""Greedy sparse approximation of rows by the atoms of a dictionary: which atoms, in which order, how strongly.

    r_0 = x     i_s = argmax_i r_s . w_i     v_s = relu(r_s . w_(i_s))     r_(s+1) = r_s - v_s w_(i_s)

Finding the best atom is the only dense work. It takes a product with the whole dictionary for each step, or one product
in all and the dictionary's Gram matrix, whichever is less. Nothing here knows what an SAE is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from unweave import kernels
from unweave._errors import UnweaveError
from unweave.kernels import cpu
from unweave.kernels.dispatch import backend
from unweave.sae.codes import SparseCodes

GRAM_BYTES = 2**31
"""Largest Gram matrix that is made."""
_CACHED = 2**19
"""Correlations that are worked on at once on a CPU: they and as many entries of the Gram matrix stay in its cache."""
PART_ROWS = 512
"""Rows whose chosen atoms are always held at once."""
_SCREENED = 0.25
"""Cost of a product that only screens (compiled kernels), in units of one that keeps everything in fp32."""
_GRAM_STEP = 64
"""Width of the product that costs as much as a step with the Gram matrix, which moves memory and hardly computes."""


class Steps(NamedTuple):
    """What a pursuit chose, step by step."""

    indices: Int64[Tensor, "n k"]
    values: Float[Tensor, "n k"]
    """Positive until a row's pursuit stops, 0 from there on."""


class ByProducts:
    """Finds the best atoms by a product with the whole dictionary, of which only the largest entries are kept."""

    def __init__(self, atoms: Float[Tensor, "m d"]) -> None:
        self.atoms, self.bias, self.screen = atoms, atoms.new_zeros(len(atoms)), None
        if backend("encode_select", atoms) == "cpu":
            self.screen = kernels.Screen.room_for(atoms, "auto")
            cpu.make_images(atoms, self.screen.images)

    def best(self, residual: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
        """The atom of the largest product with each row's residual, the first of equals."""
        if len(residual) * len(self.atoms) <= _CACHED:
            return (residual @ self.atoms.T).argmax(1)  # what selection saves is less than what its calls cost
        largest = kernels.Largest(1)
        return kernels.encode_select(residual, self.atoms.T, self.bias, largest, screen=self.screen).indices

    def subtract(self, indices: Int64[Tensor, " n"], values: Float[Tensor, " n"]) -> None:
        """Take note that each row's residual has lost this multiple of this atom."""

    def keep(self, rows: Int64[Tensor, " m"]) -> None:
        """Go on with these rows alone."""


class ByGram:
    """Finds the best atoms from correlations that lose a multiple of a row of the Gram matrix at each step."""

    def __init__(self, x: Float[Tensor, "n d"], atoms: Float[Tensor, "m d"], gram: Float[Tensor, "m m"]) -> None:
        self.gram, self.m, self.block = gram, len(atoms), max(1, round(len(atoms) ** 0.5))
        self.correlations = x.new_full((len(x), -(-self.m // self.block) * self.block), -torch.inf)
        self.correlations[:, : self.m] = x @ atoms.T

    def best(self, residual: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
        # The block with the largest maximum, then the place in it: a plain argmax takes six times as long on a CPU.
        blocks = self.correlations.unflatten(1, (-1, self.block))
        best = blocks.amax(2).argmax(1)
        return best * self.block + blocks[torch.arange(len(best), device=best.device), best].argmax(1)

    def subtract(self, indices: Int64[Tensor, " n"], values: Float[Tensor, " n"]) -> None:
        offsets = torch.arange(len(indices) + 1, device=indices.device)
        self.correlations[:, : self.m] -= kernels.gather_sum(indices, values, offsets, self.gram)

    def keep(self, rows: Int64[Tensor, " m"]) -> None:
        self.correlations = self.correlations[rows]


def gram_matrix(atoms: Float[Tensor, "m d"]) -> Float[Tensor, "m m"]:
    """`atoms @ atoms.T`, whose lower half is a copy of the upper."""
    m, block = len(atoms), 2048
    gram = atoms.new_empty(m, m)
    for start in range(0, m, block):
        stop = min(start + block, m)
        torch.mm(atoms[start:stop], atoms[start:].T, out=gram[start:stop, start:])
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


def gram_pays(n: int, k: int, atoms: Float[Tensor, "m d"]) -> bool:
    """Whether a Gram matrix and one product cost less than `k` products with `n` rows, and it is not too large."""
    m, d = atoms.shape
    product = _SCREENED if backend("encode_select", atoms) == "cpu" else 1.0
    pays = n * (d + _GRAM_STEP * k) + m * d / 2 < n * k * d * product
    return pays and m * m * atoms.element_size() <= GRAM_BYTES


@torch.no_grad()
def pursue(
    x: Float[Tensor, "n d"],
    atoms: Float[Tensor, "m d"],
    k: int,
    *,
    residual_threshold: float = 0.0,
    stop_at_repeat: bool = True,
    gram: bool | None = None,
) -> Steps:
    """The greedy approximation of each row.

    A row's pursuit stops after `k` steps, when no atom correlates positively with its residual, when the residual's
    norm falls below a threshold, or after an atom that it has chosen before.

    Args:
        x: The rows.
        atoms: The dictionary.
        k: Most steps.
        residual_threshold: Norm of the residual below which a row stops; 0 for none.
        stop_at_repeat: Whether a row stops after the step that chooses an atom again.
        gram: Whether to use the Gram matrix; None: where it pays.

    Raises:
        UnweaveError: If a value is NaN or infinite.
    """
    x, atoms = x.detach(), atoms.detach().contiguous()
    stops = residual_threshold, stop_at_repeat
    if gram_pays(len(x), k, atoms) if gram is None else gram:
        G, at_once = gram_matrix(atoms), _CACHED if x.device.type == "cpu" else GRAM_BYTES // 8
        parts = x.split(max(1, at_once // len(atoms)))
        made = [_pursue(part, atoms, k, ByGram(part, atoms, G), *stops) for part in parts]
        steps = Steps(*(torch.cat(columns) for columns in zip(*made, strict=True)))
    else:
        steps = _pursue(x, atoms, k, ByProducts(atoms), *stops)
    check_finite(steps.values)  # whatever is not finite in a row or in an atom is chosen and ends up here
    return steps


def check_finite(*tensors: Tensor) -> None:
    """Refuse to go on with values that are NaN or infinite.

    Raises:
        UnweaveError: If there are any.
    """
    if not all(t.isfinite().all() for t in tensors):
        raise UnweaveError("pursuit: the inputs or the dictionary hold values that are NaN or infinite.")


def _pursue(
    x: Tensor, atoms: Tensor, k: int, search: ByProducts | ByGram, residual_threshold: float, stop_at_repeat: bool
) -> Steps:
    indices = torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
    values = x.new_zeros(len(x), k)
    rows, residual = torch.arange(len(x), device=x.device), x
    for step in range(k):
        if len(rows) == 0:
            break
        chosen = search.best(residual)
        atom = atoms[chosen]
        value = torch.linalg.vecdot(residual, atom).relu()
        residual = torch.addcmul(residual, atom, value[:, None], value=-1)
        going = value > 0
        if stop_at_repeat:
            going &= ~(indices[rows, :step] == chosen[:, None]).any(1)
        if residual_threshold > 0:
            going &= residual.norm(dim=1) >= residual_threshold
        indices[rows, step], values[rows, step] = chosen, value
        if step + 1 < k:
            search.subtract(chosen, value)
            left = going.nonzero().flatten()
            if len(left) < len(rows):
                rows, residual = rows[left], residual[left]
                search.keep(left)
    return Steps(indices, values)


def codes_of(steps: Steps, m: int) -> SparseCodes:
    """The codes that a pursuit has made, with gradients for its values; atoms chosen twice are summed up."""
    indices, values = steps
    rows, step = (values > 0).nonzero(as_tuple=True)
    place, order = (rows * m + indices[rows, step]).sort(stable=True)
    entries, counts = place.unique_consecutive(return_counts=True)
    values = values[rows, step][order]
    if len(entries) < len(place):
        values = torch.segment_reduce(values, "sum", lengths=counts)
    return SparseCodes.from_entries(entries // m, entries % m, values, len(indices), m)


def with_gradient(x: Float[Tensor, "n d"], atoms: Float[Tensor, "m d"], steps: Steps) -> Steps:
    """Give the values of a pursuit, already made, their gradients for the rows and for the atoms.

    Which atoms are chosen is taken as given. Of the steps of a row the values solve `(1 + L) v = W x`, with `W` the
    chosen atoms and `L` the lower triangle of `W @ W.T`, so the gradient of the right side is one triangular solve.
    """
    return steps._replace(values=_Values.apply(x, atoms, *steps))


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, atoms: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(x, atoms, indices, values)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, atoms, indices, values = ctx.saved_tensors
        grad = grad * (values > 0)
        (n, k), m = indices.shape, len(atoms)
        grad_x, grad_atoms = torch.empty_like(x), torch.zeros_like(atoms)
        rows = max(PART_ROWS, m // k)  # so that the chosen atoms take no more memory than a dictionary does
        for part in (slice(start, start + rows) for start in range(0, n, rows)):
            chosen, v = atoms[indices[part]], values[part]
            products = chosen @ chosen.mT
            system = products.triu(1) + torch.eye(k, dtype=x.dtype, device=x.device)
            u = torch.linalg.solve_triangular(system, grad[part].unsqueeze(2), upper=True, unitriangular=True)
            grad_x[part] = (chosen.mT @ u).squeeze(2)
            # Atom s enters its own value, where it meets the residual, and the residuals of the steps after it.
            pairs = (u * v[:, None, :]).tril(-1) + (v[:, :, None] * u.mT).triu(1)
            of_steps = torch.baddbmm(u * x[part, None, :], pairs, chosen, alpha=-1).flatten(0, 1)
            ones, offsets = of_steps.new_ones(len(of_steps)), torch.arange(len(of_steps) + 1, device=x.device)
            grad_atoms += kernels.scatter_outer(indices[part].flatten(), ones, offsets, of_steps, m)
        return grad_x, grad_atoms, None, None
