"""The methods by which an SAE gets to disk, to the Hub and back: written in SAELens' layout, read from everybody's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unweave._late import late

if TYPE_CHECKING:
    from unweave.sae.sae import SAE


class Persistent:
    """What `SAE` inherits beside `nn.Module`."""

    def save(self: SAE, folder: str | Path) -> Path:  # type: ignore[misc]
        """Write the inference form in SAELens' layout; see `unweave.sae.files.save`."""
        from unweave.sae import files

        return files.save(self, folder)

    @staticmethod
    def load(
        path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, **hints: Any
    ) -> SAE:
        """Read an SAE, transcoder or other coder from a folder or file of any known format.

        Args:
            path: The folder or file.
            device: Where to put the weights.
            dtype: Cast the weights to this; by default they keep the file's. Thresholds are always float32.
            **hints: `format`, and what the format's files do not say; see `unweave.hub.read_sae`.
        """
        sae: SAE = late("read_sae")(path, device=device, dtype=dtype, **hints)
        return sae

    @staticmethod
    def from_pretrained(source: str | Path, id: str | None = None, **options: Any) -> SAE:
        """Load a published SAE by its release and id, by repository and folder, or by path.

        `options` are `revision`, `local_files_only`, `force_download`, `token`, `device`, `dtype` and what a format's
        files do not say; see `unweave.hub.from_pretrained`.
        """
        sae: SAE = late("from_pretrained")(source, id, **options)
        return sae

    def push_to_hub(self: SAE, repo_id: str, **options: Any) -> str:  # type: ignore[misc]
        """Share on the Hub, with a page of usage and measured numbers, and return the address.

        `options` are `subfolder`, `private`, `revision`, `token`, `commit_message`, `license`, `report` and
        `dashboard`; see `unweave.hub.push_to_hub`.
        """
        address: str = late("push_to_hub")(self, repo_id, **options)
        return address
