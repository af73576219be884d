"""How good is an SAE? One function: an SAE, its model and text in, a `Report` out.

Each batch of held-out rows is run through the model once; the activations at the hook are masked, encoded and decoded,
and sums are updated. A causal language model is then run twice more, with the reconstruction and with nothing in the
activation's place. Activations, codes and logits are dropped at once, so memory does not grow with the number of
tokens. The result depends on the weights and the tokens, not on how many rows are run at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unweave._errors import UnweaveError
from unweave.activations import DataConfig, ImageConfig, MaskConfig
from unweave.evaluation.behaviour import BASELINE
from unweave.evaluation.density import consistent_activation_heuristic, density_histogram, feature_density
from unweave.evaluation.measure import MEDIAN_PROMPTS, Measurement
from unweave.evaluation.metrics import compute, definitions
from unweave.evaluation.provenance import provenance
from unweave.evaluation.report import Report
from unweave.evaluation.sample import (
    Source,
    default_data_config,
    default_image_config,
    default_masks,
    first_rows,
    open_rows,
    passes,
    places_of,
)
from unweave.evaluation.weights import weight_cosines
from unweave.models import LoadedModel, differences, load_model
from unweave.sae import SAE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate(
    sae: SAE,
    *,
    model: LoadedModel | nn.Module | str | Path,
    data: Any,
    hook: str | None = None,
    target: str | None = None,
    tokens: int = 200_000,
    batch_prompts: int = 32,
    data_config: DataConfig | ImageConfig | None = None,
    masks: MaskConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Measure an SAE on held-out text or images: reconstruction, sparsity, and what it does to the model.

    Neither the SAE nor `data` is changed. What cannot be computed is None, and the report says why.

    Args:
        sae: A finished SAE, which takes raw activations.
        model: Where its activations come from. Of a model without a head for next-token predictions (an encoder, any
            `nn.Module` that takes `input_ids`, a vision model) the metrics of behaviour are None.
        data: Text or tokens in any form that `TokenRows` takes, of which the held-out documents are read; `TokenRows`,
            read on from where they are and then put back; or a list of `TokenBatch`. For a vision model, images in any
            form that `ImageRows` takes, `ImageRows`, or a list of `ImageBatch`.
        hook: Where the SAE belongs; by default where its metadata says (`hf_hook_name`, else `hook_name`).
        target: Where a transcoder's output belongs; by default where its metadata says (`hf_hook_name_out`). Errors and
            effects on the model are those of its prediction there, and `hook` is what it reads.
        tokens: Read rows until they hold this many tokens, padding not counted. Of images, CLS tokens and registers
            count as well.
        batch_prompts: Rows in a forward pass. Only `explained_variance_legacy`, defined per pass, depends on it.
        data_config: How documents (or images, by an `ImageConfig`) become rows, by default as the SAE's metadata says.
            `held_out` must be that of the training; with 0 all documents are read.
        masks: Which tokens do not count; by default special tokens, activations longer than 10 times the median, and
            the positions that the SAE's metadata leaves out.
        tokenizer: Of a model that is given as a module.
        device: Where to run; the model is moved there. By default where the model is.
        seed: Order in which documents are read; it takes the place of `data_config.seed`. Not used for `TokenRows` and
            `TokenBatch`.
        progress: Called after each pass with the number of tokens read so far, and `tokens`.

    Raises:
        UnweaveError: No hook is known, or it is not of the SAE's width; tokens that are not the model's; activations
            or weights that are NaN or infinite; nothing to read.
    """
    if tokens < 1 or batch_prompts < 1:
        raise UnweaveError(f"tokens and batch_prompts must be at least 1, got {tokens} and {batch_prompts}.")
    _check_weights(sae)
    if not isinstance(model, LoadedModel):
        model = load_model(model, tokenizer, device=device)
    elif device is not None:
        model.module.to(device)
    if sae.device != model.device:
        sae = copy.deepcopy(sae).to(model.device)
    reads, place = places_of(sae, model, hook, target)
    usual = default_data_config if model.vision is None else default_image_config
    config = replace(data_config or usual(sae), seed=seed)
    with torch.no_grad(), _evaluating(sae, model.module), open_rows(data, model, config) as (rows, source):
        batches = passes(rows, batch_prompts, tokens)
        if not (first := first_rows(batches, MEDIAN_PROMPTS)):
            raise UnweaveError(f"{source.name} hold no rows to evaluate on.")
        measured = Measurement(sae, model, place, masks or default_masks(sae), first, reads, source.context)
        measured.notes += differences(sae.metadata, model, reads, warn_of_hook=False)
        for batch in chain(first, batches):
            measured.add(batch)
            if progress is not None:
                progress(measured.masks.report.seen, tokens)
        measured.notes += _too_little(measured, source, tokens)
        return _report(measured, source, tokens=tokens, batch_prompts=batch_prompts)


def _check_weights(sae: SAE) -> None:
    """Refuse an SAE whose numbers would all be unknown; a BatchTopK's threshold is missing until it is calibrated."""
    for name, tensor in sae.state_dict().items():
        finite = bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())  # a sum may overflow, which is fine
        if not finite and not (name == "threshold" and sae.activation.calibrated):
            raise UnweaveError(f"{name} of the SAE holds values that are NaN or infinite, so it cannot be measured.")


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode, and each part of them back into its own mode afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _too_little(measured: Measurement, source: Source, tokens: int) -> list[str]:
    report = measured.masks.report
    notes = []
    if report.seen < tokens:
        side = "" if source.split == "all" else f"{source.split} "
        few = f"there are {report.seen:,}, fewer than the {tokens:,} asked for"
        notes.append(f"measured on all {side}tokens of {source.name}: {few}")
    if not report.kept:
        why = report.why_nothing(measured.masks.config)
        notes.append(f"the masks left no token, so nothing about activations could be measured: {why}")
    if source.split == "training":
        notes.append("measured on training tokens")
    if source.bad:
        notes.append(f"{len(source.bad)} images could not be read: {', '.join(source.bad)}")
    return notes


def _report(measured: Measurement, source: Source, *, tokens: int, batch_prompts: int) -> Report:
    sae, codes, cosines = measured.sae, measured.codes, weight_cosines(measured.sae)
    return Report(
        metrics=compute(measured.reconstruction, codes, measured.behaviour, cosines),
        definitions=definitions(codes.n_tokens),
        sums={
            "reconstruction": measured.reconstruction.to_dict(),
            "codes": codes.to_dict(),
            "behaviour": measured.behaviour.to_dict(),
        },
        per_feature={
            "n_fired": codes.counts(),
            "feature_density": feature_density(codes),
            "consistent_activation_heuristic": consistent_activation_heuristic(codes),
            "encoder_bias": sae.b_enc.float().cpu(),
            "encoder_norm": sae.W_enc.float().norm(dim=0).cpu(),
            "decoder_norm": sae.W_dec.float().norm(dim=1).cpu(),
            "max_encoder_cosine": cosines.max_encoder,
            "max_decoder_cosine": cosines.max_decoder,
            "encoder_decoder_cosine": cosines.encoder_decoder,
        },
        density_histogram=density_histogram(codes),
        provenance=provenance(measured, source, tokens=tokens, batch_prompts=batch_prompts),
        baseline=BASELINE,
        notes=measured.notes,
    )
