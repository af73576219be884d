"""What an evaluation adds up: running float64 sums from which every metric follows.

Nothing per token is kept and no ratio is averaged, so memory stays flat and the size of a batch changes nothing beyond
rounding. Sums of two batches, ranks or files add with `+`. Squares about the mean are combined pairwise (Chan, Golub
and LeVeque 1979), never as `Σ‖x‖² - ‖Σx‖²/N`, which cancels when the mean is large. Sums stay on the device of the
data until they are read, so that a pass waits for no transfer.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from unweave.sae.codes import SparseCodes

NORM_FLOOR = 1e-6
"""Tokens whose norm is not above this are left out of the mean norm ratio."""


def wide(x: Tensor) -> Float64[Tensor, "..."]:
    """In float64, on the same device if that device has it."""
    return (x.cpu() if x.device.type == "mps" else x).detach().double()


def nothing() -> Float64[Tensor, ""]:
    """A sum of no terms; it takes the device of the first term."""
    return torch.zeros((), dtype=torch.float64)


@dataclass(eq=False)
class ReconstructionSums:
    """Sums over tokens of the inputs x, their reconstructions x̂ and the errors x - x̂, in float64."""

    n_tokens: int = 0
    mean: Float64[Tensor, " d_in"] | None = None
    """Mean input; None before the first token."""
    sse_recon: Tensor = field(default_factory=nothing)
    """`Σ‖x - x̂‖²`."""
    sse_baseline: Tensor = field(default_factory=nothing)
    """`Σ‖x - mean‖²`: the error of predicting the mean."""
    sum_sq_out: Tensor = field(default_factory=nothing)
    """`Σ‖x̂‖²`."""
    sum_dot: Tensor = field(default_factory=nothing)
    """`Σ x·x̂`."""
    sum_norm_in: Tensor = field(default_factory=nothing)
    sum_norm_out: Tensor = field(default_factory=nothing)
    sum_cosine: Tensor = field(default_factory=nothing)
    n_cosine: Tensor = field(default_factory=nothing)
    """Tokens of which neither x nor x̂ is zero."""
    sum_ratio: Tensor = field(default_factory=nothing)
    """`Σ ‖x̂‖/‖x‖` over the tokens with `‖x‖ > NORM_FLOOR`."""
    n_ratio: Tensor = field(default_factory=nothing)
    sum_legacy: Tensor = field(default_factory=nothing)
    """`Σ 1 - ‖x - x̂‖²/‖x - batch mean‖²`: the one sum that depends on what a batch is."""
    n_legacy: Tensor = field(default_factory=nothing)

    @classmethod
    def of(cls, x: Float[Tensor, "n d_in"], x_hat: Float[Tensor, "n d_in"]) -> Self:
        """The sums of one batch."""
        if len(x) == 0:
            return cls()
        x, x_hat = wide(x), wide(x_hat)
        dot = torch.linalg.vecdot
        mean = x.mean(0)
        error, centred = x - x_hat, x - mean
        sq_error, sq_centred = dot(error, error), dot(centred, centred)
        sq_in, sq_out, in_out = dot(x, x), dot(x_hat, x_hat), dot(x, x_hat)
        norm_in, norm_out = sq_in.sqrt(), sq_out.sqrt()
        nonzero, long, off_mean = (norm_in > 0) & (norm_out > 0), norm_in > NORM_FLOOR, sq_centred > 0
        return cls(
            n_tokens=len(x),
            mean=mean,
            sse_recon=sq_error.sum(),
            sse_baseline=sq_centred.sum(),
            sum_sq_out=sq_out.sum(),
            sum_dot=in_out.sum(),
            sum_norm_in=norm_in.sum(),
            sum_norm_out=norm_out.sum(),
            sum_cosine=_ratios(in_out, norm_in * norm_out, nonzero),
            n_cosine=nonzero.sum().double(),
            sum_ratio=_ratios(norm_out, norm_in, long),
            n_ratio=long.sum().double(),
            sum_legacy=_ratios(sq_centred - sq_error, sq_centred, off_mean),
            n_legacy=off_mean.sum().double(),
        )

    def update(self, x: Float[Tensor, "n d_in"], x_hat: Float[Tensor, "n d_in"]) -> None:
        """Add a batch of unmasked tokens.

        Args:
            x: Activations, in their raw space.
            x_hat: Their reconstructions.
        """
        self.__dict__.update((self + self.of(x, x_hat)).__dict__)

    def __add__(self, other: ReconstructionSums) -> ReconstructionSums:
        """The sums over the tokens of both."""
        if self.mean is None or other.mean is None:
            return other if self.mean is None else self
        total = ReconstructionSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})
        step, share = other.mean - self.mean, other.n_tokens / total.n_tokens
        total.mean = self.mean + step * share
        total.sse_baseline += torch.dot(step, step) * (self.n_tokens * share)
        return total

    @property
    def d_in(self) -> int:
        return 0 if self.mean is None else len(self.mean)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, from which every ratio can be computed again."""
        mean = [] if self.mean is None else self.mean.tolist()
        sums = {f.name: float(getattr(self, f.name)) for f in fields(self) if f.name not in ("n_tokens", "mean")}
        sum_sq = sums["sse_baseline"] + self.n_tokens * sum(m * m for m in mean)
        return {
            "n_tokens": self.n_tokens,
            "d_in": self.d_in,
            **sums,
            "sum_sq_in": sum_sq,
            "sum_in": [m * self.n_tokens for m in mean],
        }


def _ratios(above: Tensor, below: Tensor, where: Bool[Tensor, " n"]) -> Tensor:
    """Sum of the ratios at the tokens that have one."""
    return torch.where(where, above / torch.where(where, below, 1), 0).sum()


@dataclass(eq=False)
class CodeSums:
    """How often and how strongly each latent fires. A latent fires on a token when its value there is not 0."""

    d_sae: int
    n_tokens: int = 0
    n_prompts: int = 0
    l1: Tensor = field(default_factory=nothing)
    """Sum of all absolute values."""
    n_fired: Int64[Tensor, " d_sae"] | None = None
    """Tokens that each latent fires on; None before the first batch."""
    n_prompts_fired: Int64[Tensor, " d_sae"] | None = None
    """Prompts in which each latent fires at least once."""

    def update(self, codes: SparseCodes, prompts: Int64[Tensor, " n_rows"] | None = None) -> None:
        """Add the codes of a batch of unmasked tokens.

        Args:
            codes: One row for each token.
            prompts: Which of the batch's prompts each row belongs to, counted from 0; None: the batch is one prompt.
        """
        if prompts is None:
            prompts = torch.zeros(codes.n_rows, dtype=torch.int64, device=codes.values.device)
        n_prompts = int(prompts.max()) + 1 if codes.n_rows else 0
        firing = codes.firing()
        fires = torch.zeros(n_prompts, self.d_sae, dtype=torch.bool, device=codes.values.device)
        fires[prompts[firing.rows], firing.indices] = True
        batch = CodeSums(
            self.d_sae,
            n_tokens=codes.n_rows,
            n_prompts=len(prompts.unique()),
            l1=wide(firing.values).abs().sum(),
            n_fired=firing.firing_counts(),
            n_prompts_fired=fires.sum(0),
        )
        self.__dict__.update((self + batch).__dict__)

    def __add__(self, other: CodeSums) -> CodeSums:
        """The sums over the tokens of both; their prompts are different prompts."""
        if self.n_fired is None or other.n_fired is None:
            return other if self.n_fired is None else self
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "d_sae"}
        return CodeSums(self.d_sae, **sums)

    def counts(self) -> Int64[Tensor, " d_sae"]:
        """Tokens that each latent fires on."""
        return self._per_latent(self.n_fired)

    def prompt_counts(self) -> Int64[Tensor, " d_sae"]:
        """Prompts in which each latent fires."""
        return self._per_latent(self.n_prompts_fired)

    def _per_latent(self, counts: Tensor | None) -> Int64[Tensor, " d_sae"]:
        return torch.zeros(self.d_sae, dtype=torch.int64) if counts is None else counts.cpu()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; the counts of each latent are reported per feature."""
        return {
            "d_sae": self.d_sae,
            "n_tokens": self.n_tokens,
            "n_prompts": self.n_prompts,
            "n_firings": int(self.counts().sum()),
            "sum_abs_codes": float(self.l1),
        }
