"""Where activations come from: data -> documents -> rows of tokens -> activations -> masks -> shuffled batches."""

from unweave.activations.batches import ShuffledBatches
from unweave.activations.config import DataConfig
from unweave.activations.documents import Documents, open_documents
from unweave.activations.live import ActivationStream, StreamCost
from unweave.activations.masks import MaskConfig, MaskReport, Masks
from unweave.activations.ring import ShuffleRing
from unweave.activations.split import DEFAULT_HELD_OUT, is_held_out
from unweave.activations.stdlib_text import standard_library_text
from unweave.activations.tokens import TokenBatch, TokenRows

__all__ = [
    "DEFAULT_HELD_OUT",
    "ActivationStream",
    "DataConfig",
    "Documents",
    "MaskConfig",
    "MaskReport",
    "Masks",
    "ShuffleRing",
    "ShuffledBatches",
    "StreamCost",
    "TokenBatch",
    "TokenRows",
    "is_held_out",
    "open_documents",
    "standard_library_text",
]
