"""Train SAEs on any iterable of activation batches; the model, the text and the loop around it are yours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError, nearest
from unweave.sae import SAE
from unweave.training.config import SAEConfig
from unweave.training.dictionary import check_fresh
from unweave.training.finish import finished_sae
from unweave.training.sites import check_sites, sites_of, where
from unweave.training.trainees import trainees_at
from unweave.training.trainer import Run, fit

Batch = Float[Tensor, "n d_in"] | tuple[Tensor, Tensor] | Mapping[str, Tensor]


def train_on(
    batches: Iterable[Batch],
    saes: Sequence[SAEConfig],
    *,
    tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
    hooks: Sequence[str] | None = None,
    targets: Sequence[str] = (),
) -> list[SAE]:
    """Train SAEs on batches of activations and return them in the order of their configs.

    Args:
        batches: Tensors `(n, d_in)`, raw and in random order (the order is used as it comes); for a transcoder pairs
            `(x, y)` of such tensors, or for any coder activations by name, whose rows are the same tokens throughout.
            Scales and initial biases are taken from the first batch.
        saes: What to train; every SAE sees every batch.
        tokens: Rows to train on. May be left out for a sequence of batches, which is then used once.
        seed: Gives the initial weights.
        progress: Whether to show progress on standard error.
        hooks: Names of the inputs in each batch; None: all that are no targets. Only for activations by name.
        targets: Names of what transcoders predict, one for each of the hooks. Only for activations by name.

    Returns:
        Finished SAEs that take raw activations, all at the first hook before those at the second. BatchTopK thresholds
        are calibrated on the last 8 batches.

    Raises:
        UnweaveError: If there are no batches or too few for `tokens`, a shape is wrong, a value is not finite, or what
            a coder is to read or predict is missing.
    """
    steps = None
    if tokens is None:
        if not isinstance(batches, Sequence):
            raise UnweaveError(
                "pass tokens=..., the number of rows to train on: the schedules need to know it beforehand."
            )
        tokens, steps = sum(len(_first(b)) for b in batches), len(batches)
    if not saes:
        raise UnweaveError("there is no SAE to train: pass at least one SAEConfig.")
    stream = (_by_name(batch, i) for i, batch in enumerate(batches))
    first = next(stream, None) if tokens > 0 else None
    if first is None:
        raise UnweaveError("there are no activations to train on.")
    targets = (_TARGET,) if _TARGET in first else tuple(targets)
    hooks = [name for name in first if name not in targets] if hooks is None else list(hooks)
    check_sites(saes, targets)
    check_fresh(saes)
    for name in (*hooks, *targets):
        if name not in first:
            raise UnweaveError(f"the batches hold no activations {name!r}{nearest(name, list(first))}")
    sites = [sites_of(config, hooks, targets) for config in saes]
    steps = steps or -(-tokens // len(first[hooks[0]]))
    groups = trainees_at(saes, sites, first, steps=steps, tokens=tokens, seed=seed)
    run = Run(groups, tokens, keep_recent=8, sites={str(site): site for group in sites for site in group})
    fit(run, chain([first], stream), progress=progress)
    finished = []
    for name, group in groups.items():
        site = run.sites[name]
        metadata = {} if "" in site.inputs else where(site, {hook: hook for hook in first})
        finished += [finished_sae(trainee, run.recent[name], metadata) for trainee in group]
    return finished


_TARGET = "target"


def _first(batch: Batch) -> Tensor:
    return batch if isinstance(batch, Tensor) else next(iter(batch.values() if isinstance(batch, Mapping) else batch))


def _by_name(batch: Batch, i: int) -> dict[str, Tensor]:
    """A batch as activations by name, whose rows are as many everywhere."""
    if isinstance(batch, Tensor):
        named = {"": batch}
    elif isinstance(batch, Mapping):
        named = dict(batch)
    elif len(batch) == 2:
        named = {"": batch[0], _TARGET: batch[1]}
    else:
        raise UnweaveError(f"batch {i} has {len(batch)} parts: a pair (x, y) was expected, or activations by name.")
    for x in named.values():
        if i == 0 and (x.ndim != 2 or len(x) == 0 or not x.isfinite().all()):
            shape = tuple(x.shape)
            raise UnweaveError(f"batch 0 must be finite and have the shape (n, d_in), got the shape {shape}.")
    if len({len(x) for x in named.values()}) > 1:
        counts = ", ".join(f"{len(x)} of {name!r}" for name, x in named.items())
        raise UnweaveError(f"the rows of batch {i} are not the same tokens: there are {counts}.")
    return named
