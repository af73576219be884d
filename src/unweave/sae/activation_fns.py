"""The activation functions: which pre-activations become codes, in training and in inference.

Each is a small frozen dataclass (see `unweave.sae.activation`). Inference is always a function of one token alone.
Thresholds live on the SAE, in float32, and are compared strictly: a latent is active for `pre > threshold`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.kernels import Above, Largest, LargestOfBatch, LargestOfGroups, Spec
from unweave.sae.activation import Activation, Threshold, register_activation
from unweave.sae.codes import Codes

if TYPE_CHECKING:
    from unweave.sae.sae import SAE

AnyCodes = TypeVar("AnyCodes", bound=Codes)


@register_activation
@dataclass(frozen=True)
class ReLU(Activation):
    """Every positive pre-activation. Goes with an L1 penalty (Bricken et al. 2023; Anthropic, April 2024)."""

    name: ClassVar[str] = "relu"
    free_norms: ClassVar[bool] = True
    default_sparsity: ClassVar[str | None] = "l1"

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        return Above(0.0)


@register_activation
@dataclass(frozen=True)
class TanhReLU(Activation):
    """`tanh(relu(pre))`: codes between 0 and 1, so a latent's strength is in its decoder norm.

    As in early SAELens runs. Codes saturate, so decoder norms stay free and are not folded.
    """

    name: ClassVar[str] = "tanhrelu"
    free_norms: ClassVar[bool] = True
    scales: ClassVar[bool] = False
    default_sparsity: ClassVar[str | None] = "l1"

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        return Above(0.0)

    def apply(self, pre: Codes, threshold: Threshold) -> Codes:
        return pre.with_values(pre.values.relu().tanh())


class _Ranked(Activation):
    """The k strongest latents of each token."""

    k: int
    ranked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k < 1 or self.k % 1:
            raise UnweaveError(f"{type(self).__name__} needs a whole k of at least 1, got k={self.k}.")
        object.__setattr__(self, "k", int(self.k))  # 4.0 is meant as 4

    def with_k(self, k: float) -> Any:
        return dataclasses.replace(cast(Any, self), k=round(k))

    def strongest(self, values: Float[Tensor, " nnz"], n_rows: int) -> Bool[Tensor, " nnz"]:
        """Which entries of a selection with a larger k, row after row, this k would have selected."""
        values = (values.abs() if self.signed else values).view(n_rows, -1)
        best = values.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        return torch.zeros_like(values, dtype=torch.bool).scatter_(1, best, True).flatten()


@register_activation
@dataclass(frozen=True)
class TopK(_Ranked):
    """The `k` largest pre-activations of each token; those at or below 0 become 0 (Gao et al., arXiv 2406.04093)."""

    k: int = 32
    name: ClassVar[str] = "topk"
    widens: ClassVar[bool] = True

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        return Largest(self.k)


@register_activation
@dataclass(frozen=True)
class RawTopK(_Ranked):
    """The `k` largest pre-activations of each token, kept as they are where fewer than k are above 0 (saev's TopK)."""

    k: int = 32
    name: ClassVar[str] = "rawtopk"
    signed: ClassVar[bool] = True

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        return Largest(self.k)

    def apply(self, pre: Codes, threshold: Threshold) -> Codes:
        return pre


@register_activation
@dataclass(frozen=True)
class AbsTopK(_Ranked):
    """The `k` pre-activations of largest magnitude of each token, with their signs (arXiv 2510.00404).

    A latent stands for two opposite directions, so equal widths are not equal capacities.
    """

    k: int = 32
    name: ClassVar[str] = "abstopk"
    signed: ClassVar[bool] = True
    widens: ClassVar[bool] = True

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        return Largest(self.k, magnitude=True)

    def apply(self, pre: Codes, threshold: Threshold) -> Codes:
        return pre


@register_activation
@dataclass(frozen=True)
class GroupMax(_Ranked):
    """The largest pre-activation of each of `k` groups of `d_sae / k` neighbouring latents, if positive (sparsify).

    No sorting, and exactly k candidates a token; two features of one group exclude each other.
    """

    k: int = 32
    name: ClassVar[str] = "groupmax"

    def check(self, d_sae: int) -> None:
        if d_sae % self.k:
            raise UnweaveError(f"GroupMax needs a d_sae that k={self.k} groups divide, got d_sae={d_sae}.")

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        return LargestOfGroups(self.k)

    def with_k(self, k: float) -> Any:
        raise UnweaveError("GroupMax's k is its number of groups, which cannot change from step to step.")


@register_activation
@dataclass(frozen=True)
class BatchTopK(Activation):
    """The `k * n` largest pre-activations of a batch of n tokens (Bussmann et al., arXiv 2412.06410).

    Inference compares with a calibrated threshold instead, so that a token's code does not depend on its neighbours.

    Attributes:
        k: Active latents per token on average; need not be whole.
    """

    k: float = 32
    name: ClassVar[str] = "batchtopk"
    ranked: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    widens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise UnweaveError(f"BatchTopK needs k above 0, got k={self.k}.")

    @property
    def threshold_shape(self) -> Literal["scalar"]:
        return "scalar"

    def with_k(self, k: float) -> BatchTopK:
        return dataclasses.replace(self, k=k)

    def budget(self, n_rows: int) -> int:
        """Entries that a batch of `n_rows` tokens keeps, at least 1."""
        return max(1, round(self.k * n_rows))

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        # The last batches' threshold is the best guess of this one's; NaN before the first.
        known = threshold is not None and not threshold.isnan()
        return LargestOfBatch(self.budget(n_rows), hint=0.95 * float(threshold) if known else None)  # type: ignore[arg-type]

    def strongest(self, values: Float[Tensor, " nnz"], n_rows: int) -> Bool[Tensor, " nnz"]:
        """Which entries of a selection with a larger k, row after row, this k would have selected."""
        budget = self.budget(n_rows)
        if len(values) <= budget:
            return torch.ones_like(values, dtype=torch.bool)
        bound = values.topk(budget, sorted=False).values.amin()
        above, tied = values > bound, values == bound
        return above | (tied & (tied.cumsum(0) <= budget - above.sum()))  # ties go to the first, as in the selection

    def inference(self, threshold: Threshold) -> Spec:
        if threshold is None or threshold.isnan():
            raise UnweaveError(
                "this BatchTopK SAE has no threshold yet, which its inference form compares pre-activations with: "
                "calibrate it first (training does so at its end)."
            )
        return Above(float(threshold.clamp(min=0)))


@register_activation
@dataclass(frozen=True)
class Gated(Activation):
    """A gate chooses the latents, their own gain and bias give the codes (Rajamanoharan et al., arXiv 2404.16014).

        u = (x - b_dec) @ W_enc     gate = u + b_gate     code = relu(exp(r_mag) * u + b_mag) where gate > 0

    The pre-activation is the gate's; the SAE keeps `b_gate` as its `b_enc`, and `r_mag` and `b_mag` beside it. The
    codes are elementwise functions of the gate, so the encoder product is the only one. The gate itself learns from
    its own two losses alone (see `unweave.objectives.gated`).
    """

    name: ClassVar[str] = "gated"
    default_sparsity: ClassVar[str | None] = "l1"

    def parameters(self, d_sae: int) -> dict[str, Tensor]:
        return {"r_mag": torch.zeros(d_sae), "b_mag": torch.zeros(d_sae)}

    def selection(self, threshold: Threshold, n_rows: int) -> Spec:
        return Above(0.0)

    def codes(self, pre: Codes, sae: SAE) -> Codes:
        return self.magnitudes(pre, sae.b_enc, sae.r_mag, sae.b_mag)

    def magnitudes(self, pre: AnyCodes, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> AnyCodes:
        """The codes at the entries of the gate's pre-activations, 0 where the gate is closed; parameters `(d_sae,)`."""
        gain = r_mag.exp()
        magnitudes = (pre.values * pre.at(gain) + pre.at(b_mag - gain * b_gate)).relu()
        return cast(AnyCodes, pre.with_values(magnitudes * (pre.values > 0)))

    @torch.no_grad()
    def scale_parameters(self, sae: SAE, factor: Float[Tensor, " d_sae"]) -> None:
        sae.b_mag.mul_(factor)  # r_mag is a factor, the same in every unit

    @torch.no_grad()
    def shift_parameters(self, sae: SAE, shift: Float[Tensor, " d_sae"]) -> None:
        sae.b_mag.sub_(shift * sae.r_mag.exp())
