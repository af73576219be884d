"""The loss of a training step: a reconstruction, sparsity terms and what revives dead latents, added up.

Every term is a small pure function of `unweave.objectives`; here is which of them a configuration asks for, on which
codes, and with which coefficient at this step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from unweave.objectives import (
    RandomMatryoshka,
    auxk_loss,
    dead_latents_loss,
    error_weights,
    gate_error,
    matryoshka_error,
    multi_topk_error,
    open_gate,
    reanimation_loss,
    squared_error,
)
from unweave.objectives.schedules import factor_of, scheduled
from unweave.sae import Gated, TemporalSAE, ops
from unweave.sae.codes import Codes
from unweave.training.dead import dead_latents, revives

if TYPE_CHECKING:
    from unweave.training.trainee import Trainee


def training_loss(
    trainee: Trainee,
    x: Float[Tensor, "n d_in"],
    sparsity_scale: float,
    target: Float[Tensor, "n d_out"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n d_out"], Codes]:
    """Loss, reconstruction and codes of a batch at the scale of training.

    Args:
        trainee: What is trained, and where it stands.
        x: Inputs.
        sparsity_scale: The warm-up's factor of sparsity terms without a schedule of their own.
        target: What a transcoder is to predict; None: the inputs.
    """
    config, sae, y = trainee.config, trainee.sae, x if target is None else target
    signed = config.activation.signed
    if isinstance(sae, TemporalSAE):
        x, constant = trainee.split_input(x)
    else:
        constant = sae.constant(x)
    step, steps = trainee.step_count, trainee.steps
    dead = dead_latents(trainee) if revives(trainee) else None
    k = None if config.k_schedule is None else config.k_schedule(config.activation.k, step, steps)  # type: ignore[attr-defined]
    pre, codes, aux, extra = sae.training_codes(x, dead, trainee.k_aux, trainee.k_multi, k)
    weights, widths = error_weights(config.error, y), trainee.widths
    if isinstance(config.matryoshka, RandomMatryoshka):
        widths = config.matryoshka.draw(config.d_sae, trainee.draws())
    if widths:
        loss, x_hat = matryoshka_error(codes, sae.W_dec, constant, y, widths, weights)
    else:
        x_hat = ops.decode(codes, sae.decoders) + constant
        loss = squared_error(x_hat, y, weights)
    penalised = codes
    if isinstance(config.activation, Gated):
        penalised = open_gate(pre)
        loss = loss + gate_error(penalised, sae.decoders, constant, y, weights)
    if config.multi_topk and extra is not None:
        wider = scheduled(config.multi_topk, step, steps)
        loss = loss + wider.coefficient * multi_topk_error(extra, sae.W_dec, x_hat, y, weights, signed)
    if trainee.sparsity.terms:
        loss = loss + trainee.sparsity(pre, penalised, sae, step, sparsity_scale)
    if aux is not None and dead is not None:
        auxk = scheduled(config.auxk, step, steps)
        loss = loss + auxk.coefficient * auxk_loss(aux, sae.decoders, y - x_hat, len(dead), trainee.k_aux, signed)
    if dead is not None and len(dead) and (config.ghost or config.pre_act):
        pre_act = config.pre_act and scheduled(config.pre_act, step, steps)
        ghost = config.ghost and scheduled(config.ghost, step, steps)
        for read, own in sae.by_input(x, dead):
            loss = loss + dead_latents_loss(sae, own, read, y - x_hat, pre_act, ghost)
    if config.reanimation:
        coefficient = config.reanimation.coefficient_for(sae.d_out)
        coefficient *= factor_of(config.reanimation.schedule, step, steps)
        latents = (codes.firing_counts() == 0).nonzero().flatten()
        for read, own in sae.by_input(x, latents):
            share = len(own) / max(1, len(latents))  # the loss is a mean over latents
            loss = loss + coefficient * share * reanimation_loss(sae, own, read)
    return loss, x_hat, codes
