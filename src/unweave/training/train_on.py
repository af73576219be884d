"""Train SAEs on any iterable of activation batches; the model, the text and the loop around it are yours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae import SAE
from unweave.training.config import SAEConfig
from unweave.training.finish import finished_sae
from unweave.training.trainee import Trainee
from unweave.training.trainer import Run, fit


def train_on(
    batches: Iterable[Float[Tensor, "n d_in"]],
    saes: Sequence[SAEConfig],
    *,
    tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[SAE]:
    """Train SAEs on batches of activations and return them in the order of their configs.

    Args:
        batches: Tensors `(n, d_in)`, raw and in random order (the order is used as it comes). The input scale and the
            initial bias are taken from the first one.
        saes: What to train; every SAE sees every batch.
        tokens: Rows to train on. May be left out for a sequence of tensors, which is then used once.
        seed: Gives the initial weights.
        progress: Whether to show progress on standard error.

    Returns:
        Finished SAEs that take raw activations. BatchTopK thresholds are calibrated on the last 8 batches.

    Raises:
        UnweaveError: If there are no batches or too few for `tokens`, a shape is wrong, or a value is not finite.
    """
    steps = None
    if tokens is None:
        if not isinstance(batches, Sequence):
            raise UnweaveError(
                "pass tokens=..., the number of rows to train on: the schedules need to know it beforehand."
            )
        tokens, steps = sum(len(b) for b in batches), len(batches)
    if not saes:
        raise UnweaveError("there is no SAE to train: pass at least one SAEConfig.")
    stream = iter(batches)
    first = next(stream, None)
    if first is None or tokens < 1:
        raise UnweaveError("there are no activations to train on.")
    if first.ndim != 2 or len(first) == 0 or not first.isfinite().all():
        raise UnweaveError(f"batch 0 must be finite and have the shape (n, d_in), got the shape {tuple(first.shape)}.")
    steps = steps or -(-tokens // len(first))
    group = [Trainee(c, first, steps=steps, tokens=tokens, seed=seed + i) for i, c in enumerate(saes)]
    run = Run({"": group}, tokens, keep_recent=8)
    fit(run, _named(chain([first], stream)), progress=progress)
    return [finished_sae(trainee, run.recent[""], {}) for trainee in group]


def _named(batches: Iterator[Tensor]) -> Iterator[dict[str, Tensor]]:
    return ({"": batch} for batch in batches)
