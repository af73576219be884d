"""Writing saev's shards from a cache of ours, or from a model at work, so that saev's own loaders read them."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from unweave._errors import UnweaveError
from unweave._files import atomic_folder, write_json
from unweave.activations.cache.saev_format import (
    FLOAT_BYTES,
    LABELS,
    METADATA,
    OLD_NAMES,
    SHARDS,
    SaevMetadata,
    in_forward_order,
    shard_name,
)
from unweave.activations.cache.store import Store
from unweave.activations.live import ActivationStream, Pass
from unweave.models import TOKEN_KINDS

NO_DATA = "Ti4="
"""What stands for "data": two bytes in base64 which, unpickled, are None, and which can run no code."""
_CHUNK_BYTES = 64 << 20
_LOOK_AHEAD = 1024
_REGISTER, _CLS = TOKEN_KINDS.index("register"), TOKEN_KINDS.index("cls")
_NUMBER = re.compile(r"(?<![\w-])-?\d+(?!\w)")


def write_saev_shards(
    source: Store | ActivationStream,
    root: str | Path,
    *,
    family: str,
    ckpt: str,
    n_examples: int | None = None,
    layers: Mapping[str, int] | None = None,
    dataset: str = "",
    pixel_agg: Literal["majority", "prefer-fg"] | None = None,
    max_tokens_per_shard: int = 2_400_000,
    protocol: Literal["1", "2.1"] = "2.1",
) -> Path:
    """Write image activations as saev's shards.

    Examples are numbered in the order in which images come. Register tokens, which the format has no place for, are
    left out. No shard of nothing but zeros is written where the examples fill the last one, which saev's own writer
    does. The metadata's "data", in saev a pickle of how the images were loaded, is a pickle of `None` under protocol
    2.1 and the name of the data set under protocol 1: saev's readers of activations don't look at it.

    Args:
        source: A store of images (`open_cache(folder).train`), or a stream over images, whose masks must leave every
            token of an image that a shard is to hold: `MaskConfig(token_kinds=("cls", "patch"), norm_multiple=None)`.
        root: Where to write.
        family: Family of the model, as saev calls it: "clip", "siglip", "dinov2", ...
        ckpt: Name of the model's checkpoint.
        n_examples: How many images to write. None: all that a store has; a stream needs a number.
        layers: The layer that each hook is, by hook. None: the one number in the hook's name.
        dataset: What to call the data set.
        pixel_agg: How pixels became patch labels.
        max_tokens_per_shard: Tokens of a file, those of all layers counted.
        protocol: "2.1" writes `root/saev/shards/<hash>`, with `shards.json` and, where patches have labels,
            `labels.bin`. "1" writes `root/<hash>` for saev 0.1, without either.

    Returns:
        The folder that `SaevShards` and saev open.

    Raises:
        UnweaveError: Rows that are not whole images of one size; hooks of several widths, or without a layer;
            more than 256 classes; fewer images than asked for; a folder that is there; a full disk.
    """
    if protocol not in ("1", "2.1"):
        raise UnweaveError(f'protocol={protocol!r} is neither "1" nor "2.1".')
    if isinstance(source, ActivationStream) and n_examples is None:
        raise UnweaveError("a stream does not know how many images it has: say how many to write with n_examples.")
    passes = _of_stream(source) if isinstance(source, ActivationStream) else _of_store(source, n_examples)
    if (first := next(passes, None)) is None:
        raise UnweaveError("there are no images to write.")
    slots = _slots(first.activations, layers)
    images = _Images(first, slots)
    if n_examples is None:
        assert not isinstance(source, ActivationStream)
        n_examples = source.n_rows // len(images.kinds)
    patches = int((images.kept != _CLS).sum())
    metadata = SaevMetadata(
        family, ckpt, tuple(slots.values()), patches, images.cls, images.d, n_examples, max_tokens_per_shard
    )
    if n_examples < 1 or not patches or not metadata.examples_per_shard:
        raise UnweaveError(
            f"n_examples={n_examples} images of {patches} patches, at {len(slots)} layers, do not fill a shard of "
            f"max_tokens_per_shard={max_tokens_per_shard}: each of these must be at least 1, and a shard hold an image."
        )
    described = _describe(metadata, protocol, dataset, pixel_agg)
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    folder = Path(root).expanduser() / (digest if protocol == "1" else f"saev/shards/{digest[:8]}")
    if folder.exists():
        raise UnweaveError(f"{folder} is there already: delete it to write these shards anew.")
    try:
        with atomic_folder(folder) as temporary:
            needed, free = len(metadata.counts()) * metadata.shard_bytes, shutil.disk_usage(temporary).free
            if needed > free:
                raise UnweaveError(f"the shards need {needed / 1e9:.3g} GB, and the disk has {free / 1e9:.3g} GB.")
            with _Writer(temporary, metadata, labels=protocol != "1") as writer:
                for done in chain([first], passes):
                    writer.append(*images.blocks(done))
                    if writer.written == n_examples:
                        break
            if writer.written < n_examples:
                raise UnweaveError(f"{n_examples:,} images were asked for, and there are {writer.written:,}.")
            write_json(temporary / METADATA, described)
            if protocol != "1":
                shards = [{"name": shard_name(i), "n_examples": n} for i, n in enumerate(metadata.counts())]
                write_json(temporary / SHARDS, shards)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise UnweaveError(f"saev's shards cannot be written to {folder}: {reason}.") from error
    return folder


# --- where images come from ------------------------------------------------------------------------------------------


def _of_stream(stream: ActivationStream) -> Iterator[Pass]:
    while True:
        try:
            done = stream.next_pass()
        except StopIteration:
            return
        yield done


def _of_store(store: Store, n_examples: int | None) -> Iterator[Pass]:
    """The rows of a store, or of so many images of it, some whole images at a time."""
    if not {"documents", "positions", "kinds"} <= set(store.records):
        raise UnweaveError(f"{store.name} does not hold images: it does not know the kinds of its tokens.")
    if not store.n_rows:
        return
    tokens, ahead = 0, _LOOK_AHEAD
    while not tokens:
        tokens = _first_image(store.records["positions"][0:ahead]) or (store.n_rows if ahead >= store.n_rows else 0)
        ahead *= 2
    end = store.n_rows if n_examples is None else min(max(n_examples, 1) * tokens, store.n_rows)
    row_bytes = sum(store.widths.values()) * FLOAT_BYTES
    step = max(_CHUNK_BYTES // (row_bytes * tokens), 1) * tokens
    for at in range(0, end, step):
        stop = min(at + step, end)
        records = {name: torch.from_numpy(np.array(column[at:stop])) for name, column in store.records.items()}
        yield Pass(store.read(at, stop, dtype=torch.float32), records)


def _first_image(positions: NDArray[Any]) -> int:
    """How many rows the first image has; 0 if its end is not among them. An image ends where positions start anew."""
    ends = np.flatnonzero(np.diff(positions) <= 0)
    return int(ends[0]) + 1 if len(ends) else 0


class _Images:
    """What the first image of a source looks like, and so must all others.

    Attributes:
        kinds: Of each of its tokens.
        kept: The kinds of those that shards hold.
        cls: Whether a CLS token comes first.
        d: Width of each hook.
    """

    def __init__(self, first: Pass, hooks: Iterable[str]) -> None:
        if "kinds" not in first.records:
            raise UnweaveError("saev's shards hold images, and these activations do not know kinds of tokens.")
        self._hooks = list(hooks)
        widths = {hook: first.activations[hook].shape[1] for hook in self._hooks}
        self.d = next(iter(widths.values()))
        if len(set(widths.values())) > 1:
            raise UnweaveError(f"saev's shards have one width for all layers, and the hooks have {widths}.")
        positions = first.records["positions"].numpy()
        tokens = _first_image(positions) or len(positions)
        self._positions, self.kinds = positions[:tokens], first.records["kinds"].numpy()[:tokens]
        self._keep = torch.from_numpy(np.flatnonzero(self.kinds != _REGISTER))
        self.kept = self.kinds[self._keep.numpy()]
        self.cls = bool((self.kept[:1] == _CLS).all())
        if (self.kept[1:] == _CLS).any():
            raise UnweaveError("saev's shards have room for one CLS token, in front; the model has others.")

    def blocks(self, done: Pass) -> tuple[Float[Tensor, "n layers tokens d"], Tensor | None]:
        """The images of a pass as they lie in a shard, and the labels of their patches if they have any."""
        tokens, kept = len(self.kinds), self._keep
        n, rest = divmod(len(done.records["positions"]), tokens)
        if rest or not self._alike({name: x.numpy() for name, x in done.records.items()}, n):
            raise UnweaveError(
                f"saev's shards hold whole images of one size, {tokens} tokens each here, and some have others: record "
                "without masks by norm or position, at one image size, and leave out a last image that was cut with "
                "n_examples."
            )
        xs = [done.activations[hook].float().cpu().view(n, tokens, self.d)[:, kept] for hook in self._hooks]
        labels = done.records.get("labels")
        return torch.stack(xs, 1), None if labels is None else labels.view(n, tokens)[:, kept][:, int(self.cls) :]

    def _alike(self, records: Mapping[str, NDArray[Any]], n: int) -> bool:
        tables = {name: records[name].reshape(n, -1) for name in ("documents", "positions", "kinds")}
        documents = tables["documents"]
        return bool(
            (documents == documents[:, :1]).all()
            and (tables["positions"] == self._positions).all()
            and (tables["kinds"] == self.kinds).all()
        )


def _slots(hooks: Iterable[str], layers: Mapping[str, int] | None) -> dict[str, int]:
    """The layer of each hook, in ascending order: the order that saev's own recording has."""
    found = {}
    for hook in hooks:
        numbers = [int(number) for number in _NUMBER.findall(hook)]
        if layers is not None and hook in layers:
            found[hook] = layers[hook]
        elif layers is None and len(numbers) == 1:
            found[hook] = numbers[0]
        else:
            raise UnweaveError(f"which layer is the hook {hook!r}? Say it with layers={{{hook!r}: ...}}.")
    if len(set(found.values())) < len(found) or in_forward_order(tuple(sorted(found.values()))) is None:
        raise UnweaveError(f"the layers must differ, and be counted from the same end: {found}.")
    return dict(sorted(found.items(), key=lambda item: item[1]))


# --- what is written -------------------------------------------------------------------------------------------------


class _Writer:
    """Appends images to the files of a folder. Every file gets its full size; what no image fills reads as zeros."""

    def __init__(self, folder: Path, metadata: SaevMetadata, *, labels: bool) -> None:
        self._folder, self._metadata, self._labels = folder, metadata, labels
        self._file: BinaryIO | None = None
        self.written = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def append(self, images: Float[Tensor, "n layers tokens d"], labels: Tensor | None) -> None:
        """Append images, of which those beyond the last that was asked for are left out."""
        images = images[: self._metadata.n_examples - self.written]
        if self._labels and labels is not None:
            self._append_labels(labels[: len(images)])
        while len(images):
            number, filled = divmod(self.written, self._metadata.examples_per_shard)
            if not filled:
                self._close()
                self._file = (self._folder / shard_name(number)).open("wb")
            part = images[: self._metadata.examples_per_shard - filled]
            assert self._file is not None
            self._file.write(part.contiguous().numpy().astype("<f4", copy=False).data)
            self.written += len(part)
            images = images[len(part) :]

    def _append_labels(self, labels: Tensor) -> None:
        if labels.numel() and int(labels.max()) > 255:
            raise UnweaveError(f"saev's labels take one byte, and there is a class {int(labels.max())}.")
        with (self._folder / LABELS).open("ab") as file:
            file.write(labels.to(torch.uint8).contiguous().numpy().data)

    def _close(self) -> None:
        if self._file is not None:
            self._file.truncate(self._metadata.shard_bytes)
            self._file.close()
            self._file = None


def _describe(metadata: SaevMetadata, protocol: str, dataset: str, pixel_agg: str | None) -> dict[str, Any]:
    """What `metadata.json` says."""
    known = {name: value if name != "layers" else list(value) for name, value in asdict(metadata).items()}
    if protocol == "1":
        return {OLD_NAMES.get(name, (name,))[0]: value for name, value in known.items()} | {"seed": 0, "data": dataset}
    more = {"data": NO_DATA, "dataset": dataset, "pixel_agg": pixel_agg, "dtype": "float32", "protocol": protocol}
    return known | more
