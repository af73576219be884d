"""Reading saev's shards: vision activations as files of float32, one slot for each layer, in both of its protocols."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unweave._errors import UnweaveError
from unweave.activations.cache.foreign import Computed, MappedStore, as_tensor
from unweave.activations.cache.saev_format import (
    LABELS,
    in_forward_order,
    listed_shards,
    problems,
    read_metadata,
)
from unweave.activations.cache.store import Column
from unweave.models import TOKEN_KINDS

_PATCH, _CLS = TOKEN_KINDS.index("patch"), TOKEN_KINDS.index("cls")


class SaevShards(MappedStore):
    """saev's shards as a `Store`: a hook `"layer.N"` for each layer, a row for each token of each image.

    Rows come image by image, the CLS token (if there is one) in front of the patches. Records: "documents" (number of
    the image, from 0), "positions" (0 is the CLS token), "kinds", and "labels" where there is `labels.bin` (0 on CLS
    tokens). Files are mapped and never copied as a whole; the zeros that fill the last one are not rows.

    Args:
        folder: The folder with `metadata.json`. Its name and place don't matter.
        layer_order: saev fills its slots in the order in which the model runs through its layers, but lists the layers
            in the order in which they were asked for. "listed": slot `i` is layer `i` of the list, as saev reads it;
            where these two orders differ, a warning says so. "forward": slots are the layers in ascending order.
        allow_fewer: Read what `shards.json` lists even if `metadata.json` counts more examples.

    Attributes:
        context: Tokens of an image.
        metadata: Model, layers and sizes. The pickle in `metadata.json` is never looked at.

    Raises:
        UnweaveError: Metadata that are missing, damaged or of another kind; files that are missing or of another size
            than the metadata imply (all of them are named).
    """

    def __init__(
        self, folder: str | Path, *, layer_order: Literal["listed", "forward"] = "listed", allow_fewer: bool = False
    ) -> None:
        if layer_order not in ("listed", "forward"):
            raise UnweaveError(f'layer_order={layer_order!r} is neither "listed" nor "forward".')
        folder = Path(folder).expanduser()
        self.metadata = metadata = read_metadata(folder)
        shards = listed_shards(folder, metadata, allow_fewer=allow_fewer)
        if not shards:
            raise UnweaveError(f"the shards of {folder} hold no examples.")
        if bad := problems(folder, metadata, shards):
            raise UnweaveError(f"saev's shards in {folder} are damaged or incomplete: {'; '.join(bad)}.")
        layers = _slots(folder, metadata.layers, layer_order)

        maps = [as_tensor(np.memmap(folder / name, "<f4", "r", shape=metadata.shard_shape))[:n] for name, n in shards]
        self.context = tokens = metadata.tokens
        n_examples = sum(n for _, n in shards)
        n_rows = n_examples * tokens
        records: dict[str, Column] = {
            "documents": Computed(n_rows, np.int64, lambda rows: rows // tokens),
            "positions": Computed(n_rows, np.int32, lambda rows: rows % tokens),
            "kinds": Computed(n_rows, np.uint8, self._kinds),
        }
        if (folder / LABELS).exists():
            patches = metadata.content_tokens_per_example
            self._classes = np.memmap(folder / LABELS, np.uint8, "r", shape=(n_examples, patches))
            records["labels"] = Computed(n_rows, np.uint8, self._labels)
        super().__init__(
            f"saev's shards {folder}",
            {f"layer.{layer}": [part[:, slot] for part in maps] for slot, layer in enumerate(layers)},
            records,
            ["saev", asdict(metadata), layers, [n for _, n in shards], sorted(records)],
        )

    def _kinds(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        first = rows % self.metadata.tokens == 0
        return np.where(first & self.metadata.cls_token, np.uint8(_CLS), np.uint8(_PATCH))

    def _labels(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        patch = rows % self.metadata.tokens - self.metadata.cls_token
        labels: NDArray[np.uint8] = self._classes[rows // self.metadata.tokens, patch]
        return np.where(patch < 0, np.uint8(0), labels)


def _slots(folder: Path, layers: tuple[int, ...], order: Literal["listed", "forward"]) -> tuple[int, ...]:
    """The layer of each slot."""
    known = in_forward_order(layers)
    if order == "forward" and known is None:
        raise UnweaveError(
            f"{folder} lists the layers {list(layers)}, whose order depends on how many the model has: "
            'layer_order="forward" needs all of them counted from the same end.'
        )
    if order == "forward":
        return tuple(sorted(layers))
    if not known:
        what = f"{sorted(layers)}" if known is False else "another order"
        how = ' Pass layer_order="forward" to name them so.' if known is False else ""
        warnings.warn(
            f"{folder} lists the layers {list(layers)}, but saev records them as the model runs through them, which "
            f"makes it {what}: its layers may bear each other's names.{how}",
            stacklevel=3,
        )
    return layers
