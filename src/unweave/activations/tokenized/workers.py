"""Encoding chunks of documents ahead of whoever takes them: in a thread, or in processes."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Protocol, TypeVar

from unweave._errors import UnweaveError
from unweave.activations.encoding import Encoder
from unweave.activations.records import Document, TokenIds, Unreadable

Encoded = list[TokenIds | Unreadable]
AHEAD = 2
"""Chunks that wait for each process; none is given back before so many more were read."""


class HasDocuments(Protocol):
    @property
    def documents(self) -> Sequence[Document]: ...


Chunk = TypeVar("Chunk", bound=HasDocuments)


def in_order(chunks: Iterable[Chunk], encoder: Encoder, processes: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Each chunk with its encoded documents, while the next ones are being read and encoded.

    Raises:
        UnweaveError: A process died.
    """
    pool: Executor
    if processes == 1:  # the tokenizer lets go of Python's lock and has threads of its own, which two keep busy
        pool, encode = ThreadPoolExecutor(2), encoder.one_by_one
    else:
        # Not forked: the tokenizer's threads and PyTorch's would not survive that.
        context = get_context("spawn")
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(encoder,))
        encode = _encode
    try:
        yield from _ahead(chunks, pool, encode, AHEAD * processes)
    except BrokenProcessPool as error:
        raise UnweaveError("a process that tokenised died, perhaps for want of memory: resume with fewer.") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ahead(
    chunks: Iterable[Chunk], pool: Executor, encode: Callable[[Sequence[Document]], Encoded], ahead: int
) -> Iterator[tuple[Chunk, Encoded]]:
    waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
    for chunk in chunks:
        waiting.append((chunk, pool.submit(encode, chunk.documents)))
        if len(waiting) > ahead:
            done, future = waiting.popleft()
            yield done, future.result()
    while waiting:
        done, future = waiting.popleft()
        yield done, future.result()


_encoder: Encoder


def _start(encoder: Encoder) -> None:
    """In a new process."""
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work forever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(documents: Sequence[Document]) -> Encoded:
    return _encoder.one_by_one(documents)
