"""Fine-tuning a finished coder's decoder on batches of activations, in memory.

What can be trained is in `unweave.training.decoder_tuning`. Whole runs, with checkpoints, are those of `train` with a
`Start`; training against the model that the coder belongs to is in `unweave.training.end_to_end`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae import SAE, Crosscoder, CrossLayerTranscoder, TemporalSAE, Transcoder
from unweave.sae.coders import side_by_side
from unweave.training.config import METHODS, Method, SAEConfig
from unweave.training.decoder_tuning import DecoderTuning, check_tunable
from unweave.training.sites import Rows
from unweave.training.temporal_tuning import Sequences, TemporalTuning

Batch = Float[Tensor, "... d_in"] | tuple[Tensor, Tensor] | Mapping[str, Tensor]


def finetune(
    sae: SAE,
    batches: Iterable[Batch],
    *,
    method: Method = "decoder",
    tokens: int | None = None,
    lr: float = 3e-3,
    warmup: float = 0.05,
    decay: float = 0.5,
) -> SAE:
    """Train a copy of a coder's decoder on the squared error, with the encoder frozen.

    Args:
        sae: Any coder that takes raw activations; it is not changed.
        batches: Raw activations `(n, d_in)`; for a transcoder pairs `(x, y)` of what it reads and predicts. Of a
            crosscoder and a cross-layer transcoder, whose hooks lie side by side there, also activations by name. For a
            temporal SAE sequences `(n, tokens, d_in)`.
        method: What is trained; see `unweave.training.decoder_tuning`.
        tokens: Activations to train on; the last batch is cut. None: all that there are, which must be a sequence.
        lr: Learning rate of Adam, for outputs scaled to a mean squared norm of their width and decoder rows of norm 1.
        warmup: Share of the run over which it rises.
        decay: Share of the run, at its end, over which it falls to 0.

    Returns:
        A coder whose codes are those of `sae`; of a temporal SAE nearly, see `unweave.training.temporal_tuning`. Unless
        factors alone are trained, its decoder's bias is not subtracted from the input any more (that of `sae` moved
        into the encoder), so that the two biases are free of each other; a temporal SAE's stays subtracted. A tied SAE
        comes out with an encoder of its own.

    Raises:
        UnweaveError: If there is no such method, no part of the decoder can change while codes stay (pursuits), there
            are too few activations, or they are not finite or of another shape.
    """
    if method not in METHODS:
        raise UnweaveError(f"SAEs are fine-tuned by {', '.join(METHODS)}, not by {method!r}.")
    check_tunable(sae)
    if tokens is None:
        batches = list(batches)
        tokens = sum(len(_rows(sae, batch, i).x) for i, batch in enumerate(batches))
    stream = ((batch, _rows(sae, batch, i)) for i, batch in enumerate(batches))
    first = next(stream, None)
    if first is None or tokens < 1 or len(first[1].x) == 0:
        raise UnweaveError("there are no activations to fine-tune on.")
    config = SAEConfig(
        d_sae=sae.d_sae, activation=sae.activation, sparsity=(), lr=lr, warmup=warmup, decay=decay, grad_clip=None
    )
    widths, targets = _widths(sae)
    kind = TemporalTuning if isinstance(sae, TemporalSAE) else DecoderTuning
    trainee = kind(
        sae, method, config, *first[1], steps=-(-tokens // len(first[1].x)), tokens=tokens, widths=widths,
        target_widths=targets,
    )  # fmt: skip
    seen = 0
    for batch, (x, y) in chain([first], stream):
        n = min(len(x), tokens - seen)
        if isinstance(trainee, TemporalTuning):
            assert isinstance(batch, Tensor)
            trainee.read = partial(_first, batch)
        if n:
            trainee.step(x[:n], None if y is None else y[:n])
        seen += n
        if seen >= tokens:
            break
    if seen < tokens:
        raise UnweaveError(f"the activations ran out after {seen:,} of {tokens:,} tokens.")
    return trainee.finished(sae.metadata | {"finetuning": {"method": method, "tokens": tokens, "lr": lr}})


def _first(sequences: Float[Tensor, "b t d"], n: int) -> Sequences:
    """All of a batch of sequences, of whose tokens the first so many count."""
    return sequences, (torch.arange(sequences[..., 0].numel()) < n).view(sequences.shape[:2]).to(sequences.device)


def _rows(sae: SAE, batch: Batch, i: int) -> Rows:
    """A batch as inputs and, for a transcoder, targets.

    Raises:
        UnweaveError: It is not what this coder takes.
    """
    predicts, y = isinstance(sae, Transcoder | CrossLayerTranscoder), None
    if isinstance(batch, Mapping) and isinstance(sae, Crosscoder | CrossLayerTranscoder):
        x = sae.join(batch)
        if isinstance(sae, CrossLayerTranscoder):
            y = side_by_side(batch, sae.writes, "cross-layer transcoder")
    elif isinstance(batch, tuple | list) and predicts and len(batch) == 2:
        x, y = batch
    elif isinstance(batch, Tensor) and isinstance(sae, TemporalSAE):
        if batch.ndim != 3 or batch.shape[2] != sae.d_in:
            shape = tuple(batch.shape)
            raise UnweaveError(
                f"batch {i} must hold sequences for a temporal SAE, (n, tokens, {sae.d_in}), got {shape}."
            )
        x = batch.flatten(0, 1)
    elif isinstance(batch, Tensor) and not predicts:
        x = batch
    else:
        wanted = "a pair (x, y) of what the transcoder reads and what it predicts" if predicts else "one tensor"
        raise UnweaveError(f"batch {i} was expected to be {wanted}, and is {type(batch).__name__}.")
    for part, width in ((x, sae.d_in), (y, sae.d_out)):
        if part is not None and (part.ndim != 2 or part.shape[1] != width or not torch.isfinite(part).all()):
            shape = tuple(part.shape)
            raise UnweaveError(f"batch {i} must be finite and have the shape (n, {width}), got {shape}.")
    if y is not None and len(x) != len(y):
        raise UnweaveError(f"the rows of batch {i} are not the same tokens: there are {len(x)} and {len(y)}.")
    return Rows(x, y)


def _widths(sae: SAE) -> tuple[Mapping[str, int] | None, Mapping[str, int] | None]:
    """Widths of what lies side by side in the inputs, and in the targets."""
    if isinstance(sae, CrossLayerTranscoder):
        return sae.reads, sae.writes
    return (sae.widths if isinstance(sae, Crosscoder) else None), None
