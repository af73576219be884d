"""Training against the model itself: the SAE is spliced in, and what its reconstruction does to the predictions counts.

    rows of text -> clean pass -> activations at the hook -> SAE -> pass with the reconstruction in their place -> loss

From scratch (Braun et al., arXiv 2405.12241), or, from an SAE that was trained as usual, on the last few million tokens
(arXiv 2503.17272; Gemma Scope 2). Penalties, dead latents, schedules and the optimiser are those of any training; the
model is frozen, and gradients flow through its layers above the hook. Tokens are in the order of the text here, because
the model reads whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from unweave._errors import UnweaveError
from unweave.activations import DataConfig, MaskConfig, TokenRows
from unweave.activations.masks import Masks
from unweave.activations.tokens import TokenBatch
from unweave.models import Hook, LoadedModel, load_model, resolve_hooks, splice
from unweave.objectives import Contrastive, EndToEnd, balanced, ce_loss, downstream_error, kl_loss, squared_error
from unweave.sae import SAE
from unweave.training.config import SAEConfig
from unweave.training.finish import finished_sae
from unweave.training.progress import Progress
from unweave.training.trainee import StepSums, Trainee

_MAX_EMPTY_PASSES = 64
_SAMPLE_PASSES = 8
"""Passes whose activations give the scale and the initial bias, and calibrate thresholds at the end."""


class _Pass(NamedTuple):
    """A clean pass over some rows of text."""

    ids: Int64[Tensor, "prompts context"]
    mask: Bool[Tensor, "prompts context"]
    inputs: dict[str, Any]
    logits: Float[Tensor, "prompts context vocab"]
    activation: Float[Tensor, "prompts context d"]
    later: list[Float[Tensor, "prompts context d"]]

    @property
    def x(self) -> Float[Tensor, "n d"]:
        """The activations of the unmasked tokens."""
        return self.activation[self.mask]


def train_end_to_end(
    config: SAEConfig,
    loss: EndToEnd = EndToEnd(),  # noqa: B008, frozen
    *,
    model: Any,
    data: Any,
    hook: str,
    tokens: int,
    start: SAE | None = None,
    prompts: int = 16,
    text: DataConfig | None = None,
    masks: MaskConfig | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SAE:
    """Train an SAE, or fine-tune one, on what a causal language model predicts with it in place.

    Args:
        config: The SAE and its training. The published fine-tuning has a small learning rate and no penalty.
        loss: What takes the place of the squared error.
        model: A `LoadedModel`, or what `load_model` takes.
        data: Text or tokens, as `TokenRows` takes them.
        hook: Where the SAE belongs; activations are one vector per token.
        tokens: Unmasked tokens to train on, at least.
        start: An SAE of the config's shape to go on from; None: a fresh one.
        prompts: Rows of text in a step.
        text: How text becomes rows.
        masks: Tokens that keep their activation and do not count.
        seed: Gives the initial decoder.
        progress: Whether to show progress on standard error.

    Returns:
        A finished SAE for raw activations.

    Raises:
        UnweaveError: Before any text is read, if there is no model or it has no tokenizer, a hook does not exist, or
            the configuration's main loss is not a plain squared error; or if the text is too short.
    """
    if model is None:
        raise UnweaveError("an end-to-end loss needs the model that the SAE is spliced into: pass model=...")
    if config.coder != "sae" or config.matryoshka or config.error != "squared" or config.normalize != "scalar":
        raise UnweaveError(
            "an end-to-end loss takes the place of an autoencoder's squared error: leave out coder, matryoshka, error "
            "and normalize."
        )
    if config.temporal or any(isinstance(term, Contrastive) for term in config.sparsity_terms):
        raise UnweaveError("an end-to-end loss leaves masked tokens out, so it has no whole sequences or pairs.")
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    if loaded.tokenizer is None:
        raise UnweaveError(f"the model {loaded.name!r} has no tokenizer, so it cannot read text.")
    hooks = [_one(loaded, name) for name in (hook, *loss.hooks)]
    for later in hooks[1:]:
        if list(map(str, resolve_hooks(loaded.module, [str(hooks[0]), str(later)])))[-1] == str(hooks[0]):
            raise UnweaveError(f"the downstream hook {str(later)!r} does not come after {str(hooks[0])!r}.")
    text = text or DataConfig()
    rows = TokenRows(data, loaded.tokenizer, text, held_out=False, repeat=True)
    filters = Masks(masks or MaskConfig(), loaded.tokenizer, text.context)
    with _frozen(loaded.module):
        usable = _usable(loaded, hooks, rows, filters, prompts)
        kept = [p.x for p in islice(usable, _SAMPLE_PASSES)]
        if not kept:
            raise UnweaveError("there is no text to train on.")
        sample = torch.cat(kept)
        steps = -(-tokens * len(kept) // len(sample))
        trainee = _Spliced(config, sample, steps=steps, tokens=tokens, seed=seed, start=start)
        trainee.attach(loaded.module, hooks, loss)
        seen = 0
        with Progress(tokens, label="end to end", show=progress) as bar:
            while seen < tokens:
                clean = next(usable)
                seen += int(clean.mask.sum())
                sums = trainee.step_on(clean)
                bar.update(min(seen, tokens), [_row(sums, trainee)])
    metadata = {"model_name": loaded.name, "hf_hook_name": str(hooks[0]), "end_to_end_tokens": seen}
    return finished_sae(trainee, [sample], metadata)


class _Spliced(Trainee):
    """A trainee whose reconstruction stands in the model while its loss is computed."""

    _clean: _Pass

    def attach(self, module: nn.Module, hooks: Sequence[Hook], loss: EndToEnd) -> None:
        """Say where the SAE stands, and what counts."""
        self.module, self.hooks, self.end_to_end = module, list(hooks), loss

    def step_on(self, clean: _Pass) -> StepSums:
        """Take a step on the unmasked tokens of a pass."""
        self._clean = clean
        return self.step(clean.x)

    def loss(
        self, x: Float[Tensor, "n d_in"], sparsity_scale: float, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        usual, x_hat, codes = super().loss(x, sparsity_scale, target)
        error, settings, clean = squared_error(x_hat, x), self.end_to_end, self._clean
        later: list[Tensor] = []

        def put(activation: Tensor) -> Tensor:
            new = activation.clone()
            new[clean.mask] = (x_hat / self.scale).to(new.dtype)
            return new

        def keep(activation: Tensor) -> Tensor:
            later.append(activation)
            return activation

        edits = {self.hooks[0]: put} | dict.fromkeys(self.hooks[1:], keep)
        with splice(self.module, edits):
            logits = self.module(clean.ids, **clean.inputs).logits
        own = logits.new_zeros(())
        d = x.shape[1]
        if settings.beta is not None or settings.kl:
            kl = kl_loss(clean.logits, logits, clean.mask)
            own = own + (d * settings.kl * kl if settings.beta is None else balanced(error, kl, settings.beta))
        if settings.ce:
            own = own + d * settings.ce * ce_loss(logits, clean.ids, clean.mask)
        if settings.downstream:
            own = own + d * settings.downstream * downstream_error(clean.later, later, clean.mask)
        # What is not the squared error (penalties, dead latents) stays.
        return usual - error + settings.error * error + own, x_hat, codes


def _row(sums: StepSums, trainee: Trainee) -> dict[str, Any]:
    """What progress shows of a step."""
    n, variance = float(sums.tokens), float(sums.variance)
    return {
        "loss": float(sums.loss) / n,
        "l0": float(sums.l0) / n,
        "explained_variance": 1 - float(sums.squared_error) / variance if variance > 0 else None,
        "dead": float(trainee.dead.float().mean()),
    }


def _one(model: LoadedModel, name: str) -> Hook:
    found = resolve_hooks(model.module, [name])
    if len(found) != 1:
        raise UnweaveError(f"{name!r} stands for {len(found)} hooks, and an end-to-end loss takes one.")
    return found[0]


def _usable(model: LoadedModel, hooks: Sequence[Hook], rows: TokenRows, masks: Masks, prompts: int) -> Iterator[_Pass]:
    """Clean passes over the rows, in their order, without those that the masks leave nothing of."""
    empty = 0
    while len(batch := rows.next_rows(prompts)):
        made = _clean(model, hooks, batch, masks)
        empty = 0 if bool(made.mask.any()) else empty + 1
        if empty == _MAX_EMPTY_PASSES:
            raise UnweaveError(f"the masks left no token in {empty} passes: {masks.report}.")
        if not empty:
            yield made


@torch.no_grad()
def _clean(model: LoadedModel, hooks: Sequence[Hook], batch: TokenBatch, masks: Masks) -> _Pass:
    seen: list[Tensor] = []

    def keep(activation: Tensor) -> Tensor:
        seen.append(activation)
        return activation

    inputs: dict[str, Any] = {}
    if not batch.real.all():
        inputs["attention_mask"] = batch.real.to(model.device, torch.int64)
    ids = batch.ids.to(model.device)
    with splice(model.module, dict.fromkeys(hooks, keep)):
        logits = model.module(ids, **inputs).logits
    if seen[0].shape[:2] != ids.shape or seen[0].ndim != 3:
        raise UnweaveError(f"the hook {str(hooks[0])!r} has no one vector for each token.")
    mask = masks.by_token(batch).to(model.device)
    if bool(mask.any()):
        norms = torch.linalg.vector_norm(seen[0][mask], dim=-1, dtype=torch.float32)
        mask[mask.clone()] = masks.by_norm({str(hooks[0]): norms})
    return _Pass(ids, mask, inputs, logits, seen[0], seen[1:])


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Within the block no parameter of the model gets a gradient."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
