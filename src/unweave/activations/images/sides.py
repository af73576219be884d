"""Both sides of the held-out split of images, as rows of a model."""

from __future__ import annotations

from dataclasses import fields

from unweave._errors import UnweaveError
from unweave.activations.config import DataConfig
from unweave.activations.images.config import ImageConfig
from unweave.activations.images.listing import ImageData, open_images
from unweave.activations.images.rows import ImageRows
from unweave.models import LoadedModel


def image_sides(
    data: ImageData, model: LoadedModel, config: ImageConfig | DataConfig | None = None
) -> tuple[ImageRows, ImageRows | None]:
    """The training images and, if there are any, the held-out ones.

    Args:
        data: Anything that `open_images` takes.
        model: The vision model.
        config: How to read them; of a `DataConfig`, which is for text, what images have as well (`held_out`, `seed`,
            and what to read of a Hugging Face dataset).

    Raises:
        UnweaveError: What `ImageRows` raises; an iterator with held-out images, for which it would be read twice.
    """
    if isinstance(config, DataConfig):
        shared = {field.name for field in fields(DataConfig)} & {field.name for field in fields(ImageConfig)}
        config = ImageConfig(**{name: getattr(config, name) for name in shared})
    config = config or ImageConfig()
    source = open_images(data, config)  # once for both, so that each knows the names that the other has read
    if source.once and config.held_out:
        raise UnweaveError(
            "an iterator can be read once, for the training images or for the held-out ones: give a list or another "
            "iterable, or keep none with held_out=0."
        )
    training = ImageRows(source, model, config, held_out=False)
    return training, ImageRows(source, model, config, held_out=True) if config.held_out else None
