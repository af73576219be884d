"""Find images: in folders, in Hugging Face datasets, in memory, or in any iterable of `(input, metadata)`.

`list_folder` is the one place where files are found: what it lists is what is counted, named and read (pitfall_226).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from unweave._errors import UnweaveError, nearest_beside
from unweave.activations.hf_datasets import (
    is_hf_dataset,
    is_saved_dataset,
    is_written_as_path,
    load_by_name,
    load_saved,
)
from unweave.activations.images.config import ImageConfig
from unweave.activations.images.hf_images import dataset_images
from unweave.activations.images.source import (
    Entry,
    Images,
    digest,
    file_entry,
    file_size,
    is_image,
    memory_entry,
    pillow,
    pixels_of,
    ready_entry,
    unsigned,
)
from unweave.activations.tokenized.format import find_token_folder

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
DIGITS = "digits"
"""The name of scikit-learn's handwritten digits."""
_MASK_FOLDERS = ("masks", "annotations", "segmentations")

ImageData: TypeAlias = "str | Path | Iterable[Any] | Images"
"""What can be opened: see `open_images`."""


@dataclass(frozen=True)
class Listing:
    """The images of a folder.

    Attributes:
        files: The images.
        names: Their paths within the folder.
        classes: The folders that they are in, one below the top; none if not all of them are in one.
        masks: The mask of each image, if the folder holds masks.
    """

    files: list[Path]
    names: list[str]
    classes: tuple[str, ...]
    labels: list[int] | None
    masks: list[Path] | None


def open_images(data: ImageData, config: ImageConfig) -> Images:
    """Find the images that `data` holds.

    Args:
        data: "digits" (scikit-learn's handwritten digits); an image file or a folder of them, where folders in it are
            classes and the folders `images` and `masks` (or `annotations`) are images and segmentation masks; a
            Hugging Face dataset (a name on the hub, a saved folder or an object); images in memory (a list, or an
            array (n, h, w[, c])) as PIL images, byte arrays (h, w[, c]), byte tensors (c, h, w) or paths; or an
            iterable of `(input, metadata)`, the input being what the model takes for one image and the metadata a
            dictionary in which "name", "label" and "labels" (of patches) count.
        config: Says which columns and split of a dataset to read, and what masks hold.

    Raises:
        UnweaveError: There are no images, or they are nothing of the above.
    """
    if isinstance(data, Images):
        return data
    if isinstance(data, str | Path):
        found = digits() if data == DIGITS else _open_path(data, config)
        found.given = str(data)
        return found
    if is_hf_dataset(data):
        return dataset_images(data, "the dataset", config)
    if isinstance(data, np.ndarray | Tensor | Sequence):
        return _in_memory(data, config)
    if isinstance(data, Iterable):
        return _iterable(data)
    raise UnweaveError(f"data of type {type(data).__name__} is no path, name, dataset or iterable of images.")


def digits() -> Images:
    """scikit-learn's 1797 handwritten digits of 8 × 8 pixels, with their classes.

    Raises:
        UnweaveError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UnweaveError("the digits come with scikit-learn: pip install 'unweave[vision]'.") from None
    found = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
    names = [f"digit {i}" for i in range(len(pixels))]
    labels = [int(label) for label in found.target]
    return Images(
        name="scikit-learn's digits", fingerprint=digest(names), names=names, labels=labels,
        classes=tuple(map(str, range(10))), entry=lambda i: memory_entry(names[i], pixels[i], labels[i]),
        size_of=lambda i: (8, 8),
    )  # fmt: skip


def list_folder(folder: Path) -> Listing:
    """Every image in a folder and the folders in it, in the order of their paths; hidden files do not count.

    Raises:
        UnweaveError: There are none, or images without a mask where there are masks.
    """
    if find_token_folder(folder) is not None:
        raise UnweaveError(f"{folder} holds activations or tokens, and no images: name the images they were made from.")
    masks = next((folder / name for name in _MASK_FOLDERS if (folder / name).is_dir()), None)
    top = folder / "images" if masks is not None and (folder / "images").is_dir() else folder
    files = _images_in(top)
    if not files:
        raise UnweaveError(f"the folder {top} holds no {', '.join(SUFFIXES)} file.")
    parts = [file.relative_to(top).parts for file in files]
    names = ["/".join(part) for part in parts]
    if masks is not None and top != folder:
        return Listing(files, names, (), None, _masks_of(names, masks))
    if any(len(part) < 2 for part in parts):
        return Listing(files, names, (), None, None)
    classes = tuple(sorted({part[0] for part in parts}))
    number = {name: i for i, name in enumerate(classes)}
    return Listing(files, names, classes, [number[part[0]] for part in parts], None)


def _images_in(folder: Path) -> list[Path]:
    found = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    visible = (file for file in found if not any(p.startswith(".") for p in file.relative_to(folder).parts))
    return sorted(visible, key=lambda file: file.relative_to(folder).parts)


def _masks_of(names: list[str], folder: Path) -> list[Path]:
    """The mask of each image: the file of the same name, whatever its suffix."""
    found = {file.relative_to(folder).with_suffix("").as_posix(): file for file in _images_in(folder)}
    stems = [Path(name).with_suffix("").as_posix() for name in names]
    if missing := [name for name, stem in zip(names, stems, strict=True) if stem not in found]:
        raise UnweaveError(f"{len(missing)} images have no mask in {folder}: {', '.join(missing[:20])}.")
    return [found[stem] for stem in stems]


def _open_path(data: str | Path, config: ImageConfig) -> Images:
    path = Path(data).expanduser()
    if path.is_dir() and is_saved_dataset(path):
        return dataset_images(load_saved(path), str(data), config)
    if path.is_dir():
        return _of_files(str(path), list_folder(path), config)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UnweaveError(f"{path} is none of the kinds of images that can be read: {', '.join(SUFFIXES)}.")
        return _of_files(str(path), Listing([path], [path.name], (), None, None), config)
    if is_written_as_path(data):
        raise UnweaveError(f"there is no image or folder {data}{nearest_beside(path) or '.'}")
    return dataset_images(load_by_name(str(data), config), str(data), config)


def _of_files(name: str, listing: Listing, config: ImageConfig) -> Images:
    files, names, labels, masks = listing.files, listing.names, listing.labels, listing.masks

    def entry(i: int) -> Entry:
        label, mask = None if labels is None else labels[i], None if masks is None else masks[i]
        return file_entry(names[i], files[i], label, mask)

    sizes = (f"{n}\t{file.stat().st_size}" for n, file in zip(names, files, strict=True))
    return Images(
        name=name, fingerprint=digest(sizes), names=names, labels=labels, classes=listing.classes, entry=entry,
        size_of=lambda i: file_size(files[i]), label_dtype=None if masks is None else _label_type(masks, config),
    )  # fmt: skip


def _label_type(masks: list[Path], config: ImageConfig) -> np.dtype[Any]:
    """The type that the masks' classes need, from their headers alone."""
    if config.n_classes is not None:
        return unsigned(config.n_classes)
    bits = 8
    for mask in masks:
        try:
            with pillow().open(mask) as image:
                bits = max(bits, {"I": 32}.get(image.mode, 16 if image.mode.startswith("I;16") else 8))
        except (OSError, ValueError, SyntaxError):
            continue  # it is counted as bad when its image is read
    return unsigned(1 << bits)


def _in_memory(data: Any, config: ImageConfig) -> Images:
    n = len(data)
    if not n:
        raise UnweaveError("the list of images is empty.")
    pair = isinstance(data, Sequence) and isinstance(data[0], tuple | list) and len(data[0]) == 2
    if not pair and not is_image(data[0]):
        raise UnweaveError(
            f"a list of {type(data[0]).__name__} holds neither images nor pairs of a model's input and its metadata."
        )
    names = [str(data[i]) if isinstance(data[i], str | Path) else f"image {i}" for i in range(n)]
    images = Images(name=f"{n} images in memory", fingerprint=digest(names), names=names)
    if pair:
        found = [ready_entry(i, data[i]) for i in range(n)]
        images.ready, images.first, images.entry = True, found[0], found.__getitem__
        images.names = [entry.name for entry in found]
        _note_labels(images, found)
        return images

    def size_of(i: int) -> tuple[int, int]:
        if isinstance(data[i], str | Path):
            return file_size(Path(data[i]))
        width, height = pixels_of(data[i]).size
        return height, width

    images.entry, images.size_of = lambda i: memory_entry(names[i], data[i]), size_of
    return images


def _note_labels(images: Images, entries: Sequence[Entry]) -> None:
    if any(entry.label is not None for entry in entries):
        images.labels = [-1 if entry.label is None else entry.label for entry in entries]
    patches = [entry.labels for entry in entries if entry.labels is not None]
    if patches:
        images.label_dtype = unsigned(int(max(labels.max() for labels in patches)) + 1)


def _iterable(data: Iterable[Any]) -> Images:
    iterator = iter(data)
    first = next(iterator, None)
    if first is None:
        raise UnweaveError("the iterable of images is empty.")
    ready = isinstance(first, tuple | list) and len(first) == 2
    if not ready and not is_image(first):
        raise UnweaveError(f"an iterable of {type(first).__name__} gives neither images nor (input, metadata) pairs.")
    once = iterator is data
    rest: list[Iterable[Any]] = [chain([first], iterator)]

    def stream() -> Iterator[Callable[[], Entry]]:
        items = rest.pop() if rest else () if once else data  # a generator is empty the second time
        for i, item in enumerate(items):
            name = str(item) if isinstance(item, str | Path) else f"image {i}"
            yield partial(ready_entry, i, item) if ready else partial(memory_entry, name, item)

    images = Images("the iterable of images", fingerprint="", names=[], stream=stream, ready=ready, once=once)
    if ready:
        images.first = ready_entry(0, first)
        _note_labels(images, [images.first])
        images.labels = None
    return images
