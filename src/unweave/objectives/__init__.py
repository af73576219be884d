"""What training minimises: a reconstruction, a sparsity term and a dead-latent term, each a small pure function.

Reduction convention everywhere: squared errors are summed over the width and averaged over tokens, on inputs scaled to
a mean squared norm of d_in, so that predicting the mean costs about d_in and a perfect code costs 0. Penalties are
summed over latents and averaged over tokens, with their coefficient outside.
"""

from unweave.objectives.auxk import AuxK, auxk_loss
from unweave.objectives.penalties import L1, TargetL0, l1_penalty, target_l0_penalty
from unweave.objectives.reconstruction import squared_error

__all__ = ["L1", "AuxK", "TargetL0", "auxk_loss", "l1_penalty", "squared_error", "target_l0_penalty"]
