"""An image becomes exactly what its processor makes of it, and a mask goes where its image went."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unweave._errors import UnweaveError
from unweave.activations import ImageConfig, ImageRows
from unweave.activations.images.prepare import Preparation, vote
from unweave.models import LoadedModel, VisionLayout, load_model
from unweave.models.processors import DINOv3Processor

CLIP = transformers.CLIPImageProcessorPil(size={"shortest_edge": 10}, crop_size={"height": 8, "width": 8})


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def with_processor(vit: LoadedModel, processor: Any) -> LoadedModel:
    return load_model(vit.module, processor=processor)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("processor", [
    CLIP,
    transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}),
    transformers.BitImageProcessorPil(size={"shortest_edge": 9}, crop_size={"height": 8, "width": 8}),
    transformers.SiglipImageProcessorPil(size={"height": 8, "width": 8}),
    DINOv3Processor(size={"height": 8, "width": 8}),
], ids=lambda p: type(p).__name__)  # fmt: skip
def test_inputs_are_those_of_the_processor_called_by_hand(vit: LoadedModel, processor: Any, mode: str) -> None:
    image = picture(17, 30, mode)
    made = Preparation(with_processor(vit, processor), ImageConfig()).image(image)
    by_hand = processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(made.inputs["pixel_values"], by_hand)
    assert made.kinds.tolist() == [1, 0, 0, 0, 0]


def test_naflex_inputs_are_the_processors_too(siglip2: LoadedModel) -> None:
    image = picture(10, 40)
    made = Preparation(siglip2, ImageConfig()).image(image)
    assert siglip2.processor is not None
    by_hand = siglip2.processor(images=[image], return_tensors="pt")
    assert all(torch.equal(made.inputs[name], by_hand[name][0]) for name in by_hand)
    rows, columns = made.inputs["spatial_shapes"].tolist()
    assert rows < columns  # the aspect ratio is kept
    assert int(made.real.sum()) == rows * columns
    wider = Preparation(siglip2, ImageConfig(max_patches=20)).image(image)
    assert len(wider.real) == 20


def test_a_size_is_resized_to_by_the_processor_without_its_crop(vit: LoadedModel) -> None:
    image = picture(17, 30)
    made = Preparation(with_processor(vit, CLIP), ImageConfig(size=(12, 16))).image(image)
    by_hand = CLIP(
        images=[image], size={"height": 12, "width": 16}, do_center_crop=False, return_tensors="pt"
    )["pixel_values"][0]  # fmt: skip
    assert torch.equal(made.inputs["pixel_values"], by_hand)
    assert len(made.kinds) == 1 + 3 * 4


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000), most=st.integers(1, 300))
def test_a_kept_aspect_ratio_fits_and_uses_what_there_is(height: int, width: int, most: int) -> None:
    processor = transformers.ViTImageProcessorPil(size={"height": 8, "width": 8})
    model = LoadedModel(torch.nn.Identity(), None, "x", processor, VisionLayout((4, 4), (8, 8), cls=1, sizes="any"))
    preparation = Preparation(model, ImageConfig(aspect="keep", max_patches=most))
    rows, columns = preparation.grid_for(height, width)
    assert 1 <= rows * columns <= most
    if 1 / 4 < height / width < 4 and most >= 64:
        assert rows * columns > 0.7 * most
        assert 0.7 < (rows / columns) / (height / width) < 1.4


def test_the_same_images_have_context_positions(vit: LoadedModel, siglip2: LoadedModel) -> None:
    assert Preparation(vit, ImageConfig()).n_positions() == 5
    assert Preparation(vit, ImageConfig(size=16)).n_positions() == 17
    assert Preparation(vit, ImageConfig(aspect="keep", max_patches=9)).n_positions() == 10
    assert Preparation(siglip2, ImageConfig()).n_positions() == 12
    uncropped = transformers.CLIPImageProcessorPil(size={"shortest_edge": 8}, do_center_crop=False)
    with pytest.raises(UnweaveError, match="gives images of different sizes: set size, or aspect='keep'"):
        Preparation(with_processor(vit, uncropped), ImageConfig()).n_positions()


# Masks


def test_a_patch_has_the_class_of_most_of_its_pixels_or_of_its_foreground() -> None:
    pixels = np.array([[0, 0, 0, 7], [7, 7, 2, 2], [0, 0, 0, 0], [9, 9, 9, 300]])
    assert vote(pixels, "majority", 0).tolist() == [0, 2, 0, 9]  # of 7 and 2, equally frequent, the lower
    assert vote(pixels, "prefer-fg", 0).tolist() == [7, 2, 0, 9]
    assert vote(pixels, "prefer-fg", 9).tolist() == [0, 2, 0, 300]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=6), st.integers(0, 5))
def test_votes_are_counted_patch_by_patch(patches: list[list[int]], background: int) -> None:
    for how in ("majority", "prefer-fg"):
        expected = []
        for pixels in patches:
            chosen = [p for p in pixels if p != background] if how == "prefer-fg" else pixels
            expected.append(max(sorted(set(chosen)), key=chosen.count) if chosen else background)
        assert vote(np.array(patches), how, background).tolist() == expected


def test_a_mask_is_cropped_as_its_image_is(vit: LoadedModel) -> None:
    """Classes that an image carries in its own pixels come out where the processor put those pixels."""
    mask = np.zeros((20, 40), np.uint16)
    mask[:, 20:] = 300
    mask[10:] += 5
    preparation = Preparation(with_processor(vit, CLIP), ImageConfig(), label_dtype=np.dtype(np.uint16))
    made = preparation.image(picture(20, 40), mask)
    assert made.labels is not None
    assert made.labels.dtype == torch.uint16
    assert made.labels.tolist() == [0, 0, 300, 5, 305]  # the CLS token, then the grid


def test_a_mask_keeps_its_aspect_ratio_with_its_image(siglip2: LoadedModel) -> None:
    mask = np.repeat(np.arange(3, dtype=np.uint8)[None], 4, 0).repeat(4, 1)
    preparation = Preparation(siglip2, ImageConfig(max_patches=3), label_dtype=np.dtype(np.uint8))
    made = preparation.image(picture(4, 12), mask)
    assert made.inputs["spatial_shapes"].tolist() == [1, 3]
    assert made.labels is not None
    assert made.labels.tolist() == [0, 1, 2]


def test_three_hundred_classes_do_not_fit_a_byte(vit: LoadedModel) -> None:
    preparation = Preparation(vit, ImageConfig(), label_dtype=np.dtype(np.uint8))
    with pytest.raises(ValueError, match="its classes go from 300 to 300, which uint8 cannot hold"):
        preparation.image(picture(8, 8), np.full((8, 8), 300, np.uint16))


# What does not fit


def test_a_model_of_text_takes_no_images(vit: LoadedModel) -> None:
    text = LoadedModel(torch.nn.Identity(), None, "words")
    with pytest.raises(UnweaveError, match=r"'words' is no vision model .* layout=VisionLayout"):
        Preparation(text, ImageConfig())
    with pytest.raises(UnweaveError, match="has no image processor: give load_model one"):
        Preparation(load_model(vit.module), ImageConfig())


def test_a_model_of_one_size_takes_no_other(vit: LoadedModel, siglip2: LoadedModel) -> None:
    fixed = LoadedModel(vit.module, None, "fixed", vit.processor, VisionLayout((4, 4), (8, 8), cls=1))
    with pytest.raises(UnweaveError, match=r"takes images of \(8, 8\) pixels and no others"):
        Preparation(fixed, ImageConfig(size=16))
    with pytest.raises(UnweaveError, match="keeps aspect ratios: give max_patches"):
        Preparation(siglip2, ImageConfig(size=16))
    wrong = LoadedModel(vit.module, None, "fixed", DINOv3Processor(), VisionLayout((4, 4), (8, 8), cls=1))
    with pytest.raises(UnweaveError, match=r"and the processor gives \(224, 224\)"):
        Preparation(wrong, ImageConfig()).image(picture(8, 8))


def test_labels_of_patches_need_a_processor_of_transformers(vit: LoadedModel) -> None:
    function = with_processor(vit, lambda image: torch.zeros(3, 8, 8))
    preparation = Preparation(function, ImageConfig(), label_dtype=np.dtype(np.uint8))
    with pytest.raises(UnweaveError, match="sizes and patch labels need a processor of transformers"):
        preparation.image(picture(8, 8), np.zeros((8, 8), np.uint8))
    assert ImageRows([picture(8, 8)], function, ImageConfig(held_out=0), held_out=False).context == 5
