"""What an SAE does to the model it comes from: cross-entropy and KL with x̂, or 0, in place of x.

A batch is run three times: clean, spliced (x̂ at unmasked positions) and ablated (0 at the same positions). Logits are
made for a few positions at a time, so that memory does not grow with vocabulary x batch. A prediction counts if its
*target* token is unmasked. Divergences are Σ p (log p - log q), p the clean model, from log-softmax in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from unweave.evaluation.causal_lm import CausalLM, Run, kl_divergence, log_probabilities
from unweave.evaluation.sums import nothing, wide

BASELINE = "zero ablation"
"""What "ablated" means: the activation is set to 0."""

POSITIONS_AT_ONCE = 256
"""Positions whose logits are in memory at a time: at a vocabulary of 256k, 256 MiB for each run."""


@dataclass(eq=False)
class BehaviourSums:
    """Sums over the counted predictions, in nats and float64."""

    n_predictions: int = 0
    ce_clean: Tensor = field(default_factory=nothing)
    ce_sae: Tensor = field(default_factory=nothing)
    ce_ablated: Tensor = field(default_factory=nothing)
    kl_sae: Tensor = field(default_factory=nothing)
    kl_ablated: Tensor = field(default_factory=nothing)

    def update(
        self,
        clean: Float[Tensor, "n vocab"],
        spliced: Float[Tensor, "n vocab"],
        ablated: Float[Tensor, "n vocab"],
        targets: Int64[Tensor, " n"],
    ) -> None:
        """Add predictions.

        Args:
            clean: Logits of the unchanged model.
            spliced: Logits with the SAE's reconstruction in place.
            ablated: Logits with 0 in place.
            targets: The token that each prediction is about.
        """
        log_p = log_probabilities(clean)
        ce_sae, kl_sae = _against(log_p, spliced, targets)
        ce_ablated, kl_ablated = _against(log_p, ablated, targets)
        ce_clean = _cross_entropy(log_p, targets)
        batch = BehaviourSums(len(targets), ce_clean, ce_sae, ce_ablated, kl_sae, kl_ablated)
        self.__dict__.update((self + batch).__dict__)

    def __add__(self, other: BehaviourSums) -> BehaviourSums:
        """The sums over the predictions of both."""
        return BehaviourSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {f.name: int(v) if isinstance(v := getattr(self, f.name), int) else float(v) for f in fields(self)}


def _cross_entropy(log_p: Float[Tensor, "n vocab"], targets: Int64[Tensor, " n"]) -> Tensor:
    return -wide(log_p.gather(1, targets[:, None])).sum()


def _against(log_p: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a changed model, and its divergence from the clean one."""
    log_q = log_probabilities(logits)
    return _cross_entropy(log_q, targets), wide(kl_divergence(log_p, log_q)).sum()


def add_behaviour(
    sums: BehaviourSums,
    lm: CausalLM,
    run: Run,
    ids: Int64[Tensor, "prompts context"],
    real: Bool[Tensor, "prompts context"],
    mask: Bool[Tensor, "prompts context"],
    x_hat: Float[Tensor, "n d"],
) -> None:
    """Run a batch spliced and ablated, and add its predictions.

    Args:
        sums: Where to add.
        lm: The model.
        run: The batch's clean run.
        ids: Tokens.
        real: False on padding.
        mask: True where the activation is replaced; elsewhere both changed runs keep it. A prediction counts if its
            target is True.
        x_hat: Reconstructions of the unmasked tokens, row by row.
    """
    spliced, ablated = (run.activation.reshape(mask.numel(), -1).clone() for _ in range(2))
    spliced[mask.flatten()], ablated[mask.flatten()] = x_hat.to(spliced), 0
    changed = [lm.rerun(run, ids, real, activation.reshape_as(run.activation)) for activation in (spliced, ablated)]
    hidden = [run.hidden, *changed]
    counts = mask[:, 1:]
    hidden = [h[:, :-1][counts] for h in hidden]
    targets = ids[:, 1:][counts]
    for start in range(0, len(targets), POSITIONS_AT_ONCE):
        part = slice(start, start + POSITIONS_AT_ONCE)
        clean, with_sae, without = (lm.logits(run, h[part]) for h in hidden)
        sums.update(clean, with_sae, without, targets[part])
