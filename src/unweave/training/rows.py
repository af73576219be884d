"""What a run reads: rows of text for a model of text, rows of image tokens for a vision model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from unweave._errors import UnweaveError
from unweave.activations import DataConfig, ImageRows, TokenRows
from unweave.activations.tokenized.folder import open_token_folder
from unweave.activations.tokenized.format import find_token_folder
from unweave.models import LoadedModel
from unweave.models.load import fingerprint
from unweave.training.config import TrainConfig
from unweave.training.values import to_dict

AnyRows: TypeAlias = TokenRows | ImageRows


def open_rows(data: Any, model: LoadedModel, config: TrainConfig, *, held_out: bool, repeat: bool = False) -> AnyRows:
    """One side of the data as rows of the model.

    Raises:
        UnweaveError: The model reads neither text nor images, or the data do not fit.
    """
    if model.vision is not None:
        if data == "stdlib":
            raise UnweaveError(f'{model.name!r} is a vision model: give it images, such as data="digits" or a folder.')
        return ImageRows(data, model, config.images, held_out=held_out, repeat=repeat)
    if model.tokenizer is None:
        raise UnweaveError(
            f"the model {model.name!r} has no tokenizer; train on its activations with train_on instead."
        )
    return TokenRows(data, model.tokenizer, config.text, held_out=held_out, repeat=repeat)


def as_tokenized(data: Any, text: DataConfig) -> DataConfig:
    """The settings for some data: a token folder's own share of held-out documents and at most its context, unless
    others than the defaults were given."""
    folder = find_token_folder(Path(data).expanduser()) if isinstance(data, str | Path) else None
    if folder is None:
        return text
    opened, usual = open_token_folder(folder), DataConfig()
    made = opened.manifest.get("config", {})
    return replace(
        text,
        context=min(opened.context, text.context) if text.context == usual.context else text.context,
        held_out=made.get("held_out", text.held_out) if text.held_out == usual.held_out else text.held_out,
    )


def tokens_once(rows: AnyRows) -> float | None:
    """How many tokens the data give when they are read once, of images about; None while that is not known."""
    if isinstance(rows, TokenRows):
        return rows.epoch_tokens
    if rows.source.entry is None:  # a stream
        return None
    return len(rows.source) * (1 - rows.config.held_out) * rows.context


def held_out_share(model: LoadedModel, config: TrainConfig) -> float:
    """The share of the data that is kept from training."""
    return config.text.held_out if model.vision is None else config.images.held_out


def rows_metadata(model: LoadedModel, config: TrainConfig) -> dict[str, Any]:
    """How the data became rows, for an SAE's metadata."""
    if model.vision is not None:
        return {"prepend_bos": False, "images": to_dict(config.images)}
    assert model.tokenizer is not None
    known_by = fingerprint(model.tokenizer)
    return {"prepend_bos": config.text.bos, "text": to_dict(config.text), "tokenizer_fingerprint": known_by}
