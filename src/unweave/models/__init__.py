"""Networks: load them, name places in them, read and replace what passes there."""

from __future__ import annotations

from unweave.models.aliases import tl_name
from unweave.models.attachment import differences, trained_at, without_path
from unweave.models.checkpoints import DEMO, DEMO_VIT
from unweave.models.hooks import Edit, Hook, capture, splice
from unweave.models.lean import lean
from unweave.models.load import LoadedModel, fingerprint, load_model
from unweave.models.meter import Meter
from unweave.models.model_identity import model_fingerprint
from unweave.models.names import head_index, head_shape, resolve_hooks
from unweave.models.precision import copied_bytes, copy_in, dtype_of, gains_from_bf16
from unweave.models.processors import Processor, describe, process
from unweave.models.vision import TOKEN_KINDS, TokenKind, VisionLayout, vision_layout

__all__ = [
    "DEMO", "DEMO_VIT", "TOKEN_KINDS", "Edit", "Hook", "LoadedModel", "Meter", "Processor", "TokenKind", "VisionLayout",
    "capture", "copied_bytes", "copy_in", "describe", "differences", "dtype_of", "fingerprint", "gains_from_bf16",
    "head_index", "head_shape", "lean", "load_model", "model_fingerprint", "process", "resolve_hooks", "splice",
    "tl_name", "trained_at", "vision_layout", "without_path",
]  # fmt: skip
