"""Where activations come from: data -> documents -> rows of tokens -> activations -> masks -> shuffled batches."""

from unweave.activations.background import Background
from unweave.activations.batches import ShuffledBatches
from unweave.activations.config import DataConfig
from unweave.activations.documents import Documents, open_documents
from unweave.activations.images import ImageBatch, ImageConfig, ImageRows, Images, open_images
from unweave.activations.live import ActivationStream, Pass, StreamCost
from unweave.activations.masks import MaskConfig, MaskReport, Masks
from unweave.activations.ring import ShuffleRing
from unweave.activations.rows import Batch, Rows
from unweave.activations.split import DEFAULT_HELD_OUT, is_held_out
from unweave.activations.stdlib_text import standard_library_text
from unweave.activations.tokens import TokenBatch, TokenRows

__all__ = [
    "DEFAULT_HELD_OUT",
    "ActivationStream",
    "Background",
    "Batch",
    "DataConfig",
    "Documents",
    "ImageBatch",
    "ImageConfig",
    "ImageRows",
    "Images",
    "MaskConfig",
    "MaskReport",
    "Masks",
    "Pass",
    "Rows",
    "ShuffleRing",
    "ShuffledBatches",
    "StreamCost",
    "TokenBatch",
    "TokenRows",
    "is_held_out",
    "open_documents",
    "open_images",
    "standard_library_text",
]
