"""What counts as an image, and what it is called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unweave._errors import UnweaveError
from unweave.activations import ImageConfig, open_images
from unweave.activations.images import Images, list_folder
from unweave.activations.split import held_out_score

CONFIG = ImageConfig()
Pictures = Callable[..., list[Image.Image]]


def arrays(images: Images) -> list[np.ndarray]:
    assert images.entry is not None
    return [np.asarray(images.entry(i).open()) for i in range(len(images))]


def test_pitfall_226_what_is_counted_is_what_is_read(folder: Path) -> None:
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "cat" / ".hidden.png").write_bytes(b"")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.png").write_bytes(b"")
    images, listing = open_images(folder, CONFIG), list_folder(folder)
    assert images.names == listing.names
    assert len(images) == len(arrays(images)) == 12
    assert images.names[0] == "cat/01.png"
    assert images.names[-1] == "dog/small/09.png"
    for name, pixels in zip(images.names, arrays(images), strict=True):
        assert np.array_equal(pixels, np.asarray(Image.open(folder / name)))


def test_folders_are_classes(folder: Path) -> None:
    images = open_images(str(folder), CONFIG)
    assert images.classes == ("cat", "dog")
    assert images.labels == [0] * 8 + [1] * 4
    assert images.entry is not None
    assert [images.entry(i).label for i in (0, 11)] == [0, 1]


def test_one_image_outside_of_them_and_there_are_no_classes(folder: Path) -> None:
    Image.new("RGB", (4, 4)).save(folder / "alone.jpg")
    images = open_images(folder, CONFIG)
    assert images.labels is None
    assert images.classes == ()
    assert len(images) == 13


def test_masks_belong_to_the_images_of_their_name(tmp_path: Path) -> None:
    for kind in ("images", "annotations"):
        (tmp_path / kind / "a").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (4, 3)).save(tmp_path / "images" / "a" / f"{i}.jpg")
        Image.fromarray(np.full((3, 4), i, np.uint8)).save(tmp_path / "annotations" / "a" / f"{i}.png")
    images = open_images(tmp_path, CONFIG)
    assert images.entry is not None
    assert images.names == ["a/0.jpg", "a/1.jpg", "a/2.jpg"]
    assert [int(images.entry(i).open_mask()[0, 0]) for i in range(3)] == [0, 1, 2]  # type: ignore[misc]
    (tmp_path / "annotations" / "a" / "1.png").unlink()
    with pytest.raises(UnweaveError, match=r"1 images have no mask in .*annotations: a/1.jpg"):
        open_images(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("pixels", "n_classes", "dtype"),
    [(np.uint8, None, "uint8"), (np.uint16, None, "uint16"), (np.uint16, 200, "uint8"), (np.uint8, 300, "uint16")],
)
def test_pitfall_241_labels_are_as_wide_as_the_classes(
    tmp_path: Path, pixels: type, n_classes: int | None, dtype: str
) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "images" / "0.png")
    Image.fromarray(np.zeros((3, 4), pixels)).save(tmp_path / "masks" / "0.png")
    assert open_images(tmp_path, ImageConfig(n_classes=n_classes)).label_dtype == np.dtype(dtype)


def test_in_memory_there_are_many_kinds_of_images(tmp_path: Path, pictures: Pictures) -> None:
    first = pictures(1)[0]
    first.save(tmp_path / "0.png")
    pixels = np.asarray(first)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    forms = [first, pixels, tensor, tmp_path / "0.png", str(tmp_path / "0.png")]
    assert all(np.array_equal(found, pixels) for form in forms for found in arrays(open_images([form], CONFIG)))
    grey = pixels[..., :1]
    assert np.array_equal(arrays(open_images([grey], CONFIG))[0], grey[..., 0])
    assert len(open_images(np.stack([pixels] * 3), CONFIG)) == 3
    assert len(open_images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), CONFIG)) == 2


def test_copies_of_an_image_have_one_score_whatever_holds_them(pictures: Pictures) -> None:
    first = pictures(1)[0]
    images = open_images([first, np.asarray(first), first.copy()], CONFIG)
    assert images.entry is not None
    assert len({held_out_score(images.entry(i).content) for i in range(3)}) == 1


def test_a_photograph_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "x.jpg", exif=exif)
    images = open_images(tmp_path, CONFIG)
    assert images.size_of is not None
    assert arrays(images)[0].shape[:2] == images.size_of(0) == (6, 4)


def test_the_digits_have_classes() -> None:
    digits = open_images("digits", CONFIG)
    assert len(digits) == 1797
    assert digits.labels is not None
    assert digits.labels[:3] == [0, 1, 2]
    assert arrays(digits)[0].max() == 239  # 15 of 16
    assert digits.classes == tuple("0123456789")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the list of images is empty"),
        (["x", 3][1:], "a list of int holds neither images nor pairs"),
        (iter([]), "the iterable of images is empty"),
        (iter([3]), "an iterable of int gives neither images nor"),
        (3, "data of type int is no path, name, dataset or iterable of images"),
        ("./nowhere", "there is no image or folder ./nowhere"),
    ],
)
def test_what_is_no_image_data_is_refused(data: object, message: str) -> None:
    with pytest.raises(UnweaveError, match=message):
        open_images(data, CONFIG)  # type: ignore[arg-type]


def test_an_empty_folder_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match=r"holds no \.jpg"):
        open_images(tmp_path, CONFIG)
    (tmp_path / "manifest.json").write_text('{"format": "unweave-cache"}')
    with pytest.raises(UnweaveError, match="holds activations or tokens, and no images"):
        open_images(tmp_path, CONFIG)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UnweaveError, match="none of the kinds of images"):
        open_images(tmp_path / "a.txt", CONFIG)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UnweaveError, match=r"pip install 'unweave\[vision\]'"):
        open_images("digits", CONFIG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "no height and width"),
        ({"size": (8, 8), "aspect": "keep"}, "give max_patches"),
        ({"max_patches": 0}, "less than 1"),
        ({"held_out": 1.0}, "no fraction"),
        ({"workers": -1}, "workers=-1 is negative"),
        ({"n_classes": 0}, "not between 1 and"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UnweaveError, match=message):
        ImageConfig(**settings)  # type: ignore[arg-type]
