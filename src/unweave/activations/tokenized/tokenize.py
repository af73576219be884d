"""Text, tokenised once: from any data to a token folder.

Documents are read in the order of the data, both sides of the held-out split at once, and numbered as they come, those
that cannot be read included: in a data set that is read by rows, a document's number is its row. Reading, tokenising
and packing go on at the same time, in chunks whose results are put back in order, so the folder is the same for any
number of processes. Every few seconds the position behind the last chunk that was written is committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unweave._errors import UnweaveError
from unweave.activations import reader as limits
from unweave.activations.config import DataConfig
from unweave.activations.documents import Data, Documents, open_documents
from unweave.activations.encoding import Encoder
from unweave.activations.packing import keep_rows, pack, pad
from unweave.activations.reader import cutoff_of, score_of
from unweave.activations.records import Document, TokenIds, Unreadable, size_of
from unweave.activations.tokenized.folder import TokenFolder, open_token_folder
from unweave.activations.tokenized.format import SIDES, Side
from unweave.activations.tokenized.vocabulary import check_vocabulary, describe_tokenizer
from unweave.activations.tokenized.workers import AHEAD, in_order
from unweave.activations.tokenized.writer import TokenWriter
from unweave.activations.tokens import padding_token, special_tokens
from unweave.models.load import LoadedModel, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMMIT_SECONDS = 5.0
CHUNK_DOCUMENTS, CHUNK_CHARS = 512, 1 << 20


@dataclass(frozen=True)
class TokenizeProgress:
    """How far `tokenize` is."""

    part: int
    """Parts of the data that were read to their end; a part is 4 MB of text, 1024 rows, a row group or a shard."""
    parts: int
    """Parts that there are."""
    documents: int
    """Documents read, those of an earlier run that is being resumed included."""
    tokens: int
    """Tokens written, likewise."""
    skipped: int
    """Documents that could not be read."""


def tokenize(
    data: Data,
    out: str | Path,
    *,
    model: str | Path | LoadedModel | None = "demo",
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    config: DataConfig | None = None,
    processes: int = 1,
    resume: bool = False,
    max_bad: int = 100,
    shard_rows: int | None = None,
    progress: Callable[[TokenizeProgress], None] | None = None,
) -> TokenFolder:
    """Tokenise data and write them as a token folder, which everything that takes text also takes.

    Args:
        data: Anything that `open_documents` takes but a token folder.
        out: The folder to write; it must be new or empty.
        model: Whose tokenizer to use: a name or folder as `load_model` takes it, or a loaded model.
        tokenizer: The tokenizer itself, or where to load it from; wins over `model`. With neither (`model=None`), the
            data must be token ids.
        config: How to lay out documents. `held_out` decides the split for good; `seed` only orders the rows on reading.
        processes: 1: in this process, where a tokenizer of the `tokenizers` library uses all cores. More: as many
            processes more, with one thread each; a script then needs `if __name__ == "__main__":`. The result is the
            same.
        resume: Go on with an unfinished folder, with the same data and settings; a finished one is returned as it is.
        max_bad: How many documents may be left out because they cannot be read. They are listed in the manifest.
        shard_rows: Rows in a file. By default as many as 2**25 tokens fill.
        progress: Called after each chunk of documents.

    Returns:
        The finished folder.

    Raises:
        UnweaveError: The data or the tokenizer cannot be used, too many documents cannot be read, there is less than
            one row of text, `out` holds something else, or the disk is full.
    """
    config = config or DataConfig()
    if processes < 1 or max_bad < 0:
        raise UnweaveError(f"processes={processes} and max_bad={max_bad}: at least 1 process, and no negative limit.")
    for path in data if isinstance(data, list) else [Path(data)] if isinstance(data, str) else [data]:
        if isinstance(path, Path) and Path(out).resolve().is_relative_to(path.resolve()):
            raise UnweaveError(f"{out} lies in the data {path}: choose another folder.")
    made, name = _tokenizer(model, tokenizer)
    source = open_documents(data, replace(config, max_bad=max_bad))
    if source.folder is not None:
        raise UnweaveError(f"{source.name} is tokenised already.")
    if made is not None:
        check_vocabulary(source.name, source.made_with, made)
    begin, separator = special_tokens(source, made, config)
    described = describe_tokenizer(made, name) if made is not None else None
    about = {
        "tokenizer": described or source.made_with,
        "config": asdict(config),
        "begin": begin,
        "separator": separator,
        "data": source.fingerprint,
    }
    size: int | None = described["vocab_size"] if described else None
    encoder = Encoder(made, config, source.name)
    with TokenWriter(
        out, context=config.context, vocab_size=size, about=about, shard_rows=shard_rows, resume=resume
    ) as writer:
        if not writer.finished:
            run = _Run(source, config, writer, begin, separator, padding_token(made), size, max_bad)
            try:
                run.write(in_order(run.chunks(), encoder, processes), progress)
                run.finish()
            except UnweaveError:
                if writer.state is None:  # nothing that resuming could use
                    writer.discard()
                raise
    return open_token_folder(out)


def _tokenizer(
    model: str | Path | LoadedModel | None, tokenizer: str | Path | PreTrainedTokenizerBase | None
) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """The tokenizer and the name that it was asked for by."""
    if tokenizer is None and isinstance(model, LoadedModel):
        return model.tokenizer, model.name
    asked = model if tokenizer is None else tokenizer
    if isinstance(asked, str | Path):
        return load_tokenizer(asked), str(asked)
    return (None if isinstance(asked, LoadedModel) else asked), None


@dataclass
class _Chunk:
    """Some documents, and where the data go on behind them."""

    part: int
    skip: int
    number: int
    documents: list[Document] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    chars: int = 0

    def add(self, document: Document | Unreadable) -> None:
        if isinstance(document, Unreadable):
            self.unreadable.append(document)
        else:
            self.documents.append(document)
            self.numbers.append(self.number)
            self.chars += size_of(document)
        self.number += 1

    @property
    def full(self) -> bool:
        return len(self.numbers) + len(self.unreadable) >= CHUNK_DOCUMENTS or self.chars >= CHUNK_CHARS


@dataclass
class _Run:
    """One call of `tokenize`, from where the writer stands."""

    source: Documents
    config: DataConfig
    writer: TokenWriter
    begin: int | None
    separator: int | None
    padding: int
    vocab_size: int | None
    max_bad: int

    def __post_init__(self) -> None:
        start = self.writer.state or {
            "part": 0, "skip": 0, "number": 0, "cutoff": None, "skipped": [],
            "last": dict.fromkeys(SIDES), "documents": dict.fromkeys(SIDES, 0),
        }  # fmt: skip
        self.state: dict[str, Any] = start

    def chunks(self) -> Iterator[_Chunk]:
        """The rest of the data."""
        stream = self._read() if self.state["cutoff"] is not None else self._choose_cutoff(self._read())
        chunk = _Chunk(self.state["part"], self.state["skip"], self.state["number"])
        for chunk.part, chunk.skip, document in stream:
            chunk.add(document)
            if chunk.full:
                yield chunk
                chunk = _Chunk(chunk.part, chunk.skip, chunk.number)
        chunk.part, chunk.skip = len(self.source.parts), 0
        yield chunk

    def write(
        self,
        encoded: Iterator[tuple[_Chunk, list[TokenIds | Unreadable]]],
        progress: Callable[[TokenizeProgress], None] | None,
    ) -> None:
        """Write encoded chunks, in order, and commit now and then."""
        committed = time.monotonic()
        for chunk, results in encoded:
            self._append(chunk, results)
            self.state |= {"part": chunk.part, "skip": chunk.skip, "number": chunk.number}
            if time.monotonic() - committed >= COMMIT_SECONDS:
                self.writer.commit(self.state)
                committed = time.monotonic()
            if progress is not None:
                tokens, skipped = sum(self.writer.tokens.values()), len(self.state["skipped"])
                progress(TokenizeProgress(chunk.part, len(self.source.parts), chunk.number, tokens, skipped))

    def finish(self) -> None:
        """Commit what is left, and close the folder."""
        if not self.writer.rows["train"]:
            tokens = self.writer.tokens["train"]
            part = f"the training part of {self.source.name} holds {tokens} tokens"
            raise UnweaveError(f"{part}, less than one row of context={self.config.context}.")
        self.writer.commit(self.state)
        self.writer.finish({
            "source": self.source.name, "documents": self.state["documents"], "skipped": self.state["skipped"],
        })  # fmt: skip

    def _read(self) -> Iterator[tuple[int, int, Document | Unreadable]]:
        """Documents, each with the part and the place in it where the next one is."""
        first, skip = self.state["part"], self.state["skip"]
        for i in range(first, len(self.source.parts)):
            place = skip if i == first else 0
            for document in self.source.parts[i].read(place):
                place += 1
                yield i, place, document

    def _choose_cutoff(
        self, stream: Iterator[tuple[int, int, Document | Unreadable]]
    ) -> Iterator[tuple[int, int, Document | Unreadable]]:
        """The same, and as much as live text looks at to choose the cutoff of the split is read on the way.

        That is done once two chunks are being tokenised, and before a third is full: the first comes back after it.
        """
        late, window, size, everything = [], list[Document](), 0, True
        for seen, step in enumerate(stream):
            if not isinstance(step[2], Unreadable):
                window.append(step[2])
                size += size_of(step[2])
            if seen < AHEAD * CHUNK_DOCUMENTS and size < AHEAD * CHUNK_CHARS:
                yield step
            else:
                late.append(step)
            if len(window) >= limits.WINDOW_DOCUMENTS or size >= limits.WINDOW_BYTES:
                everything = False
                break
        self.state["cutoff"] = cutoff_of(window, self.config.held_out, everything=everything)
        yield from late
        yield from stream

    def _append(self, chunk: _Chunk, results: list[TokenIds | Unreadable]) -> None:
        found: dict[Side, list[tuple[int, TokenIds]]] = {side: [] for side in SIDES}
        unreadable = [*chunk.unreadable]
        for document, number, ids in zip(chunk.documents, chunk.numbers, results, strict=True):
            if isinstance(document, np.ndarray) and (reason := self._refusal(document)):
                ids = Unreadable(reason)
            if isinstance(ids, Unreadable):
                unreadable.append(Unreadable(f"document {number}: {ids.reason}"))
            elif len(ids):
                found["held_out" if score_of(document) < self.state["cutoff"] else "train"].append((number, ids))
        self.state["skipped"] += [each.reason for each in unreadable]
        if len(self.state["skipped"]) > self.max_bad:
            raise UnweaveError(
                f"more documents cannot be read than max_bad={self.max_bad} allows, the last: "
                f"{self.state['skipped'][-1]}"
            )
        for side, documents in found.items():
            if documents:
                self._append_to(side, documents)

    def _refusal(self, ids: TokenIds) -> str | None:
        """Why token ids that came as such cannot be used."""
        if self.source.rows and len(ids) < self.config.context:
            return f"it has {len(ids)} tokens, less than context={self.config.context}, where others are longer."
        if self.vocab_size is not None and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            return f"it holds token ids from {ids.min()} to {ids.max()}, and the vocabulary has {self.vocab_size}."
        return None

    def _append_to(self, side: Side, documents: list[tuple[int, TokenIds]]) -> None:
        numbers = np.array([number for number, _ in documents])
        tokens = [ids for _, ids in documents]
        if self.source.rows:
            ids, places = keep_rows(tokens, self.config.context)
        elif self.config.pack:
            ids, places = pack(tokens, begin=self.begin, separator=self.separator, last=self.state["last"][side])
        else:
            ids, places = pad(tokens, begin=self.begin, context=self.config.context, padding=self.padding)
        self.writer.append(side, ids, np.where(places < 0, -1, numbers[places]))
        self.state["last"][side] = int(ids[-1])
        self.state["documents"][side] += len(documents)
