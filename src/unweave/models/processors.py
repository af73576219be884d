"""What turns an image into the input of a vision model: transformers' processors, timm's transforms, or a function.

Of transformers' processors the Pillow variants are taken, also where torchvision is installed: the same image gives
the same input on every machine. DINOv3 has none, so its own steps are done here with PyTorch alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError

if TYPE_CHECKING:
    from PIL.Image import Image

Processor = Callable[..., Any]
"""A processor of transformers, or a function from a PIL image to a `(channels, height, width)` tensor."""

NEAREST, BILINEAR = 0, 2  # Pillow's numbers
_FILES = ("preprocessor_config.json", "processor_config.json")


class DINOv3Processor:
    """DINOv3's steps in its order: to [0, 1], resize (bilinear, antialiased), normalise.

    Takes the arguments of transformers' processors that are used here. Its attributes are those of
    `preprocessor_config.json`.
    """

    model_input_names = ("pixel_values",)

    def __init__(
        self,
        *,
        size: Mapping[str, int] | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        rescale_factor: float = 1 / 255,
        resample: int = BILINEAR,
        **_: Any,
    ) -> None:
        self.size = dict(size or {"height": 224, "width": 224})
        if resample != BILINEAR or not {"height", "width"} <= set(self.size):
            raise UnweaveError(f"a DINOv3 processor that resizes to {self.size} by filter {resample} is not known.")
        self.image_mean, self.image_std = image_mean or [0.485, 0.456, 0.406], image_std or [0.229, 0.224, 0.225]
        self.rescale_factor = rescale_factor

    def __call__(
        self,
        images: list[Image],
        *,
        size: Mapping[str, int] | None = None,
        resample: int = BILINEAR,
        do_rescale: bool = True,
        do_normalize: bool = True,
        **_: Any,
    ) -> dict[str, Float[Tensor, "n c h w"]]:
        size = size or self.size
        shape = (size["height"], size["width"])
        made = [self._process(image, shape, resample, do_rescale, do_normalize) for image in images]
        return {"pixel_values": torch.cat(made)}

    def _process(
        self, image: Image, shape: tuple[int, int], resample: int, do_rescale: bool, do_normalize: bool
    ) -> Float[Tensor, "1 c h w"]:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
        if do_rescale:
            pixels = pixels * self.rescale_factor
        smooth = resample == BILINEAR
        how: dict[str, Any] = {"mode": "bilinear", "antialias": True} if smooth else {"mode": "nearest-exact"}
        pixels = torch.nn.functional.interpolate(pixels, shape, **how)
        if do_normalize:
            mean, std = (torch.tensor(x).view(1, -1, 1, 1) for x in (self.image_mean, self.image_std))
            pixels = (pixels - mean) / std
        return pixels


def processor_files(source: str, find: Callable[..., bool]) -> bool:
    """Whether a checkpoint has a processor, by a function that looks for files."""
    return find(source, *_FILES)


def load_processor(source: str) -> Processor:
    """The image processor of a checkpoint in Hugging Face layout; raises what transformers raises."""
    if find_spec("PIL") is None:
        raise UnweaveError("models of images need Pillow: pip install 'unweave[vision]'.")
    from transformers import AutoImageProcessor
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    config = get_image_processor_config(source)
    if str(config.get("image_processor_type", "")).startswith("DINOv3ViT"):
        return DINOv3Processor(**config)
    processor: Processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
    return processor


def process(processor: Processor, image: Image, **options: Any) -> dict[str, Tensor]:
    """A model's inputs for one image, without a batch axis.

    Args:
        processor: What `load_model` found, or was given.
        image: The image.
        **options: Arguments of transformers' processors, such as `size`, in place of the processor's own settings.

    Raises:
        UnweaveError: The processor gives no tensor, or takes no options.
    """
    processor = getattr(processor, "image_processor", processor)  # of a processor for text and images
    if hasattr(processor, "model_input_names"):
        inputs = processor(images=[image], return_tensors="pt", **options)
        return {name: value[0] for name, value in inputs.items() if isinstance(value, Tensor)}
    if options:
        raise UnweaveError(
            f"the processor {_name(processor)} is a function, so it takes no {', '.join(options)}: sizes and patch "
            "labels need a processor of transformers."
        )
    pixels = processor(image)
    if not isinstance(pixels, Tensor):
        raise UnweaveError(f"the processor {_name(processor)} gives {type(pixels).__name__}, where a tensor is needed.")
    return {"pixel_values": pixels}


def describe(processor: Processor) -> str:
    """What a processor does, as text that is equal for equal processors: for fingerprints."""
    processor = getattr(processor, "image_processor", processor)
    if hasattr(processor, "to_dict"):
        return json.dumps(processor.to_dict(), sort_keys=True, default=str)
    if isinstance(processor, DINOv3Processor):
        return json.dumps(vars(processor), sort_keys=True)
    return repr(processor) if hasattr(processor, "transforms") else _name(processor)


def _name(processor: Processor) -> str:
    return getattr(processor, "__qualname__", type(processor).__qualname__)
