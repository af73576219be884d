"""Rows of tokens: documents of one side of the held-out split, tokenised in batches and laid into rows.

The rows are a function of the data, the tokenizer and the config, whatever sizes they are asked for in. A saved state
holds the tokens that were laid out but not yet served, and the reader's position behind them, so a resumed run serves
the same rows bit for bit without tokenising anything twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations.config import DataConfig
from unweave.activations.documents import Data, Documents, open_documents
from unweave.activations.encoding import Encoder
from unweave.activations.packing import begin_token, keep_rows, pack, pad, separator_token
from unweave.activations.reader import DocumentReader
from unweave.activations.records import Document, TokenIds, size_of
from unweave.activations.tokenized.reader import RowReader
from unweave.activations.tokenized.vocabulary import check_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataConfig", "TokenBatch", "TokenRows"]

_CHUNK_DOCUMENTS = 256
_CHUNK_CHARS = 1 << 19
_CHUNK_TOKENS = 1 << 16


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Some rows of tokens."""

    ids: Int64[Tensor, "n context"]
    """Token ids."""
    real: Bool[Tensor, "n context"]
    """False on padding."""
    documents: Int64[Tensor, "n context"]
    """Running number of the document that each token belongs to, -1 on padding."""

    def __len__(self) -> int:
        return len(self.ids)

    def inputs(self, device: torch.device) -> tuple[Tensor, dict[str, Any]]:
        """The token ids, and an attention mask where there is padding."""
        if self.real.all():  # where there is none, a mask would only keep attention from its fast path
            return self.ids.to(device), {}
        return self.ids.to(device), {"attention_mask": self.real.to(device, torch.int64)}

    def records(self) -> dict[str, Int[Tensor, "n context"]]:
        """Each token's id, position in its row, and document."""
        positions = torch.arange(self.ids.shape[1], dtype=torch.int32).expand(self.ids.shape)
        return {"token_ids": self.ids, "positions": positions, "documents": self.documents}


class TokenRows:
    """The rows of the training documents, or of the held-out ones.

    Documents longer than a row go on in the next one, and only the last, unfinished row of all is dropped. Token ids
    that come as rows already (see `open_documents`) are left as they are: no BOS is added and nothing is packed.

    Args:
        data: Anything that `open_documents` takes.
        tokenizer: Needed for text; may be None for token ids if `config.bos` is False or the ids are rows already.
        config: How to lay out documents.
        held_out: Serve the held-out documents instead of the training ones.
        repeat: Start another epoch, in another order, when the data are exhausted.

    Attributes:
        source: The opened data.
        epoch_tokens: How many tokens the data give when they are read once, the last unfinished row included; None as
            long as they have not been read to their end, unless it stands in a token folder.
        begin: Id of the token in front of each document; None if there is none.
        separator: Id of the token between documents; None if there is none.

    Raises:
        UnweaveError: No text, a missing special token or chat template, a token folder that holds out another share of
            its documents than the config says; from `next_rows`: less than one row of text, or no document on the
            held-out side.
    """

    def __init__(
        self,
        data: Data,
        tokenizer: PreTrainedTokenizerBase | None,
        config: DataConfig,
        *,
        held_out: bool,
        repeat: bool = False,
    ) -> None:
        if held_out and not config.held_out:
            raise UnweaveError("held-out text was asked for, but held_out=0 keeps none.")
        self.source = open_documents(data, config)
        self.config, self.tokenizer, self.held_out, self.repeat = config, tokenizer, held_out, repeat
        if tokenizer is not None:
            check_vocabulary(self.source.name, self.source.made_with, tokenizer)
        self._reader: DocumentReader | RowReader
        if (folder := self.source.folder) is not None:
            folder.check_split(config.held_out)
            self.begin, self.separator = folder.begin, folder.separator
            self._reader = RowReader(folder, "held_out" if held_out else "train", seed=config.seed)
        else:
            self._encode = Encoder(tokenizer, config, self.source.name)
            self.begin, self.separator = special_tokens(self.source, tokenizer, config)
            self._reader = DocumentReader(self.source, config, held_out=held_out)
        self._ids, self._numbers, self._start = _EMPTY, _EMPTY, 0
        self._last: int | None = None
        self._n_documents = self._n_tokens = self._n_in_epoch = 0
        self._exhausted = False
        self.epoch_tokens: int | None = None
        if folder is not None:
            rows = folder.n_rows("held_out" if held_out else "train")
            self.epoch_tokens = rows * (folder.context // config.context * config.context)

    @property
    def context(self) -> int:
        """Tokens in a row."""
        return self.config.context

    @property
    def epoch(self) -> int:
        """Number of times the data were read to their end."""
        return self._reader.epoch

    def next_rows(self, n: int) -> TokenBatch:
        """The next `n` rows; fewer when the data end, and none once they are exhausted."""
        batch = self.peek(n)
        self._start += batch.ids.numel()
        return batch

    def peek(self, n: int) -> TokenBatch:
        """The rows that `next_rows(n)` would give, without moving on."""
        context = self.config.context
        while len(self._ids) - self._start < n * context and not self._exhausted:
            self._lay_out_more()
        n = min(n, (len(self._ids) - self._start) // context)
        here = slice(self._start, self._start + n * context)
        ids, numbers = (torch.from_numpy(v[here].reshape(n, context).copy()) for v in (self._ids, self._numbers))
        return TokenBatch(ids, numbers >= 0, numbers)

    def batches(self, n: int) -> Iterator[TokenBatch]:
        """Batches of `n` rows until the data are exhausted; the last one may be shorter."""
        while len(batch := self.next_rows(n)):
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: plain values and two tensors of tokens that were laid out but not served."""
        return {
            "data": self._identity(),
            "reader": self._reader.state_dict(),
            "ids": torch.from_numpy(self._ids[self._start :].copy()),
            "documents": torch.from_numpy(self._numbers[self._start :].copy()),
            "last": self._last,
            "counts": [self._n_documents, self._n_tokens, self._n_in_epoch],
            "exhausted": self._exhausted,
            "epoch_tokens": self.epoch_tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved.

        Raises:
            UnweaveError: It was saved for other data or another config.
        """
        for name, value in self._identity().items():
            if state["data"][name] != value:
                was = state["data"][name]
                raise UnweaveError(f"the saved position is of other data: {name} was {was!r} and is now {value!r}.")
        self._reader.load_state_dict(state["reader"])
        self._ids, self._numbers = (state[name].cpu().numpy().copy() for name in ("ids", "documents"))
        self._start = 0
        self._last, self._exhausted = state["last"], state["exhausted"]
        self._n_documents, self._n_tokens, self._n_in_epoch = state["counts"]
        self.epoch_tokens = state["epoch_tokens"]

    def _identity(self) -> dict[str, Any]:
        return asdict(self.config) | {"fingerprint": self.source.fingerprint, "side": self.held_out}

    def _lay_out_more(self) -> None:
        """Lay out some more tokens of this epoch, or start the next epoch, or note that the data have ended."""
        laid_out = self._next_rows() if isinstance(self._reader, RowReader) else self._next_documents(self._reader)
        if laid_out is None:
            return self._end_epoch()
        ids, numbers = laid_out
        self._ids = np.concatenate([self._ids[self._start :], ids])
        self._numbers = np.concatenate([self._numbers[self._start :], numbers])
        self._start = 0
        self._n_tokens += len(ids)
        # Padding does not count; the rows of a token folder may have no numbers of documents.
        self._n_in_epoch += len(ids) if self.source.folder else int(np.count_nonzero(numbers >= 0))
        return None

    def _next_rows(self) -> tuple[TokenIds, TokenIds] | None:
        """Rows of the token folder, cut to the context, with the documents that the folder knows them by."""
        assert self.source.folder is not None
        assert isinstance(self._reader, RowReader)
        width, context = self.source.folder.context, self.config.context
        ids, documents = (v[:, : width // context * context] for v in self._reader.take(max(1, _CHUNK_TOKENS // width)))
        return (ids.ravel(), documents.ravel()) if len(ids) else None

    def _next_documents(self, reader: DocumentReader) -> tuple[TokenIds, TokenIds] | None:
        """Tokens of some more documents, numbered on."""
        chunk, chars = list[Document](), 0
        for document in reader:
            chunk.append(document)
            chars += size_of(document)
            if len(chunk) >= _CHUNK_DOCUMENTS or chars >= _CHUNK_CHARS:
                break
        if not chunk:
            return None
        tokens = [ids for ids in self._encode(chunk) if len(ids)]
        if not tokens:
            return _EMPTY, _EMPTY
        if self.source.rows:
            ids, numbers = keep_rows(tokens, self.config.context)
        elif self.config.pack:
            ids, numbers = pack(tokens, begin=self.begin, separator=self.separator, last=self._last)
        else:
            padding = padding_token(self.tokenizer)
            ids, numbers = pad(tokens, begin=self.begin, context=self.config.context, padding=padding)
        numbers[numbers >= 0] += self._n_documents
        self._n_documents += len(tokens)
        self._last = int(ids[-1])
        return ids, numbers

    def _end_epoch(self) -> None:
        if self._n_tokens < self.config.context:
            part = f"the {'held-out' if self.held_out else 'training'} part of {self.source.name}"
            if not self._n_tokens:
                raise UnweaveError(f"{part} holds no text.")
            raise UnweaveError(
                f"{part} holds {self._n_tokens} tokens, less than one row of context={self.config.context}."
            )
        if not self._n_in_epoch:
            raise UnweaveError(f"{self.source.name} gave nothing in epoch {self.epoch}: it cannot be read twice.")
        if self.source.folder is None:
            self.epoch_tokens = self._n_in_epoch
        if self.repeat:
            self._reader.start_epoch(self.epoch + 1)
            self._n_in_epoch = 0
        else:
            self._exhausted = True


def special_tokens(
    source: Documents, tokenizer: PreTrainedTokenizerBase | None, config: DataConfig
) -> tuple[int | None, int | None]:
    """The token in front of each document, and the one between documents.

    Raises:
        UnweaveError: A token that the tokenizer lacks, or no tokenizer to ask.
    """
    if source.rows:
        return None, None
    if tokenizer is None and config.bos:
        raise UnweaveError(f"{source.name} needs a tokenizer, to begin each document with its BOS token.")
    begin = begin_token(tokenizer) if tokenizer is not None and config.bos else None
    return begin, None if config.separator is None else separator_token(tokenizer, config.separator)


def padding_token(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """What stands behind the end of a document that has a row to itself."""
    return getattr(tokenizer, "pad_token_id", None) or 0


_EMPTY: TokenIds = np.empty(0, dtype=np.int64)
