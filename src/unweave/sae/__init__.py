"""What a dictionary is: sparse codes, activation functions, the SAE, its folds and its files."""

from unweave.sae.activation_fns import ACTIVATIONS, Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from unweave.sae.codes import Codes, DenseCodes, SparseCodes
from unweave.sae.folds import fold_decoder_norms, fold_input_scale
from unweave.sae.sae import SAE, TrainingCodes

__all__ = [
    "ACTIVATIONS",
    "SAE",
    "Activation",
    "BatchTopK",
    "Codes",
    "DenseCodes",
    "Gated",
    "JumpReLU",
    "ReLU",
    "SparseCodes",
    "TopK",
    "TrainingCodes",
    "fold_decoder_norms",
    "fold_input_scale",
]
