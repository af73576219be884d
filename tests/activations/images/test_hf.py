"""Hugging Face image datasets: what the datasets library holds, in memory, saved and streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unweave._errors import UnweaveError
from unweave.activations import ImageConfig, ImageRows, open_images
from unweave.models import LoadedModel

datasets = pytest.importorskip("datasets")
Pictures = Callable[..., list[Image.Image]]


@pytest.fixture
def dataset(pictures: Pictures) -> datasets.Dataset:
    features = datasets.Features(
        {"note": datasets.Value("string"), "picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"]),
         "mask": datasets.Image()}
    )  # fmt: skip
    masks = [Image.fromarray(np.full((11, 9), i, np.uint8)) for i in range(6)]
    columns = {"note": list("uvwxyz"), "picture": pictures(6), "kind": [0, 1] * 3, "mask": masks}
    return datasets.Dataset.from_dict(columns, features=features)


def check(images: ImageRows, pictures: list[Image.Image], model: LoadedModel) -> None:
    batch = images.next_rows(6)
    assert sorted(batch.documents[:, 0].tolist()) == list(range(6))
    for i, number in enumerate(batch.documents[:, 0].tolist()):
        assert model.processor is not None
        by_hand = model.processor(images=[pictures[number]], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(batch.pixels["pixel_values"][i], by_hand)


def test_the_columns_are_found_by_what_they_hold(
    dataset: datasets.Dataset, vit: LoadedModel, pictures: Pictures
) -> None:
    rows = ImageRows(dataset, vit, ImageConfig(held_out=0), held_out=False)
    check(rows, pictures(6), vit)
    assert rows.source.labels == [0, 1] * 3
    assert rows.source.classes == ("a", "b")


def test_masks_are_a_column(dataset: datasets.Dataset, vit: LoadedModel) -> None:
    rows = ImageRows(dataset, vit, ImageConfig(held_out=0, mask_column="mask"), held_out=False)
    batch = rows.next_rows(6)
    assert batch.labels is not None
    assert batch.labels[:, 1:].tolist() == [[i] * 4 for i in batch.documents[:, 0].tolist()]


def test_streamed_and_saved_ones_give_the_same(
    dataset: datasets.Dataset, vit: LoadedModel, pictures: Pictures, tmp_path: Path
) -> None:
    streamed = ImageRows(dataset.to_iterable_dataset(), vit, ImageConfig(held_out=0), held_out=False, repeat=True)
    check(streamed, pictures(6), vit)
    assert streamed.source.labels == [0, 1] * 3
    assert streamed.next_rows(1).documents[0, 0] == 0  # another epoch
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "saved")
    check(ImageRows(tmp_path / "saved", vit, ImageConfig(held_out=0), held_out=False), pictures(6), vit)


def test_the_split_does_not_depend_on_how_it_is_read(dataset: datasets.Dataset, vit: LoadedModel) -> None:
    sides = []
    for data in (dataset, dataset.to_iterable_dataset()):
        rows = ImageRows(data, vit, ImageConfig(held_out=0.5), held_out=True)
        sides.append(sorted(i for batch in rows.batches(3) for i in batch.documents[:, 0].tolist()))
    assert sides[0] == sides[1]
    assert 0 < len(sides[0]) < 6


def test_what_is_not_there_is_named(dataset: datasets.Dataset) -> None:
    with pytest.raises(UnweaveError, match="has no column 'pictur'; did you mean 'picture'"):
        open_images(dataset, ImageConfig(column="pictur"))
    with pytest.raises(UnweaveError, match="has no column of images; there are 'note', 'kind'"):
        open_images(dataset.select_columns(["note", "kind"]), ImageConfig())
    with pytest.raises(UnweaveError, match="has no split 'train'; there are 'test'"):
        open_images(datasets.DatasetDict({"test": dataset}), ImageConfig())
