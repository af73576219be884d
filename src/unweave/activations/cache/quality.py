"""How well is it shuffled? Measured on the rows that are served, against a full shuffle of the same rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from unweave._errors import UnweaveError
from unweave.activations.cache.batches import StoreBatches

_MOST_ROWS = 1 << 20
"""That say how often two rows are of one document by chance."""


@dataclass(frozen=True)
class ShuffleQuality:
    """What a full shuffle has is 1 for the entropies and 0 for the autocorrelation, but for chance.

    Attributes:
        document_entropy: Mean entropy over documents within a batch, divided by that of as many rows drawn at random.
        position_entropy: The same over positions.
        autocorrelation: Of "is of the same document" between a row and the next one in the order served: 1 if
            all neighbours are of one document, 0 if they are so as often as chance has it.
        batches: How many batches were looked at.
    """

    document_entropy: float
    position_entropy: float
    autocorrelation: float
    batches: int

    def __str__(self) -> str:
        return (
            f"shuffle: entropy over documents {self.document_entropy:.3f}, over positions {self.position_entropy:.3f} "
            f"of a full shuffle's; autocorrelation of documents {self.autocorrelation:.4f} ({self.batches} batches)"
        )


def shuffle_quality(batches: StoreBatches, n_batches: int = 50) -> ShuffleQuality:
    """Measure how well batches are mixed, without copying an activation. The batches are not moved on.

    Args:
        batches: What serves them; its store must record documents and positions.
        n_batches: How many of the next batches to look at; fewer if there are no more.

    Raises:
        UnweaveError: Documents or positions are not known, or there are no batches left.
    """
    store = batches.store
    if missing := {"documents", "positions"} - set(store.records):
        raise UnweaveError(f"{store.name} does not record {' and '.join(sorted(missing))}, so mixing cannot be judged.")
    state = batches.state_dict()
    served = list[Int64[np.ndarray, " n"]]()
    while len(served) < n_batches and len(rows := batches.next_rows()):
        served.append(rows.numpy())
    batches.load_state_dict(state)
    return quality_of(batches, served)


def quality_of(batches: StoreBatches, served: list[Int64[np.ndarray, " n"]]) -> ShuffleQuality:
    """The same for rows that were served in some other way, given by their numbers, batch by batch."""
    whole = [rows for rows in served if len(rows) == len(served[0])] if served else []
    if not whole or len(whole[0]) < 2:
        raise UnweaveError("there are no batches of two or more rows to judge.")
    rng, store, n_rows = np.random.default_rng(0), batches.store, batches.selected.n_rows
    chosen = None if batches.selected.keep is None else np.flatnonzero(batches.selected.keep)

    def at_random(n: int) -> Int64[np.ndarray, " n"]:
        numbers = rng.choice(n_rows, n, replace=False)
        return numbers if chosen is None else chosen[numbers]

    drawn = [at_random(len(rows)) for rows in whole]
    documents, positions = store.records["documents"], store.records["positions"]
    entropies = [
        float(np.mean([_entropy(column[rows]) for rows in whole]))
        / max(float(np.mean([_entropy(column[rows]) for rows in drawn])), 1e-12)
        for column in (documents, positions)
    ]
    order = documents[np.concatenate(whole)]
    _, counts = np.unique(documents[at_random(min(n_rows, _MOST_ROWS))], return_counts=True)
    by_chance = float(np.square(counts / counts.sum()).sum())
    same = float(np.mean(order[1:] == order[:-1]))
    return ShuffleQuality(
        document_entropy=entropies[0],
        position_entropy=entropies[1],
        autocorrelation=0.0 if by_chance == 1 else (same - by_chance) / (1 - by_chance),
        batches=len(whole),
    )


def _entropy(values: NDArray[np.generic]) -> float:
    _, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
