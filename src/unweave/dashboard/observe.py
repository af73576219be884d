"""From rows of tokens to the codes of every token, once.

The model stops at the hook. All tokens are encoded, masked ones too, because contexts show them; which tokens count is
told to the collector apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unweave._errors import UnweaveError
from unweave.activations import DataConfig, Masks, TokenBatch, TokenRows
from unweave.activations.masks import lengths_of
from unweave.dashboard.collect import Collected, Collector
from unweave.evaluation.sample import check_fit
from unweave.models import Hook, LoadedModel, capture, without_path
from unweave.sae import SAE

PROMPTS_PER_PASS = 64
_SPREAD = 8
_POOL_TOKENS = 2_000_000


def read_rows(data: Any, model: LoadedModel, config: DataConfig, tokens: int) -> tuple[TokenBatch, str]:
    """Rows of about `tokens` tokens, and in words where they are from.

    They are evenly spaced over the next 8 times as many (2 million tokens at most), because long documents would
    otherwise leave room for a few dozen of them, and a latent's strongest contexts, one from each, would not be many.

    Args:
        data: What `TokenRows` takes, of which the training documents are read; `TokenRows`, which are not moved
            on; or one `TokenBatch` or a list of them.
        model: Its tokenizer reads text.
        config: How documents become rows.
        tokens: Tokens wanted, padding included.
    """
    data = [data] if isinstance(data, TokenBatch) else data
    if isinstance(data, Sequence) and data and isinstance(data[0], TokenBatch):
        fields = ([getattr(batch, name) for batch in data] for name in ("ids", "real", "documents"))
        return _spread(TokenBatch(*map(torch.cat, fields)), tokens), "token batches"
    rows = data if isinstance(data, TokenRows) else TokenRows(data, model.tokenizer, config, held_out=False)
    context = rows.config.context
    wanted = -(-tokens // context)
    pool = rows.peek(max(wanted, min(_SPREAD * wanted, _POOL_TOKENS // context)))
    if not len(pool):
        raise UnweaveError(f"{rows.source.name} holds no rows to show.")
    side = "held-out" if rows.held_out else "training" if rows.config.held_out else "all"
    return _spread(pool, tokens), f"{side} documents of {without_path(rows.source.name)}"


def _spread(pool: TokenBatch, tokens: int) -> TokenBatch:
    wanted = min(-(-tokens // pool.ids.shape[1]), len(pool))
    chosen = torch.linspace(0, len(pool) - 1, wanted, dtype=torch.float64).round().long()
    return TokenBatch(pool.ids[chosen], pool.real[chosen], pool.documents[chosen])


def collect(
    sae: SAE,
    model: LoadedModel,
    hook: Hook,
    rows: TokenBatch,
    masks: Masks,
    collector: Collector,
    progress: Callable[[int, int], None] | None = None,
) -> Collected:
    """Run all rows through the model and the SAE and collect their codes.

    Raises:
        UnweaveError: Tokens that are not the model's, a hook that is not of the SAE's width, activations that are NaN
            or infinite.
    """
    check_fit(model, rows)
    with torch.no_grad(), _inference(model.module):
        for start in range(0, len(rows), PROMPTS_PER_PASS):
            some = slice(start, start + PROMPTS_PER_PASS)
            batch = TokenBatch(rows.ids[some], rows.real[some], rows.documents[some])
            x = _activations(sae, model, hook, batch)
            counted = _counted(x, batch, masks, str(hook), start // PROMPTS_PER_PASS)
            codes = sae.encode_sparse(x.flatten(0, 1))
            with _one_thread():
                collector.add(codes, *(t.to(sae.device) for t in (batch.ids, batch.real, batch.documents, counted)))
            if progress is not None:
                progress(min(start + PROMPTS_PER_PASS, len(rows)), len(rows))
    return collector.finish()


def _activations(sae: SAE, model: LoadedModel, hook: Hook, batch: TokenBatch) -> Float[Tensor, "n context d_in"]:
    inputs: dict[str, Any] = {"input_ids": batch.ids.to(model.device)}
    if not batch.real.all():
        inputs["attention_mask"] = batch.real.to(model.device, torch.int64)
    (x,) = capture(model.module, [hook], **inputs).values()
    if x.shape[:2] != batch.ids.shape and x.shape[0] != batch.ids.numel():
        shapes = f"{tuple(x.shape)} for tokens of shape {tuple(batch.ids.shape)}"
        raise UnweaveError(f"{str(hook)!r} gives activations of shape {shapes}: not one per token.")
    x = x.reshape(*batch.ids.shape, -1)
    if x.shape[2] != sae.d_in:
        raise UnweaveError(
            f"the SAE takes activations of width {sae.d_in}, but {str(hook)!r} of {model.name!r} gives {x.shape[2]}."
        )
    return x.to(sae.device)


def _counted(
    x: Float[Tensor, "n context d_in"], batch: TokenBatch, masks: Masks, hook: str, number: int
) -> Bool[Tensor, "n context"]:
    counted = masks.by_token(batch).to(x.device)
    lengths = lengths_of(x[counted])
    if not lengths.isfinite().all():
        raise UnweaveError(f"the activations at {hook!r} are NaN or infinite in pass {number + 1}.")
    if len(lengths):
        counted[counted.clone()] = masks.by_norm({hook: lengths})
    return counted


@contextmanager
def _one_thread() -> Iterator[None]:
    """Collecting is hundreds of short operations: threads would wait for each other longer than they work.

    On two cores that are busy otherwise, the waiting was measured to take twenty times the work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _inference(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; every part goes back into its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
