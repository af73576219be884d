"""Images as rows of tokens: folders, datasets, memory -> decoded and processed -> what a vision model takes."""

from unweave.activations.images.batch import ImageBatch
from unweave.activations.images.config import ImageConfig
from unweave.activations.images.listing import Listing, digits, list_folder, open_images
from unweave.activations.images.rows import ImageRows
from unweave.activations.images.sides import image_sides
from unweave.activations.images.source import Entry, Images

__all__ = [
    "Entry",
    "ImageBatch",
    "ImageConfig",
    "ImageRows",
    "Images",
    "Listing",
    "digits",
    "image_sides",
    "list_folder",
    "open_images",
]
