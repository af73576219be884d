"""What training minimises: a reconstruction, a sparsity term and a dead-latent term, each a small pure function.

Reduction convention everywhere: squared errors are summed over the width and averaged over tokens, on inputs scaled to
a mean squared norm of d_in, so that predicting the mean costs about d_in and a perfect code costs 0. Penalties are
summed over latents and averaged over tokens, with their coefficient outside.
"""

from unweave.objectives.auxk import AuxK, auxk_loss
from unweave.objectives.contrastive import Contrastive
from unweave.objectives.dead_latents import (
    GhostGradients,
    PreActivation,
    dead_latents_loss,
    ghost_loss,
    pre_activation_loss,
)
from unweave.objectives.end_to_end import EndToEnd, balanced, ce_loss, downstream_error, kl_loss
from unweave.objectives.gated import gate_error, open_gate
from unweave.objectives.l0 import L0, QuadraticL0, TargetL0
from unweave.objectives.matryoshka import Matryoshka, RandomMatryoshka, matryoshka_error
from unweave.objectives.multi_topk import MultiTopK, multi_topk_error
from unweave.objectives.penalties import L1, Frequency, Lp, PAnneal, Tanh
from unweave.objectives.penalty import PENALTIES, Penalty, register_penalty
from unweave.objectives.reanimation import Reanimation, reanimation_loss
from unweave.objectives.reconstruction import ERRORS, error_weights, squared_error
from unweave.objectives.schedules import KSchedule, Schedule

__all__ = [
    "ERRORS",
    "L0",
    "L1",
    "PENALTIES",
    "AuxK",
    "Contrastive",
    "EndToEnd",
    "Frequency",
    "GhostGradients",
    "KSchedule",
    "Lp",
    "Matryoshka",
    "MultiTopK",
    "PAnneal",
    "Penalty",
    "PreActivation",
    "QuadraticL0",
    "RandomMatryoshka",
    "Reanimation",
    "Schedule",
    "Tanh",
    "TargetL0",
    "auxk_loss",
    "balanced",
    "ce_loss",
    "dead_latents_loss",
    "downstream_error",
    "error_weights",
    "gate_error",
    "ghost_loss",
    "kl_loss",
    "matryoshka_error",
    "multi_topk_error",
    "open_gate",
    "pre_activation_loss",
    "reanimation_loss",
    "register_penalty",
    "squared_error",
]
