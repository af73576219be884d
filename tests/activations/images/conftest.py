"""A vision transformer whose processor resizes and normalises, and pictures that can be told from each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unweave.models import LoadedModel, load_model

MakeModel = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def make_vit() -> MakeModel:
    def make(size: tuple[int, int] = (8, 8), **processor: Any) -> LoadedModel:
        import transformers

        torch.manual_seed(0)
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=size,
            patch_size=4, initializer_range=0.3,
        )  # fmt: skip
        settings = {"size": {"height": size[0], "width": size[1]}} | processor
        return load_model(transformers.ViTModel(config), processor=transformers.ViTImageProcessorPil(**settings))

    return make


@pytest.fixture(scope="session")
def vit(make_vit: MakeModel) -> LoadedModel:
    return make_vit()


@pytest.fixture(scope="session")
def siglip2() -> LoadedModel:
    import transformers

    torch.manual_seed(0)
    config = transformers.Siglip2VisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_patches=16, patch_size=4
    )
    processor = transformers.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=12)
    return load_model(transformers.Siglip2VisionModel(config), processor=processor)


def noise(i: int, height: int = 11, width: int = 9) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def pictures() -> Callable[..., list[Image.Image]]:
    def make(n: int, height: int = 11, width: int = 9) -> list[Image.Image]:
        return [Image.fromarray(noise(i, height, width)) for i in range(n)]

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures in two classes, one of them with a folder of its own inside."""
    for i in range(12):
        place = tmp_path / "data" / ("cat" if i % 3 else "dog/small")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i)).save(place / f"{i:02d}.png")
    return tmp_path / "data"
