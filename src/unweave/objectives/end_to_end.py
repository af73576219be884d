"""What an SAE does to the model that it is spliced into, as losses (Braun et al., arXiv 2405.12241).

Logits count where the token that they predict is one of the unmasked ones. The direction of the divergence is that of
evaluation: p is the clean model, q the spliced one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from unweave._errors import UnweaveError


@dataclass(frozen=True)
class EndToEnd:
    """Losses of the spliced model, in place of the reconstruction's squared error.

    With `beta`, as in fine-tuning after an ordinary training: `(error + a * beta * kl) / (1 + beta)`, where the factor
    `a`, without a gradient, gives the divergence the size of the error (arXiv 2503.17272; Gemma Scope 2). Without it
    the terms add up, each times its coefficient.

    Attributes:
        beta: Weight of the balanced divergence. None: a sum of those terms that have a coefficient, or 1 if none has.
        kl: Coefficient of the divergence from the clean model, per nat and relative to the width of the output.
        ce: Coefficient of the next token's cross-entropy, likewise.
        error: Coefficient of the squared error of the reconstruction.
        downstream: Coefficient of the squared error at later hooks, averaged over them, each relative to its variance
            and then to that width.
        hooks: Those later hooks.
    """

    beta: float | None = None
    kl: float = 0.0
    ce: float = 0.0
    error: float = 0.0
    downstream: float = 0.0
    hooks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "hooks", tuple(self.hooks))
        terms = (self.kl, self.ce, self.error, self.downstream)
        if self.beta is None and not any(terms):
            object.__setattr__(self, "beta", 1.0)
        if min(terms) < 0 or (self.beta is not None and not self.beta > 0):
            raise UnweaveError(f"EndToEnd needs coefficients of at least 0 and beta > 0, got {self}.")
        if self.beta is not None and (self.kl or self.error):
            raise UnweaveError("beta balances the divergence and the error: leave out kl and error, or give beta=None.")
        if self.beta is None and max(self.kl, self.ce, self.downstream) == 0:
            raise UnweaveError("EndToEnd without beta needs a coefficient of kl, ce or downstream.")
        if (self.downstream > 0) != bool(self.hooks):
            raise UnweaveError("the downstream error needs a coefficient and the later hooks that it is measured at.")


def counted(mask: Bool[Tensor, "prompts context"]) -> Bool[Tensor, "prompts context"]:
    """Positions whose prediction counts: their next token is unmasked."""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)


def kl_loss(
    clean: Float[Tensor, "prompts context vocab"],
    spliced: Float[Tensor, "prompts context vocab"],
    mask: Bool[Tensor, "prompts context"],
) -> Float[Tensor, ""]:
    """`mean over counted positions of sum of p * (log p - log q)`, in nats, from log-softmax in float32 or wider.

    Args:
        clean: Logits of the unchanged model; they get no gradient.
        spliced: Logits with the reconstruction in place.
        mask: True on unmasked tokens.
    """
    at = counted(mask)
    dtype = torch.promote_types(spliced.dtype, torch.float32)
    log_p, log_q = (log_softmax(logits[at].to(dtype), -1) for logits in (clean.detach(), spliced))
    # An impossible token has p log p = 0, not NaN.
    terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p.clamp(min=torch.finfo(dtype).min) - log_q))
    return terms.sum() / max(len(terms), 1)


def ce_loss(
    spliced: Float[Tensor, "prompts context vocab"],
    ids: Int64[Tensor, "prompts context"],
    mask: Bool[Tensor, "prompts context"],
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the next token over counted positions, in nats."""
    at = counted(mask)
    targets = ids.roll(-1, 1)[at]
    logits = spliced[at].to(torch.promote_types(spliced.dtype, torch.float32))
    return cross_entropy(logits, targets, reduction="sum") / max(len(targets), 1)


def downstream_error(
    clean: Sequence[Float[Tensor, "prompts context d"]],
    spliced: Sequence[Float[Tensor, "prompts context d"]],
    mask: Bool[Tensor, "prompts context"],
) -> Float[Tensor, ""]:
    """Squared error of later activations on unmasked tokens, relative to their variance, averaged over the hooks."""
    total = spliced[0].new_zeros(())
    for a, b in zip(clean, spliced, strict=True):
        h = a.detach()[mask]
        spread = (h - h.mean(0)).square().sum()
        total = total + (b[mask] - h).square().sum() * torch.where(spread > 0, 1 / spread, 0.0)
    return total / len(clean)


def balanced(error: Float[Tensor, ""], kl: Float[Tensor, ""], beta: float) -> Float[Tensor, ""]:
    """`(error + a * beta * kl) / (1 + beta)` with `a = error / (kl + 1e-8)`, a constant for the gradient."""
    a = (error / (kl + 1e-8)).detach()
    return (error + a * beta * kl) / (1 + beta)
