"""What a vision model makes of an image: how large its patches are, and which tokens stand in front of them.

Everything is read from the model's configuration (of timm's models: from their attributes). Nothing is told by
counting tokens: 257 of them can be a CLS token and 16 × 16 patches, or a model without a CLS token and an odd grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from unweave._errors import UnweaveError

TokenKind = Literal["patch", "cls", "register"]
TOKEN_KINDS: tuple[TokenKind, ...] = get_args(TokenKind)
"""Kinds of image tokens; records store them as indices into this tuple."""


@dataclass(frozen=True)
class VisionLayout:
    """How a vision model lays out its tokens: CLS tokens, registers, then the patches row by row.

    Attributes:
        patch: Height and width of a patch in pixels.
        image: Height and width of the images that the model was made for, in pixels; None: any.
        cls: Number of CLS tokens.
        registers: Number of register tokens.
        channels: Colour channels of an image.
        sizes: Which other sizes it takes: "any", "interpolated" (any, if `interpolate_pos_encoding` is passed), "fixed"
            (none), or "list" (each image is a padded list of patches with a grid of its own, as in SigLIP 2).

    Raises:
        UnweaveError: A size that is not positive.
    """

    patch: tuple[int, int]
    image: tuple[int, int] | None = None
    cls: int = 0
    registers: int = 0
    channels: int = 3
    sizes: Literal["any", "interpolated", "fixed", "list"] = "fixed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", _pair(self.patch))
        object.__setattr__(self, "image", None if self.image is None else _pair(self.image))
        if min(self.patch) < 1 or min(self.image or (1,)) < 1 or min(self.cls, self.registers, self.channels - 1) < 0:
            raise UnweaveError(f"{self} has a size that is not positive.")

    @property
    def n_prefix(self) -> int:
        """Tokens in front of the patches."""
        return self.cls + self.registers

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of so many pixels; a rest that fills no patch is not seen."""
        return height // self.patch[0], width // self.patch[1]

    def kinds(self, n_patches: int) -> UInt8[Tensor, " positions"]:
        """Of each token of an image, the index of its kind in `TOKEN_KINDS`."""
        counts = torch.tensor([self.cls, self.registers, n_patches])
        kinds = [TOKEN_KINDS.index(kind) for kind in ("cls", "register", "patch")]
        return torch.tensor(kinds, dtype=torch.uint8).repeat_interleave(counts)

    def blank(self) -> dict[str, Tensor]:
        """What the model takes for one small image without anything on it."""
        height, width = self.image or self.patch
        if self.sizes != "list":
            return {"pixel_values": torch.zeros(1, self.channels, height, width)}
        return {
            "pixel_values": torch.zeros(1, 1, self.channels * height * width),
            "pixel_attention_mask": torch.ones(1, 1, dtype=torch.int64),
            "spatial_shapes": torch.ones(1, 2, dtype=torch.int64),
        }


@dataclass(frozen=True)
class _Family:
    cls: int
    sizes: Literal["any", "interpolated", "fixed", "list"]


_FAMILIES = {
    "vit": _Family(1, "interpolated"),
    "clip_vision_model": _Family(1, "interpolated"),
    "siglip_vision_model": _Family(0, "interpolated"),
    "siglip2_vision_model": _Family(0, "list"),
    "dinov2": _Family(1, "any"),
    "dinov2_with_registers": _Family(1, "any"),
    "dinov3_vit": _Family(1, "any"),
}
"""By the `model_type` of a configuration in transformers. Registers are counted in the configuration itself."""


def vision_config(config: Any) -> Any:
    """The vision tower's part of a configuration, or the configuration itself."""
    return getattr(config, "vision_config", None) or config


def vision_layout(module: nn.Module) -> VisionLayout | None:
    """The layout of a model of a known family (ViT, CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3, timm's ViTs), else None.

    A model that reads text as well (CLIP with both towers) has none: its vision tower is what `load_model` loads.
    """
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return _timm_layout(module)
    if getattr(config, "text_config", None) is not None and "ForImageClassification" not in type(module).__name__:
        return None
    config = vision_config(config)
    family = _FAMILIES.get(config.model_type)
    if family is None:
        return None
    return VisionLayout(
        patch=_pair(config.patch_size),
        image=None if family.sizes == "list" else _pair(config.image_size),
        cls=family.cls,
        registers=getattr(config, "num_register_tokens", 0),
        channels=config.num_channels,
        sizes=family.sizes,
    )


def _timm_layout(module: nn.Module) -> VisionLayout | None:
    """timm's VisionTransformer says how many tokens it puts in front, and how many of them are registers."""
    embed: Any = getattr(module, "patch_embed", None)
    n_prefix: Any = getattr(module, "num_prefix_tokens", None)
    if not isinstance(n_prefix, int) or not hasattr(embed, "patch_size"):
        return None
    n_registers = int(getattr(module, "num_reg_tokens", 0))
    size, projection = getattr(embed, "img_size", None), getattr(embed, "proj", None)
    return VisionLayout(
        patch=_pair(embed.patch_size),
        image=None if size is None else _pair(size),
        cls=n_prefix - n_registers,
        registers=n_registers,
        channels=int(getattr(projection, "in_channels", 3)),
        sizes="any" if getattr(module, "dynamic_img_size", False) or size is None else "fixed",
    )


def _pair(size: Any) -> tuple[int, int]:
    """Height and width, from one number or two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
