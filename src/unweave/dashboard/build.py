"""The feature page, from an SAE, its model and text to one HTML file.

The rows are those that the SAE was trained on, unless `data` says otherwise: a page scores nothing, and there are more
of them. The model runs each row once and stops at the hook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unweave import __version__
from unweave._errors import UnweaveError
from unweave._files import atomic_path
from unweave.activations import DataConfig, MaskConfig, MaskReport, Masks
from unweave.dashboard.collect import Collected, Collector
from unweave.dashboard.interest import most_interesting
from unweave.dashboard.logits import logit_effects
from unweave.dashboard.observe import collect, read_rows
from unweave.dashboard.page import render
from unweave.dashboard.records import latent_records
from unweave.dashboard.tokens import token_strings
from unweave.evaluation import Report
from unweave.evaluation.provenance import weights_hash
from unweave.evaluation.sample import default_data_config, default_masks, hook_of
from unweave.models import LoadedModel, differences, load_model, without_path
from unweave.sae import SAE

_TOP_CONTEXTS = 15


def dashboard(
    sae: SAE,
    *,
    model: LoadedModel | nn.Module | str | Path,
    data: Any,
    path: str | Path,
    hook: str | None = None,
    tokens: int = 200_000,
    n_features: int = 100,
    data_config: DataConfig | None = None,
    masks: MaskConfig | None = None,
    report: Report | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a page that shows when the most interesting latents fire, and what they do to the logits.

    If the SAE was trained on another model or at another hook, a warning and the page say so.

    Args:
        sae: A finished SAE, which takes raw activations.
        model: Where its activations come from.
        data: Text or tokens in any form that `TokenRows` takes, of which the training documents are read; `TokenRows`,
            which are not moved on; or one `TokenBatch` or a list of them.
        path: The HTML file to write.
        hook: Where the SAE belongs; by default where its metadata says (`hf_hook_name`, else `hook_name`).
        tokens: Tokens to run, in whole rows; they are spread over 8 times as many, for the sake of more documents.
        n_features: Latents to show.
        data_config: How documents become rows, by default as the SAE's metadata says.
        masks: Which tokens do not count; by default special tokens, activations longer than 10 times the median, and
            the positions that the SAE's metadata leaves out. Contexts show them nevertheless.
        report: An evaluation of the SAE, whose L0, explained variance and loss recovered the page quotes.
        seed: Order in which documents are read (in place of `data_config.seed`), and the random contexts.
        progress: Called after each pass with the number of rows run so far, and of all rows.

    Returns:
        The path of the page.

    Raises:
        UnweaveError: No hook is known, or it is not of the SAE's width; tokens that are not the model's, or the
            tokenizer; activations that are NaN or infinite; nothing to read.
    """
    if tokens < 1 or n_features < 1:
        raise UnweaveError(f"tokens and n_features must be at least 1, got {tokens} and {n_features}.")
    if not isinstance(model, LoadedModel):
        model = load_model(model)
    place = hook_of(sae, model, hook)
    notes = differences(sae.metadata, model, [place])
    config = replace(data_config or default_data_config(sae), seed=seed)
    rows, origin = read_rows(data, model, config, tokens)
    masking = Masks(masks or default_masks(sae), model.tokenizer, rows.ids.shape[1])
    collector = Collector(sae.d_sae, n_top=_TOP_CONTEXTS, seed=seed, device=sae.device)
    collected = collect(sae, model, place, rows, masking, collector, progress)

    strings = token_strings(model.tokenizer, range(int(rows.ids.max()) + 1))
    interest = most_interesting(
        collected, sae.W_dec, n=n_features, embedding=_embedding(model, len(strings)), strings=strings
    )
    vocabulary = None if model.tokenizer is None else len(model.tokenizer)
    effects = logit_effects(model.module, sae.W_dec[interest.latents.to(sae.device)], vocabulary=vocabulary)
    records, table = latent_records(collected, interest, effects, model.tokenizer)
    subject = f"{without_path(model.name)} · {place}"
    n_documents = len(rows.documents[rows.real].unique())
    header = {
        "subject": subject,
        "facts": _facts(sae, collected, report),
        "more": [
            ["data", origin],
            ["rows", f"{len(rows):,} of {rows.ids.shape[1]} tokens, from {n_documents:,} documents"],
            *_mask_counts(masking.report, masking.config),
            ["latents that never fired", f"{int((collected.counts == 0).sum()):,} of {sae.d_sae:,}"],
            ["seed", str(seed)],
            *(["note", note] for note in notes),
            ["SAE weights", f"sha256 {weights_hash(sae)[:16]}"],
            ["made with", f"unweave {__version__}"],
        ],
    }
    page = render({"header": header, "strings": table, "latents": records}, title=f"{subject} · unweave")
    with atomic_path(path) as temporary:
        temporary.write_bytes(page.encode())
    return Path(path)


def _facts(sae: SAE, collected: Collected, report: Report | None) -> list[list[str]]:
    """The header's line: what the SAE is, and how good."""
    l0 = int(collected.counts.sum()) / max(collected.n_tokens, 1)
    k = getattr(sae.activation, "k", None)
    kind = type(sae.activation).__name__ + (f", k = {k}" if k else "")
    facts = [["SAE", f"{kind}, {sae.d_sae:,} latents"]]
    if report is None:
        facts.append(["L0", f"{l0:.1f}"])
    else:
        measured = [
            ("L0", "l0", ".1f"), ("explained variance", "explained_variance", ".3f"),
            ("loss recovered", "ce_loss_score", ".3f"),
        ]
        facts += [[label, f"{report[name]:{form}}"] for label, name, form in measured if report[name] is not None]
    return [*facts, ["tokens", f"{collected.n_tokens:,}"]]


def _mask_counts(counts: MaskReport, config: MaskConfig) -> list[list[str]]:
    left_out = [
        (counts.by_id, "special or excluded ids"),
        (counts.by_position, "positions"),
        (counts.by_norm, f"norm above {config.norm_multiple:g} × median" if config.norm_multiple else "norm"),
    ]
    reasons = "; ".join(f"{n:,} by {reason}" for n, reason in left_out if n)
    return [
        ["tokens read", f"{counts.seen:,}"],
        ["tokens counted", f"{counts.kept:,}"],
        ["masked", f"{reasons} (shown in contexts, counted nowhere)" if reasons else "none"],
    ]


def _embedding(model: LoadedModel, n_ids: int) -> Float[Tensor, "vocabulary d"]:
    """The model's token embedding, or, where there is none, random directions: tokens are then alike or unrelated."""
    module: Any = model.module
    embedding = getattr(module, "get_input_embeddings", lambda: None)()
    if embedding is not None:
        return embedding.weight
    return torch.randn(n_ids, 64, generator=torch.Generator().manual_seed(0))
