"""Images from the `datasets` library. They stay encoded until they are wanted: what is hashed is the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from unweave._errors import UnweaveError, nearest
from unweave.activations.images.config import ImageConfig
from unweave.activations.images.source import Entry, Images, decode, decode_mask, unsigned


def dataset_images(data: Any, name: str, config: ImageConfig) -> Images:
    """The images of a dataset, streamed or not.

    Raises:
        UnweaveError: There is no such split or column, or no column of images.
    """
    import datasets

    if hasattr(data, "keys"):
        if config.split not in data:
            hint = nearest(config.split, data) or f"; there are {', '.join(map(repr, data))}."
            raise UnweaveError(f"{name} has no split {config.split!r}{hint}")
        data = data[config.split]
    features = data.features or {}
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    for column in (config.column, config.label_column, config.mask_column):
        if column is not None and column not in features:
            raise UnweaveError(f"{name} has no column {column!r}{nearest(column, features) or _there_are(features)}")
    column = config.column or next((key for key in images if key != config.mask_column), None)
    if column is None or column not in images:
        raise UnweaveError(f"{name} has no column of images{_there_are(features)}")
    label = config.label_column or next(iter(classes), None)
    for key in (column, config.mask_column):
        if key is not None:
            data = data.cast_column(key, datasets.Image(decode=False))
    data = data.select_columns([key for key in (column, label, config.mask_column) if key is not None])

    def entry(number: int, row: dict[str, Any]) -> Entry:
        image = row[column]
        content = _bytes_of(image)
        mask = None if config.mask_column is None else row[config.mask_column]
        return Entry(
            name=image.get("path") or f"{name}[{number}]",
            content=content,
            open=lambda: decode(content),
            open_mask=None if mask is None else lambda: decode_mask(_bytes_of(mask)),
            label=None if label is None or row[label] is None else int(row[label]),
        )

    found = Images(
        name=name,
        fingerprint=str(getattr(data, "_fingerprint", "")),
        names=[],
        classes=tuple(features[label].names) if label in classes else (),
        label_dtype=None if config.mask_column is None else unsigned(config.n_classes or 256),
    )
    if isinstance(data, datasets.IterableDataset):
        found.stream = lambda: _streamed(data, entry)
        return found
    rows = data.with_format(None)
    found.names = [f"{name}[{i}]" for i in range(len(rows))]
    if label is not None:
        found.labels = [-1 if value is None else int(value) for value in rows[label]]
    found.entry = lambda i: entry(i, rows[i])
    return found


def _streamed(data: Any, entry: Callable[[int, dict[str, Any]], Entry]) -> Iterator[Callable[[], Entry]]:
    for i, row in enumerate(data):
        yield partial(entry, i, row)


def _bytes_of(image: Any) -> bytes:
    """The file that a row holds, or names."""
    return bytes(image["bytes"]) if image.get("bytes") is not None else Path(image["path"]).read_bytes()


def _there_are(features: Any) -> str:
    return f"; there are {', '.join(map(repr, features))}." if features else "; it does not say what columns it has."
