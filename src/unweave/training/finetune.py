"""Fine-tuning of a finished SAE's decoder: its codes stay exactly what they are, the reconstruction gets better.

    scale              a factor for each latent, as an L1 penalty shrinks codes
    unrotated_decoder  the factors and the decoder's bias: rows keep their directions
    decoder            decoder rows and bias

Everything can be folded into the decoder, so what comes out is an SAE like any other. Training against the model that
the SAE belongs to is in `unweave.training.end_to_end`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unweave._errors import UnweaveError
from unweave.objectives import squared_error
from unweave.sae import SAE, fold_input_scale, ops
from unweave.training.fresh import scale_of
from unweave.training.schedules import learning_rate_factor

Method = Literal["scale", "unrotated_decoder", "decoder"]
METHODS = ("scale", "unrotated_decoder", "decoder")


def finetune(
    sae: SAE,
    batches: Iterable[Float[Tensor, "n d_in"]],
    *,
    method: Method = "decoder",
    tokens: int | None = None,
    lr: float = 1e-3,
    warmup: float = 0.05,
    decay: float = 0.5,
) -> SAE:
    """Train a copy of an SAE's decoder on the squared error, with the encoder frozen.

    Args:
        sae: Any autoencoder that takes raw activations; it is not changed.
        batches: Raw activations.
        method: What is trained; see above.
        tokens: Activations to train on; the last batch is cut. None: all that there are, which must be a sequence.
        lr: Learning rate of Adam, for inputs scaled to a mean squared norm of d_in.
        warmup: Share of the run over which it rises.
        decay: Share of the run, at its end, over which it falls to 0.

    Returns:
        An SAE whose codes are those of `sae`. Its decoder's bias is not subtracted from the input any more (that of
        `sae` moved into the encoder), so that the two biases are free of each other.

    Raises:
        UnweaveError: If there is no such method, encoder and decoder are one, statistics of each token are used, there
            are too few activations, or they are not finite or of another width.
    """
    if method not in METHODS:
        raise UnweaveError(f"SAEs are fine-tuned by {', '.join(METHODS)}, not by {method!r}.")
    if type(sae) is not SAE or sae.per_token is not None or sae.tied:
        raise UnweaveError("fine-tuning a decoder takes an autoencoder with an encoder of its own and no layer norm.")
    if tokens is None:
        batches = list(batches)
        tokens = sum(len(b) for b in batches)
    stream = iter(batches)
    first = next(stream, None)
    if first is None or tokens < 1 or len(first) == 0:
        raise UnweaveError("there are no activations to fine-tune on.")
    tuned = copy.deepcopy(sae)
    _free_biases(tuned)
    scale = scale_of(first)
    fold_input_scale(tuned, 1 / scale)
    factor = nn.Parameter(torch.ones_like(tuned.b_enc))
    trained = {"scale": [factor], "unrotated_decoder": [factor, tuned.b_dec], "decoder": [tuned.W_dec, tuned.b_dec]}
    tuned.requires_grad_(False)
    parameters = [p.requires_grad_() for p in trained[method]]
    optimizer = torch.optim.Adam(parameters, lr)
    seen, step, steps = 0, 0, -(-tokens // len(first))
    for batch in chain([first], stream):
        x = batch[: tokens - seen].detach().to(tuned.device, tuned.dtype) * scale
        if x.ndim != 2 or x.shape[1] != sae.d_in or not x.isfinite().all():
            raise UnweaveError(f"batch {step} must be finite and have the shape (n, {sae.d_in}), got {tuple(x.shape)}.")
        with torch.no_grad():
            codes = tuned.encode_sparse(x)
        scaled = codes if method == "decoder" else codes.with_values(codes.values * codes.at(factor))
        loss = squared_error(ops.decode(scaled, tuned.W_dec) + tuned.b_dec, x)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate_factor(min(step, steps - 1), steps, warmup, decay)
        optimizer.step()
        seen, step = seen + len(x), step + 1
        if seen >= tokens:
            break
    if seen < tokens:
        raise UnweaveError(f"the activations ran out after {seen:,} of {tokens:,} tokens.")
    with torch.no_grad():
        tuned.W_dec.mul_(factor[:, None])
    fold_input_scale(tuned, scale)
    tuned.metadata["finetuning"] = {"method": method, "tokens": tokens, "lr": lr}
    return tuned


@torch.no_grad()
def _free_biases(sae: SAE) -> None:
    """Move the bias that is subtracted from the input into the encoder's, in place; codes stay."""
    if not sae.apply_b_dec_to_input:
        return
    shift = sae.b_dec @ sae.W_enc
    sae.activation.shift_parameters(sae, shift)
    sae.b_enc.sub_(shift)
    sae.apply_b_dec_to_input = False
