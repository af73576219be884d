"""A term that makes the first latents tell which tokens are neighbours (Bhalla et al., arXiv 2511.05541)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from unweave._errors import UnweaveError
from unweave.objectives.penalty import Penalty, register_penalty
from unweave.sae import SAE
from unweave.sae.codes import Codes, DenseCodes, SparseCodes


@register_penalty
@dataclass(frozen=True)
class Contrastive(Penalty):
    """How badly the first latents of a token pick out its neighbour among the neighbours of all tokens of the batch.

    Rows 2i and 2i + 1 of a batch are neighbouring tokens of one text. With `f` the first latents' codes of the one and
    `g` those of the other, it is the cross-entropy of `f_i . g_j` with the label j = i, meant over both directions.
    Published with BatchTopK, and with a Matryoshka prefix of the same share of the latents.

    Attributes:
        coefficient: Multiplies the term, for inputs scaled to a mean squared norm of d_in. None: `0.1 * d_in`, which is
            the published 0.1 at a mean squared norm of 1.
        share: Share of the latents, the first ones, that it looks at.
        similarity: "dot": products of codes at a mean squared norm of 1, as in the authors' code; "cosine": cosines, as
            in their text.
    """

    coefficient: float | None = None
    share: float = 0.2
    similarity: Literal["dot", "cosine"] = "dot"
    name: ClassVar[str] = "contrastive"
    decides_l0: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise UnweaveError(f"Contrastive looks at a share of the latents above 0 and up to 1, got {self.share}.")
        if self.similarity not in ("dot", "cosine"):
            raise UnweaveError(f"Contrastive's similarity is 'dot' or 'cosine', got {self.similarity!r}.")

    def coefficient_for(self, d_in: int) -> float:
        """The coefficient at a width."""
        return 0.1 * d_in if self.coefficient is None else self.coefficient

    def __call__(self, pre: Codes, codes: Codes, sae: SAE) -> Float[Tensor, ""]:
        if codes.n_rows % 2:
            raise UnweaveError(f"Contrastive takes batches of pairs of rows, and got {codes.n_rows} rows.")
        f, g = _first(codes, max(1, round(self.share * codes.d_sae))).unflatten(0, (-1, 2)).unbind(1)
        logits = normalize(f, dim=1) @ normalize(g, dim=1).T if self.similarity == "cosine" else f @ g.T / sae.d_in
        labels = torch.arange(len(logits), device=logits.device)
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def _first(codes: Codes, width: int) -> Float[Tensor, "n width"]:
    """The codes of the first latents, dense."""
    if isinstance(codes, DenseCodes):
        return codes.values[:, :width]
    found = codes.where(codes.indices < width)
    return SparseCodes(found.indices, found.values, found.offsets, width).to_dense()
