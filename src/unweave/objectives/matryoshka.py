"""Matryoshka: every prefix of the dictionary has to reconstruct by itself (Bussmann et al., arXiv 2503.17547).

General features settle in the first latents and special ones in the last, so the order of a trained SAE's latents means
something. Goes with every activation function; the codes are chosen over the whole dictionary as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.objectives.reconstruction import squared_error
from unweave.sae import ops
from unweave.sae.codes import Codes, DenseCodes


@dataclass(frozen=True)
class Matryoshka:
    """Which prefixes of the dictionary reconstruct by themselves.

    Attributes:
        prefixes: Ends of the prefixes, ascending: a number up to 1 is a share of d_sae, a larger one a number of
            latents. The whole dictionary is always the last prefix and may be left out. The default cuts it into
            groups of 1/32, 1/16, 1/8, 1/4 and 17/32.
    """

    prefixes: tuple[float, ...] = (1 / 32, 3 / 32, 7 / 32, 15 / 32)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefixes", tuple(self.prefixes))
        for p in self.prefixes:
            if not p > 0 or (p > 1 and p % 1):
                raise UnweaveError(f"a prefix is a share of d_sae up to 1 or a whole number of latents, got {p}.")

    def widths_for(self, d_sae: int) -> tuple[int, ...]:
        """Width of each prefix, ascending, the last `d_sae`. Prefixes that come to the same width count once.

        Raises:
            UnweaveError: If a prefix is wider than the dictionary, or narrower than the one before.
        """
        ends = [int(p) if p > 1 else max(1, round(p * d_sae)) for p in self.prefixes]
        if ends != sorted(ends):
            raise UnweaveError(f"Matryoshka prefixes must ascend, got the widths {ends} at d_sae={d_sae}.")
        if ends and ends[-1] > d_sae:
            raise UnweaveError(f"a Matryoshka prefix of {ends[-1]} latents is wider than the SAE, d_sae={d_sae}.")
        return tuple(dict.fromkeys([*ends, d_sae]))


@dataclass(frozen=True)
class RandomMatryoshka:
    """Prefixes that are drawn anew at every step. Two laws are published, both under the name Pareto.

    Attributes:
        prefixes: Number of prefixes, the whole dictionary included. Equal ones count once.
        law: "sqrt": P(width <= l) = sqrt(l / d_sae), the Matryoshka authors' code; half of the prefixes hold at least a
            quarter of the latents. "inverse_sqrt": P(width <= l) = 1 - 1 / sqrt(l), all different, as in saev; half of
            them hold at most about ten latents.
    """

    prefixes: int = 10
    law: Literal["sqrt", "inverse_sqrt"] = "sqrt"

    def __post_init__(self) -> None:
        if self.prefixes < 2:
            raise UnweaveError(f"RandomMatryoshka needs at least 2 prefixes, got {self.prefixes}.")
        if self.law not in ("sqrt", "inverse_sqrt"):
            raise UnweaveError(f"the law of random prefixes is 'sqrt' or 'inverse_sqrt', got {self.law!r}.")

    def check(self, d_sae: int) -> None:
        """Raise an UnweaveError if there are not as many different prefixes."""
        if self.prefixes > d_sae - (self.law == "inverse_sqrt"):
            raise UnweaveError(f"there are no {self.prefixes} different random prefixes at d_sae={d_sae}.")

    def draw(self, d_sae: int, generator: torch.Generator) -> tuple[int, ...]:
        """Width of each prefix of a step, ascending, the last `d_sae`."""
        widths: dict[int, None] = {}
        n = self.prefixes - 1
        if self.law == "sqrt":
            u = torch.rand(n, generator=generator, dtype=torch.float64)
            drawn = (d_sae * u.square()).ceil().clamp(1, d_sae).long().tolist()
            return tuple(sorted({*drawn, d_sae}))
        # Drawing without replacement is drawing until enough different widths below d_sae came up.
        below = 1 - (d_sae - 1) ** -0.5
        while len(widths) < n:
            u = torch.rand(4 * n, generator=generator, dtype=torch.float64) * below
            drawn = (1 - u).pow(-2).ceil().clamp(2, d_sae - 1).long().tolist()
            widths |= dict.fromkeys(drawn)
        return tuple(sorted([*list(widths)[:n], d_sae]))


def matryoshka_error(
    codes: Codes,
    W_dec: Float[Tensor, "d_sae d"],
    b_dec: Float[Tensor, " d"],
    x: Float[Tensor, "n d"],
    widths: Sequence[int],
    weights: Float[Tensor, "..."] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n d"]]:
    """`mean over prefixes of the squared error of b_dec + codes[:, :width] @ W_dec[:width]`.

    The mean keeps the loss at the scale of one reconstruction, however many prefixes there are. Each block of latents
    is decoded once; a running sum over the blocks gives the prefixes.

    Args:
        codes: Codes of the whole dictionary.
        W_dec: Decoder.
        b_dec: Decoder bias.
        x: Inputs.
        widths: Width of each prefix, ascending, the last `d_sae`.
        weights: Of each token's error; see `error_weights`.

    Returns:
        The loss, and the reconstruction of the whole dictionary.
    """
    error, x_hat = x.new_zeros(()), b_dec
    for block in _blocks(codes, W_dec, widths):
        x_hat = x_hat + block
        error = error + squared_error(x_hat, x, weights)
    return error / len(widths), x_hat


def _blocks(codes: Codes, W_dec: Tensor, widths: Sequence[int]) -> Iterator[Float[Tensor, "n d"]]:
    """What each block of latents adds to the reconstruction."""
    if isinstance(codes, DenseCodes):
        return (codes.values[:, a:b] @ W_dec[a:b] for a, b in pairwise((0, *widths)))
    return iter(ops.decode(codes.cut(widths), W_dec).unflatten(0, (-1, len(widths))).unbind(1))
