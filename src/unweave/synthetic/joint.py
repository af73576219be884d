"""Two sets of sparse codes of the same rows, looked at together: what latents do where true features fire."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae import SparseCodes
from unweave.synthetic.forms import to_codes


def as_codes(activations: Tensor | SparseCodes) -> SparseCodes:
    """Activations `(n, width)`, dense, sparse COO or `SparseCodes`, as codes without entries of value 0."""
    if isinstance(activations, SparseCodes):
        return activations.firing()
    if activations.ndim != 2:
        raise UnweaveError(f"activations must have the shape (n, width), got {tuple(activations.shape)}.")
    return to_codes(activations.detach()).firing()


def values_at(codes: SparseCodes, rows: Int64[Tensor, " n"], indices: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The values of codes at some places; 0 where there is no entry, and where the index is negative."""
    if len(codes.indices) == 0:
        return codes.values.new_zeros(len(rows))
    keys = codes.rows * codes.d_sae + codes.indices  # ascending, because rows are and indices within a row are
    wanted = rows * codes.d_sae + indices
    place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return torch.where((keys[place] == wanted) & (indices >= 0), codes.values[place], 0)


def check_same_rows(latents: SparseCodes, features: SparseCodes, n_latents: int, n_features: int) -> None:
    """Refuse codes that are not of the same rows, or not of the expected widths."""
    if latents.n_rows != features.n_rows:
        raise UnweaveError(f"there are codes of {latents.n_rows} samples and true activations of {features.n_rows}.")
    for name, codes, width in (("codes", latents, n_latents), ("true activations", features, n_features)):
        if codes.d_sae != width:
            raise UnweaveError(f"the {name} have a width of {codes.d_sae}, and {width} was expected.")
