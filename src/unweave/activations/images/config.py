"""How images become rows of tokens: the settings that caching, training and evaluation must share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from unweave._errors import UnweaveError
from unweave.activations.split import DEFAULT_HELD_OUT


@dataclass(frozen=True)
class ImageConfig:
    """Which part of the images to read, and how to make them the model's input.

    Raises:
        UnweaveError: A value out of range, or settings that exclude each other.
    """

    size: int | tuple[int, int] | None = None
    """Height and width in pixels to resize to, without cropping. None: what the model's processor does by itself."""
    aspect: Literal["processor", "keep"] = "processor"
    """"keep": resize each image to its own aspect ratio, to at most `max_patches` patches, without cropping. A model
    that takes lists of patches (SigLIP 2) always does."""
    max_patches: int | None = None
    """Patches in an image that keeps its aspect ratio. None: as many as the model was made for."""
    patch_labels: Literal["majority", "prefer-fg"] = "majority"
    """Class of a patch, from the mask's pixels in it: the most frequent one (the lowest of several), or the most
    frequent one that is not the background, wherever there is any."""
    background: int = 0
    """The class of masks that is the background."""
    n_classes: int | None = None
    """Classes of the masks, which decide how wide labels are stored. None: as many as the masks' pixels can tell."""
    column: str | None = None
    """Column of images in a Hugging Face dataset. None: the first one that holds images."""
    label_column: str | None = None
    """Column of class labels. None: the first one that holds some, if any."""
    mask_column: str | None = None
    """Column of segmentation masks; None: none."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset. Held-out images are taken from the same split."""
    streaming: bool = False
    """Read a Hugging Face dataset over the network as it is needed, instead of downloading it first."""
    held_out: float = DEFAULT_HELD_OUT
    """Part of the images kept from training. Which ones depends on their content, not on `seed`."""
    max_bad: int = 10
    """Images that may be unreadable. Each is named in a warning and skipped; one more is an error."""
    workers: int = 4
    """Threads that decode images ahead; 0: none. The order does not depend on them."""
    seed: int = 0
    """Seed of the order of the images."""

    def __post_init__(self) -> None:
        size: Any = self.size
        object.__setattr__(self, "size", tuple(size) if isinstance(size, list | tuple) else size)
        if self.size is not None and (min(_pair(self.size)) < 1 or len(_pair(self.size)) != 2):
            raise UnweaveError(f"size={self.size} is no height and width in pixels.")
        if self.aspect == "keep" and self.size is not None:
            raise UnweaveError("size fixes the aspect ratio, so it does not go with aspect='keep': give max_patches.")
        if self.max_patches is not None and self.max_patches < 1:
            raise UnweaveError(f"max_patches={self.max_patches} is less than 1.")
        if not 0 <= self.held_out < 1:
            raise UnweaveError(f"held_out={self.held_out} is no fraction in [0, 1).")
        for name in ("background", "max_bad", "workers", "seed"):
            if getattr(self, name) < 0:
                raise UnweaveError(f"{name}={getattr(self, name)} is negative.")
        if self.n_classes is not None and not 1 <= self.n_classes <= 2**32:
            raise UnweaveError(f"n_classes={self.n_classes} is not between 1 and 2**32.")

    @property
    def height_width(self) -> tuple[int, int] | None:
        """`size` as two numbers."""
        return None if self.size is None else _pair(self.size)


def _pair(size: int | tuple[int, ...]) -> Any:
    return (size, size) if isinstance(size, int) else size
