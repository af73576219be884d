"""What training minimises: a reconstruction, a sparsity term and a dead-latent term, each a small pure function.

Reduction convention everywhere: squared errors are summed over the width and averaged over tokens, on inputs scaled to
a mean squared norm of d_in, so that predicting the mean costs about d_in and a perfect code costs 0. Penalties are
summed over latents and averaged over tokens, with their coefficient outside.
"""

from unweave.objectives.auxk import AuxK, auxk_loss
from unweave.objectives.dead_latents import (
    GhostGradients,
    PreActivation,
    dead_latents_loss,
    ghost_loss,
    pre_activation_loss,
)
from unweave.objectives.gated import gate_error, open_gate
from unweave.objectives.matryoshka import Matryoshka, matryoshka_error
from unweave.objectives.multi_topk import MultiTopK, multi_topk_error
from unweave.objectives.penalties import L1, TargetL0, l1_penalty, target_l0_penalty
from unweave.objectives.reconstruction import squared_error

__all__ = [
    "L1",
    "AuxK",
    "GhostGradients",
    "Matryoshka",
    "MultiTopK",
    "PreActivation",
    "TargetL0",
    "auxk_loss",
    "dead_latents_loss",
    "gate_error",
    "ghost_loss",
    "l1_penalty",
    "matryoshka_error",
    "multi_topk_error",
    "open_gate",
    "pre_activation_loss",
    "squared_error",
    "target_l0_penalty",
]
