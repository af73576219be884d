"""A source of images: how many there are, what they are called, and one of them at a time.

An `Entry` is an image before it is decoded. Its content, the bytes of the file or the pixels in memory, decides which
side of the held-out split it is on, so that most of what is not wanted is never decoded.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Integer
from torch import Tensor

from unweave._errors import UnweaveError

if TYPE_CHECKING:
    from PIL.Image import Image

Ready: TypeAlias = "dict[str, Tensor]"
"""The inputs of a model for one image, without a batch axis."""

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error)
"""What Pillow and others raise for damaged files."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One image that has been found but not decoded. What is wrong with it is raised when it is opened."""

    name: str
    content: bytes
    """What the held-out split goes by."""
    open: Callable[[], Image | Ready]
    open_mask: Callable[[], Integer[np.ndarray, "h w"]] | None = None
    """The class of each pixel, where there is a segmentation mask."""
    label: int | None = None
    labels: Integer[np.ndarray, " patches"] | None = None
    """Classes of the patches, of inputs that come with them."""


@dataclass(eq=False)
class Images:
    """Images that can be read in any order by number, or, of a stream, only one after the other."""

    name: str
    """The data in words."""
    fingerprint: str
    """Hash of what was listed, to notice that the data changed between two runs."""
    names: list[str] = field(repr=False)
    """Name of each image, by number; of a stream, of those read so far."""
    labels: list[int] | None = field(default=None, repr=False)
    """Class of each image, by number, if it is known; -1 where it is not."""
    classes: tuple[str, ...] = ()
    """Names of the classes of `labels`."""
    label_dtype: np.dtype[Any] | None = None
    """Type that the labels of patches need; None: there are none."""
    entry: Callable[[int], Entry] | None = field(default=None, repr=False)
    """One image by its number, from any thread; None of a stream."""
    size_of: Callable[[int], tuple[int, int]] | None = field(default=None, repr=False)
    """Height and width of an image without decoding it."""
    stream: Callable[[], Iterator[Callable[[], Entry]]] | None = field(default=None, repr=False)
    """All images from the first one on, of a stream, each to be got from any thread."""
    ready: bool = False
    """The entries are inputs of the model as they are, and no images."""
    first: Entry | None = field(default=None, repr=False)
    """Of ready inputs the first one, which the others are like."""
    given: str | None = None
    """The path or name that they were opened by, if it was one."""
    once: bool = False
    """A stream that can be read a single time."""

    def __len__(self) -> int:
        return len(self.names)

    def to_json(self) -> dict[str, Any]:
        """Names, classes and class of each image by number, for a file beside activations."""
        known = {"names": self.names, "classes": list(self.classes), "labels": self.labels}
        return {"name": self.name, "source": self.given} | known

    def register(self, number: int, name: str, label: int | None) -> None:
        """Note the name and class of an image of a stream; they come in order."""
        if self.stream is not None and number == len(self.names):
            self.names.append(name)
            if label is not None and self.labels is None:
                self.labels = [-1] * number
            if self.labels is not None:
                self.labels.append(-1 if label is None else label)


def digest(parts: Iterable[str]) -> str:
    """Hash of some names, in order."""
    return hashlib.blake2b("\n".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def unsigned(n_classes: int) -> np.dtype[Any]:
    """The smallest unsigned type with so many values (pitfall_241: a byte holds 256 classes and no more)."""
    return np.dtype(np.min_scalar_type(n_classes - 1))


def pillow() -> Any:
    """The module `PIL.Image`."""
    try:
        from PIL import Image, ImageOps  # noqa: F401  (the second is found as an attribute of the package)
    except ImportError:
        raise UnweaveError("images need Pillow: pip install 'unweave[vision]'.") from None
    return Image


@contextmanager
def _opened(content: bytes) -> Iterator[Image]:
    module = pillow()
    try:
        with module.open(BytesIO(content)) as image:
            image.load()
            yield image
    except module.UnidentifiedImageError as error:  # whose message is about an address in memory
        raise ValueError("no kind of image that can be read") from error
    except module.DecompressionBombError as error:  # of no kind that means a damaged file
        raise ValueError(str(error)) from error


def decode(content: bytes) -> Image:
    """The image in a file's bytes, upright."""
    from PIL import ImageOps

    with _opened(content) as image:
        return ImageOps.exif_transpose(image)


def decode_mask(content: bytes) -> Integer[np.ndarray, "h w"]:
    """The classes in a file's bytes; raises ValueError for pixels that are no class numbers."""
    with _opened(content) as image:
        return class_numbers(image)


def class_numbers(mask: Any) -> Integer[np.ndarray, "h w"]:
    """The class of each pixel, of a mask that is an image or an array."""
    pixels = np.asarray(mask)
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8)
    if pixels.ndim != 2 or pixels.dtype.kind not in "ui":
        raise ValueError(f"its mask has shape {pixels.shape} and type {pixels.dtype}: not one class number per pixel")
    return pixels


def file_entry(name: str, path: Path, label: int | None = None, mask: Path | None = None) -> Entry:
    """An image file, read once; its mask is read when it is needed."""
    content = path.read_bytes()
    open_mask = None if mask is None else lambda: decode_mask(mask.read_bytes())
    return Entry(name, content, lambda: decode(content), open_mask, label)


def file_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, upright, from its header."""
    with pillow().open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def pixels_of(image: Any) -> Image:
    """An image that is in memory: a PIL image, an array (h, w[, c]) or a tensor (c, h, w) of bytes."""
    module = pillow()
    if isinstance(image, module.Image):
        from PIL import ImageOps

        upright: Image = ImageOps.exif_transpose(image)
        return upright
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ValueError(f"it has shape {pixels.shape} and type {pixels.dtype}, where pixels are bytes from 0 to 255")
    made: Image = module.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    return made


def memory_entry(name: str, image: Any, label: int | None = None, mask: Any = None) -> Entry:
    """An image in memory, or the path of one."""
    if isinstance(image, str | Path):
        return file_entry(name, Path(image), label)
    pillow_image = pixels_of(image)
    content = f"{pillow_image.mode} {pillow_image.size} ".encode() + pillow_image.tobytes()
    return Entry(name, content, lambda: pillow_image, None if mask is None else lambda: class_numbers(mask), label)


def is_image(value: Any) -> bool:
    """Whether a value is an image in memory or the path of one."""
    if isinstance(value, str | Path | Tensor | np.ndarray):
        return True
    return type(value).__module__.startswith("PIL.") and hasattr(value, "getbands")


def ready_entry(number: int, pair: Sequence[Any]) -> Entry:
    """An `(input, metadata)` pair: the input as the model takes it, a tensor or tensors by name."""
    inputs, metadata = pair
    inputs = {"pixel_values": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    if "pixel_values" not in inputs or not all(isinstance(value, Tensor) for value in inputs.values()):
        raise UnweaveError(
            f"input {number} is neither a tensor nor tensors by name with 'pixel_values' among them, as the model "
            "takes them."
        )
    known = metadata if isinstance(metadata, dict) else {}
    content = b"".join(value.detach().cpu().contiguous().numpy().tobytes() for value in inputs.values())
    label, patches = known.get("label"), known.get("labels")
    return Entry(
        name=str(known.get("name", number)),
        content=content,
        open=lambda: inputs,
        label=None if label is None else int(label),
        labels=None if patches is None else np.asarray(patches).reshape(-1),
    )
