"""How good an SAE is: metrics from streamed float64 sums, what it does to its model, and the report of both."""

from unweave.evaluation.behaviour import BehaviourSums
from unweave.evaluation.evaluate import evaluate
from unweave.evaluation.report import Report
from unweave.evaluation.sums import CodeSums, ReconstructionSums
from unweave.evaluation.weights import encoder_decoder_cosine, max_cosine

__all__ = [
    "BehaviourSums",
    "CodeSums",
    "ReconstructionSums",
    "Report",
    "encoder_decoder_cosine",
    "evaluate",
    "max_cosine",
]
