"""What a dictionary is: sparse codes, activation functions, the SAE, its folds and its files."""

from unweave.sae.activation import ACTIVATIONS, Activation, register_activation
from unweave.sae.activation_fns import AbsTopK, BatchTopK, Gated, GroupMax, RawTopK, ReLU, TanhReLU, TopK
from unweave.sae.archetypal import ArchetypalDictionary, TiedDictionary
from unweave.sae.clt import CrossLayerTranscoder, by_target
from unweave.sae.coders import Crosscoder, Transcoder
from unweave.sae.codes import Codes, DenseCodes, SparseCodes
from unweave.sae.folds import fold_decoder_norms, fold_input_scale, fold_normalization
from unweave.sae.jumprelu import JumpReLU
from unweave.sae.normalization import Normalization
from unweave.sae.pursuit import MatchingPursuit, OrthogonalMatchingPursuit
from unweave.sae.sae import SAE, TrainingCodes
from unweave.sae.temporal import Temporal, TemporalSAE

__all__ = [
    "ACTIVATIONS",
    "SAE",
    "AbsTopK",
    "Activation",
    "ArchetypalDictionary",
    "BatchTopK",
    "Codes",
    "CrossLayerTranscoder",
    "Crosscoder",
    "DenseCodes",
    "Gated",
    "GroupMax",
    "JumpReLU",
    "MatchingPursuit",
    "Normalization",
    "OrthogonalMatchingPursuit",
    "RawTopK",
    "ReLU",
    "SparseCodes",
    "TanhReLU",
    "Temporal",
    "TemporalSAE",
    "TiedDictionary",
    "TopK",
    "TrainingCodes",
    "Transcoder",
    "by_target",
    "fold_decoder_norms",
    "fold_input_scale",
    "fold_normalization",
    "register_activation",
]
