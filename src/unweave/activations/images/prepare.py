"""From an image to the inputs of a model: resized as its processor does it, or to a size or grid that was asked for.

A mask goes through the very same steps as its image, as an image whose colours are the bytes of its class numbers and
that is resized without blending: no second implementation of resizing and cropping has to agree with the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Integer, UInt8
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations.images.config import ImageConfig
from unweave.activations.images.source import Entry, Ready, pillow
from unweave.models import LoadedModel, process
from unweave.models.processors import NEAREST

if TYPE_CHECKING:
    from PIL.Image import Image

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True, eq=False)
class Prepared:
    """One image as the model takes it, without a batch axis."""

    inputs: Ready
    real: Bool[Tensor, " positions"]
    kinds: UInt8[Tensor, " positions"]
    labels: Tensor | None

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Images of equal shapes can be in one batch."""
        return (len(self.real), *((name, value.shape) for name, value in sorted(self.inputs.items())))

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        return sum(value.nbytes for value in self.inputs.values())


class Preparation:
    """What is done to every image, for one model and config.

    Args:
        model: The model, with its processor and the layout of its tokens.
        config: What to change about the processor's resizing.
        ready: The inputs come as the model takes them: no processor is needed.
        label_dtype: Type of the labels of patches, if there are masks.

    Raises:
        UnweaveError: The model is no vision model, has no processor, or does not take images of the size asked for.
    """

    def __init__(
        self, model: LoadedModel, config: ImageConfig, *, ready: bool = False, label_dtype: np.dtype[Any] | None = None
    ) -> None:
        if model.vision is None:
            raise UnweaveError(
                f"{model.name!r} is no vision model of a known family: say how its tokens lie with "
                "load_model(..., layout=VisionLayout(...))."
            )
        self.layout, self.processor, self.config = model.vision, model.processor, config
        self.label_dtype = label_dtype
        self._name, self._ready = model.name, ready
        if not ready and self.processor is None:
            raise UnweaveError(
                f"the model {model.name!r} has no image processor: give load_model one with processor=..., or give "
                "(input, metadata) pairs."
            )
        changed = config.size is not None or config.aspect == "keep"
        if changed and self.layout.sizes == "fixed" and (ready or config.height_width != self.layout.image):
            raise UnweaveError(f"the model {model.name!r} takes images of {self.layout.image} pixels and no others.")
        if config.size is not None and self.layout.sizes == "list":
            raise UnweaveError(f"the model {model.name!r} keeps aspect ratios: give max_patches in place of size.")
        self._options: dict[str, Any] = {}
        if config.height_width is not None:
            self._options = _resize_to(*config.height_width)
        if self.layout.sizes == "list" and config.max_patches is not None:
            self._options = {"max_num_patches": config.max_patches}

    @property
    def keeps_aspect(self) -> bool:
        """Whether images of one batch may have grids of different shapes, so that batches have to be cut."""
        return self.config.aspect == "keep" and self.layout.sizes != "list"

    @property
    def max_patches(self) -> int:
        """Patches in an image that keeps its aspect ratio, at most."""
        if self.config.max_patches is not None:
            return self.config.max_patches
        if self.layout.image is None:
            raise UnweaveError(f"the model {self._name!r} has no size of its own: give max_patches.")
        rows, columns = self.layout.grid(*self.layout.image)
        return rows * columns

    def n_positions(self) -> int:
        """Positions in a row, at most; of one image size, exactly.

        Raises:
            UnweaveError: The processor keeps aspect ratios, so there is no limit to it.
        """
        if self.keeps_aspect:
            return self.layout.n_prefix + self.max_patches
        shapes = ((256, 256), (512, 256), (256, 512))  # a processor may not give the same size for each
        counts = {len(self._blank(height, width).real) for width, height in shapes}
        if len(counts) > 1:
            raise UnweaveError(
                f"the processor of {self._name!r} gives images of different sizes: set size, or aspect='keep' with "
                "max_patches."
            )
        return counts.pop()

    def prepare(self, entry: Entry) -> Prepared:
        """Decode an image and its mask; raises whatever is wrong with them."""
        found = entry.open()
        if isinstance(found, dict):
            return self._finish(found, entry.labels)
        if entry.open_mask is None:
            return self.image(found)
        mask = entry.open_mask()
        if mask.shape != (found.height, found.width):
            raise ValueError(f"its mask is of size {mask.shape}, the image of size {(found.height, found.width)}")
        return self.image(found, mask)

    def example(self, ready: Entry | None) -> Prepared:
        """A blank image as the model takes it, with blank labels, or a ready input without its own.

        Raises:
            UnweaveError: It does not fit the model.
        """
        if ready is None:
            return self._blank(256, 256)
        inputs = ready.open()
        assert isinstance(inputs, dict)
        real, kinds = self._tokens(inputs)
        labels = None if self.label_dtype is None else self._spread(np.zeros(int((kinds == 0).sum()), int), kinds)
        return Prepared(inputs, real, kinds, labels)

    def _blank(self, height: int, width: int) -> Prepared:
        mask = None if self.label_dtype is None else np.zeros((height, width), np.uint8)
        return self.image(pillow().new(_MODES[self.layout.channels], (width, height)), mask)

    def image(self, image: Image, mask: Integer[np.ndarray, "h w"] | None = None) -> Prepared:
        """One image, with or without the class of each of its pixels."""
        assert self.processor is not None
        image = image.convert(_MODES[self.layout.channels])
        options = self._options
        if self.keeps_aspect:
            rows, columns = self.grid_for(image.height, image.width)
            options = _resize_to(rows * self.layout.patch[0], columns * self.layout.patch[1])
        inputs = process(self.processor, image, **options)
        if mask is None:
            return self._finish(inputs, None)
        exact = {"resample": NEAREST, "do_rescale": False, "do_normalize": False, "do_convert_rgb": True}
        seen = process(self.processor, _as_colours(mask), **options, **exact)["pixel_values"]
        return self._finish(inputs, self._patch_labels(seen))

    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the largest grid of at most `max_patches` that has about the image's aspect ratio."""
        most, (patch_height, patch_width) = self.max_patches, self.layout.patch
        scale = math.sqrt(most * patch_height * patch_width / (height * width))
        rows = min(max(1, round(height * scale / patch_height)), most)
        columns = max(1, min(round(width * scale / patch_width), most // rows))
        return rows, columns

    def _finish(self, inputs: Ready, labels: Integer[np.ndarray, " patches"] | None) -> Prepared:
        real, kinds = self._tokens(inputs)
        return Prepared(inputs, real, kinds, None if self.label_dtype is None else self._spread(labels, kinds))

    def _tokens(self, inputs: Ready) -> tuple[Bool[Tensor, " positions"], UInt8[Tensor, " positions"]]:
        """Which positions are real, and the kind of each."""
        pixels = inputs["pixel_values"]
        if self.layout.sizes == "list":
            real = inputs["pixel_attention_mask"].bool()
            kinds = torch.zeros(len(real), dtype=torch.uint8)
        else:
            if pixels.ndim != 3 or pixels.shape[0] != self.layout.channels:
                raise UnweaveError(
                    f"an input of {self._name!r} has shape {tuple(pixels.shape)}, where "
                    f"({self.layout.channels}, height, width) is needed."
                )
            rows, columns = self.layout.grid(pixels.shape[1], pixels.shape[2])
            if self.layout.sizes == "fixed" and self.layout.image not in (None, tuple(pixels.shape[1:])):
                raise UnweaveError(
                    f"the model {self._name!r} takes images of {self.layout.image} pixels, and the processor gives "
                    f"{tuple(pixels.shape[1:])}."
                )
            kinds = self.layout.kinds(rows * columns)
            real = torch.ones(len(kinds), dtype=torch.bool)
        return real, kinds

    def _spread(self, labels: Integer[np.ndarray, " patches"] | None, kinds: Tensor) -> Tensor:
        """The labels of the patches at their positions; 0 on other tokens, which `kinds` tells apart."""
        assert self.label_dtype is not None
        spread = np.zeros(len(kinds), dtype=self.label_dtype)
        patches = (kinds == 0).numpy()
        if labels is None or len(labels) != patches.sum():
            n = "no" if labels is None else len(labels)
            raise ValueError(f"it has {n} labels for {patches.sum()} patches")
        if labels.min() < 0 or labels.max() > np.iinfo(self.label_dtype).max:
            lowest, highest = labels.min(), labels.max()
            raise ValueError(f"its classes go from {lowest} to {highest}, which {self.label_dtype} cannot hold")
        spread[patches] = labels
        return torch.from_numpy(spread)

    def _patch_labels(self, colours: Tensor) -> Integer[np.ndarray, " patches"]:
        """One class per patch from its pixels' bytes."""
        if self.layout.sizes == "list":
            pixels = colours.reshape(len(colours), -1, 3).numpy()
        else:
            height, width = self.layout.patch
            rows, columns = self.layout.grid(colours.shape[1], colours.shape[2])
            cut = colours[:, : rows * height, : columns * width].reshape(3, rows, height, columns, width)
            pixels = cut.permute(1, 3, 2, 4, 0).reshape(rows * columns, height * width, 3).numpy()
        numbers = np.rint(pixels).astype(np.int64) @ np.array([1, 1 << 8, 1 << 16])
        return vote(numbers, self.config.patch_labels, self.config.background)


def vote(pixels: Integer[np.ndarray, "patches pixels"], how: str, background: int) -> Integer[np.ndarray, " patches"]:
    """The class of each patch, from those of its pixels; of several that are equally frequent the lowest."""
    classes, at = np.unique(pixels, return_inverse=True)
    at = at.reshape(pixels.shape) + len(classes) * np.arange(len(pixels))[:, None]
    counts = np.bincount(at.ravel(), minlength=len(pixels) * len(classes)).reshape(len(pixels), len(classes))
    if how == "prefer-fg":
        counts[:, classes != background] *= pixels.shape[1] + 1  # one pixel outweighs a patch full of background
    return np.asarray(classes[counts.argmax(1)])


def _as_colours(mask: Integer[np.ndarray, "h w"]) -> Image:
    """A mask as an RGB image: the three bytes of each class number."""
    if mask.min() < 0 or mask.max() >= 1 << 24:
        raise ValueError(f"its mask holds class {mask.max()}, where three bytes are the limit")
    numbers = mask.astype(np.uint32)
    image: Image = pillow().fromarray(np.stack([(numbers >> shift) & 255 for shift in (0, 8, 16)], -1).astype(np.uint8))
    return image


def _resize_to(height: int, width: int) -> dict[str, Any]:
    return {"size": {"height": height, "width": width}, "do_resize": True, "do_center_crop": False}
