"""Networks: load them, name places in them, read and replace what passes there."""

from __future__ import annotations

from unweave.models.aliases import tl_name
from unweave.models.hooks import Edit, Hook, capture, splice
from unweave.models.load import DEMO, LoadedModel, fingerprint, load_model
from unweave.models.names import head_shape, resolve_hooks

__all__ = [
    "DEMO", "Edit", "Hook", "LoadedModel", "capture", "fingerprint", "head_shape", "load_model", "resolve_hooks",
    "splice", "tl_name",
]  # fmt: skip
