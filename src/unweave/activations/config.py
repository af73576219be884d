"""How documents become rows of tokens: the settings that caching, training and evaluation must share."""

from __future__ import annotations

from dataclasses import dataclass

from unweave._errors import UnweaveError
from unweave.activations.split import DEFAULT_HELD_OUT


@dataclass(frozen=True)
class DataConfig:
    """Which part of the data to read, and how to lay it into rows of `context` tokens.

    Raises:
        UnweaveError: A value out of range, or a separator without packing.
    """

    context: int = 128
    """Tokens in a row."""
    pack: bool = True
    """Lay documents end to end. False: one document a row, cut to `context`, padded on the right."""
    bos: bool = True
    """Put the tokenizer's beginning-of-sequence token in front of every document."""
    separator: str | int | None = None
    """Token between packed documents: "bos", "eos", "sep", any token of the vocabulary, an id, or None."""
    chat: bool = False
    """Documents are lists of `{"role": ..., "content": ...}` messages, laid out by the tokenizer's chat template."""
    column: str | None = None
    """Column of `.jsonl`, `.parquet` and Hugging Face data. None: the first of the usual names that exists."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset, such as "wikitext-103-raw-v1"."""
    split: str = "train"
    """Split of a Hugging Face dataset. Held-out text is taken from the same split."""
    streaming: bool = False
    """Read a Hugging Face dataset over the network as it is needed, instead of downloading it first."""
    held_out: float = DEFAULT_HELD_OUT
    """Part of the documents kept from training. Which ones depends on their content, not on `seed`."""
    max_bad: int = 100
    """Documents that may be left out because they cannot be read, such as a line that is no JSON; each is named."""
    seed: int = 0
    """Seed of the order of the documents."""

    def __post_init__(self) -> None:
        if self.context < 2:
            raise UnweaveError(f"context={self.context}: a row needs at least 2 tokens.")
        if not 0 <= self.held_out < 1:
            raise UnweaveError(f"held_out={self.held_out} is no fraction in [0, 1).")
        if self.seed < 0 or self.max_bad < 0:
            raise UnweaveError(f"seed={self.seed} and max_bad={self.max_bad} must not be negative.")
        if self.separator is not None and not self.pack:
            raise UnweaveError(f"separator={self.separator!r} stands between packed documents, but pack is False.")
