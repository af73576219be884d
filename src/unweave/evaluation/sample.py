"""Which tokens an evaluation looks at: held-out rows, read without moving anybody's cursor.

Rows are taken whole, and which ones does not depend on how many are run at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias, TypeVar

from unweave._errors import UnweaveError
from unweave.activations import DataConfig, ImageBatch, ImageConfig, ImageRows, MaskConfig, TokenBatch, TokenRows
from unweave.models import Hook, LoadedModel, resolve_hooks, trained_at
from unweave.sae import SAE, Crosscoder, CrossLayerTranscoder, Transcoder

Config = TypeVar("Config", DataConfig, ImageConfig, MaskConfig)
AnyBatch: TypeAlias = TokenBatch | ImageBatch


def default_data_config(sae: SAE) -> DataConfig:
    """Rows like those that the SAE was trained on, as far as its metadata says; above all, the same held-out text."""
    metadata = sae.metadata
    config = _known(DataConfig, metadata.get("text", {}))
    return replace(
        config, context=metadata.get("context_size") or config.context, bos=metadata.get("prepend_bos", config.bos)
    )


def default_image_config(sae: SAE) -> ImageConfig:
    """Images like those that the SAE was trained on, as far as its metadata says; above all, the same held-out ones."""
    return _known(ImageConfig, sae.metadata.get("images", {}))


def default_masks(sae: SAE) -> MaskConfig:
    """The masks that the SAE was trained with: ours, or SAELens' positions, or the usual ones."""
    if "masks" in sae.metadata:
        return _known(MaskConfig, sae.metadata["masks"])
    bounds = list(sae.metadata.get("seqpos_slice") or [None])
    if all(bound is None for bound in bounds):
        return MaskConfig()
    bounds = bounds if len(bounds) > 1 else [None, *bounds]  # one number is the end, as in slice(n)
    return MaskConfig(positions=":".join("" if bound is None else str(bound) for bound in bounds))


def _known(config: type[Config], values: dict[str, Any]) -> Config:
    """A config from saved values; a setting that this version does not have is passed over."""
    return config(**{field.name: values[field.name] for field in fields(config) if field.name in values})


@dataclass(frozen=True)
class Source:
    """What is read, for the report.

    Attributes:
        name: The data in words.
        split: "held-out", "training", or "all" where nothing was held out or ready batches were given.
        config: How documents or images are laid out; None for ready batches.
        context: Tokens in a row; of images that keep their aspect ratio, at most. None for ready batches.
        bad: Images that could not be read so far, and why.
    """

    name: str
    split: str
    config: DataConfig | ImageConfig | None
    context: int | None = None
    bad: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def open_rows(
    data: Any, model: LoadedModel, config: DataConfig | ImageConfig
) -> Iterator[tuple[TokenRows | ImageRows | Sequence[AnyBatch], Source]]:
    """Open anything that holds tokens or, for a vision model, images, and leave it as it was.

    Args:
        data: `TokenRows` or `ImageRows`, which are read on from where they are, ready batches, or whatever they take.
        model: Its tokenizer reads text, or its processor images.
        config: How to lay out documents or images. With `held_out=0` all of the data are read.
    """
    if isinstance(data, TokenRows | ImageRows):
        side = "held-out" if data.held_out else "training" if data.config.held_out else "all"
        position = data.state_dict()
        try:
            yield data, _source(data, side)
        finally:
            data.load_state_dict(position)
    elif batches := _ready_batches(data):
        yield batches, Source("ready batches", "all", None)
    elif model.vision is not None:
        assert isinstance(config, ImageConfig)
        images = ImageRows(data, model, config, held_out=config.held_out > 0)
        yield images, _source(images, "held-out" if config.held_out else "all")
    else:
        assert isinstance(config, DataConfig)
        rows = TokenRows(data, model.tokenizer, config, held_out=config.held_out > 0)
        yield rows, _source(rows, "held-out" if config.held_out else "all")


def _source(rows: TokenRows | ImageRows, split: str) -> Source:
    bad = rows.bad if isinstance(rows, ImageRows) else {}
    return Source(rows.source.name, split, rows.config, rows.context, bad)


def _ready_batches(data: Any) -> list[AnyBatch]:
    data = [data] if isinstance(data, AnyBatch) else data
    if not isinstance(data, Sequence) or not data or not isinstance(data[0], AnyBatch):
        return []
    widths = {batch.real.shape[1] for batch in data}
    if len(widths) > 1:
        raise UnweaveError(f"the token batches have rows of different lengths: {sorted(widths)}.")
    return list(data)


def passes(rows: TokenRows | ImageRows | Iterable[AnyBatch], prompts: int, tokens: int) -> Iterator[AnyBatch]:
    """Batches of up to `prompts` rows, until they hold `tokens` real tokens or the data end."""
    batches = rows.batches(prompts) if isinstance(rows, TokenRows | ImageRows) else _cut(rows, prompts)
    for batch in batches:
        held = batch.real.sum(1).cumsum(0)
        yield rows_of(batch, slice(int((held < tokens).sum()) + 1))
        tokens -= int(held[-1])
        if tokens <= 0:
            return


def first_rows(batches: Iterator[AnyBatch], n: int) -> list[AnyBatch]:
    """Batches from the front, until they hold `n` rows or there are no more."""
    taken: list[AnyBatch] = []
    for batch in batches:
        taken.append(batch)
        if sum(map(len, taken)) >= n:
            break
    return taken


def _cut(batches: Iterable[AnyBatch], prompts: int) -> Iterator[AnyBatch]:
    for batch in batches:
        for start in range(0, len(batch), prompts):
            yield rows_of(batch, slice(start, start + prompts))


def rows_of(batch: AnyBatch, rows: slice) -> AnyBatch:
    """Some rows of a batch."""
    if isinstance(batch, ImageBatch):
        return batch.rows(rows)
    return TokenBatch(batch.ids[rows], batch.real[rows], batch.documents[rows])


def check_fit(model: LoadedModel, batch: AnyBatch) -> None:
    """Refuse tokens that the model has no embedding for, and rows that are too long for it."""
    if isinstance(batch, ImageBatch):
        return  # what made it knows the model
    longest = getattr(getattr(model.module, "config", None), "max_position_embeddings", None)
    if longest is not None and (context := batch.ids.shape[1]) > longest:
        raise UnweaveError(f"rows of {context} tokens are longer than the {longest} positions of {model.name!r}.")
    try:
        embedding = getattr(model.module, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # a Hugging Face model that does not say where its embedding is
        embedding = None
    known = getattr(embedding, "num_embeddings", None)
    if known is not None and int(batch.ids.max()) >= known:
        raise UnweaveError(
            f"the data hold token id {int(batch.ids.max())}, but {model.name!r} knows the ids from 0 to {known - 1}: "
            "the tokens are those of another tokenizer."
        )


class TokenHash:
    """SHA-256 of the token ids, padding as -1, or of the pixels, in the order of reading, however rows are batched."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, batch: AnyBatch) -> None:
        if isinstance(batch, ImageBatch):
            self._hash.update(batch.pixels["pixel_values"].float().contiguous().numpy().tobytes())
            return
        self._hash.update(batch.ids.masked_fill(~batch.real, -1).contiguous().numpy().tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def hook_of(sae: SAE, model: LoadedModel, name: str | None) -> Hook:
    """The one hook that a name stands for; without a name, where the SAE's metadata say that it belongs."""
    if name is not None:
        return _one_hook(model, name)
    if (known := trained_at(sae.metadata)) is None:
        raise UnweaveError("the SAE's metadata name no hook: say where it belongs with hook='...'.")
    return _one_hook(model, known)


def places_of(sae: SAE, model: LoadedModel, hook: str | None, target: str | None) -> tuple[list[Hook], Hook]:
    """Where a coder reads, and where its output takes the activation's place.

    Args:
        sae: An SAE, which reads where it writes, or a transcoder.
        model: The model that it belongs to.
        hook: What it reads; None: what its metadata say.
        target: What it predicts; None: what its metadata say. Only for transcoders.

    Raises:
        UnweaveError: If one of them is not known, a target is given for an SAE, or the coder predicts at several hooks.
    """
    metadata = sae.metadata
    if isinstance(sae, Crosscoder):
        raise UnweaveError("a crosscoder predicts at several hooks: evaluate crosscoder.at(hook), hook by hook.")
    if isinstance(sae, CrossLayerTranscoder):
        raise UnweaveError("a cross-layer transcoder predicts at several hooks: evaluate clt.at(target) for each.")
    if not isinstance(sae, Transcoder):
        if target is not None:
            raise UnweaveError(f"only a transcoder has a target, and this is an SAE: leave out target={target!r}.")
        place = hook_of(sae, model, hook)
        return [place], place
    target = target or metadata.get("hf_hook_name_out") or metadata.get("hook_name_out")
    if target is None:
        raise UnweaveError("the transcoder's metadata name no hook for its output: say where with target='...'.")
    several = metadata.get("hf_hook_names") if hook is None else None
    reads = [_one_hook(model, name) for name in several] if several else [hook_of(sae, model, hook)]
    return reads, _one_hook(model, target)


def _one_hook(model: LoadedModel, name: str) -> Hook:
    hooks = resolve_hooks(model.module, [name])
    if len(hooks) > 1:
        raise UnweaveError(f"an SAE belongs to one hook, but {name!r} matches {len(hooks)}, such as {str(hooks[0])!r}.")
    return hooks[0]
