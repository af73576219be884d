"""Training against the model itself: the SAE is spliced in, and what its reconstruction does to the predictions counts.

    rows of text -> clean pass -> activations at the hook -> SAE -> pass with the reconstruction in their place -> loss

From scratch (Braun et al., arXiv 2405.12241), or, from an SAE that was trained as usual, on the last few million tokens
(arXiv 2503.17272; Gemma Scope 2). It is a run like any other, of a `TrainConfig` with `end_to_end`: penalties, dead
latents, schedules, the optimiser and checkpoints are those of any training. The model is frozen, and gradients flow
through its layers above the hook. Tokens are in the order of the text here, because the model reads whole rows.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from unweave._errors import UnweaveError
from unweave.activations import TokenBatch
from unweave.activations.masks import Masks
from unweave.models import Hook, LoadedModel, Meter, dtype_of, resolve_hooks, splice
from unweave.objectives import EndToEnd, balanced, ce_loss, downstream_error, kl_loss, squared_error
from unweave.sae import SAE
from unweave.training.config import SAEConfig, TrainConfig
from unweave.training.finetune import move_bias
from unweave.training.further import holding, settings_of
from unweave.training.plan import Buffer, Plan
from unweave.training.session import Session
from unweave.training.sites import Site
from unweave.training.trainee import Trainee

_MAX_EMPTY_PASSES = 64
_SAMPLE_PASSES = 8
"""Passes whose activations give the scale and the initial bias, and the share of tokens that the masks leave."""


def check_end_to_end(config: TrainConfig, model: LoadedModel, hooks: Sequence[str]) -> None:
    """Refuse a model that predicts no tokens, and later hooks that do not come after all of those trained at.

    Raises:
        UnweaveError: With the reason.
    """
    assert config.end_to_end is not None
    if model.tokenizer is None:
        raise UnweaveError(f"the model {model.name!r} has no tokenizer, so it cannot read text.")
    if getattr(model.module, "get_output_embeddings", lambda: None)() is None:
        raise UnweaveError(f"an end-to-end loss takes a model that predicts tokens, and {model.name!r} does not.")
    for later in _later(config, model):
        for hook in hooks:
            if list(map(str, resolve_hooks(model.module, [hook, str(later)])))[-1] == hook:
                raise UnweaveError(f"the downstream hook {str(later)!r} does not come after {hook!r}.")


def _later(config: TrainConfig, model: LoadedModel) -> list[Hook]:
    """The hooks at which downstream errors are measured."""
    names = list(config.end_to_end.hooks) if config.end_to_end else []
    return resolve_hooks(model.module, names) if names else []


class _Pass(NamedTuple):
    """A clean pass over some rows of text."""

    ids: Int64[Tensor, "prompts context"]
    mask: Bool[Tensor, "prompts context"]
    inputs: dict[str, Any]
    logits: Float[Tensor, "prompts context vocab"]
    activations: dict[str, Float[Tensor, "prompts context d"]]
    """By hook."""
    later: list[Float[Tensor, "prompts context d"]]

    def rows(self) -> dict[str, Float[Tensor, "n d"]]:
        """The activations of the unmasked tokens."""
        return {name: activation[self.mask] for name, activation in self.activations.items()}


@dataclass
class SplicedSession(Session):
    """A prepared run against the model: its batches are clean passes, and its trainees put their output into another.

    Args:
        start: The SAE to train further; None: fresh ones.
    """

    start: SAE | None = None

    def __post_init__(self) -> None:
        self.make = self._trainee
        self.prompts = max(1, self.config.batch_size // self.rows.context)
        """Rows in a step."""
        self.hooks = [hook for hook in self.stream.hooks if str(hook) not in self.config.targets]
        self.later = _later(self.config, self.model)
        self.masks = Masks(self.config.masks, self.model.tokenizer, self.rows.context)
        self.current: _Pass | None = None
        """The pass that a step is taken on."""

    @cached_property
    def sample(self) -> list[dict[str, Float[Tensor, "n d"]]]:
        """The activations of the run's first passes, whatever was trained on since.

        Raises:
            UnweaveError: The masks leave nothing of them.
        """
        position, masks = self.rows.state_dict(), self.masks.state_dict()
        found = []
        for _ in range(_SAMPLE_PASSES):
            batch = self.rows.next_rows(self.prompts)
            assert isinstance(batch, TokenBatch)
            if len(batch):
                found.append(self.clean(batch).rows())
        why = self.masks.report.why_nothing(self.config.masks)
        self.rows.load_state_dict(position)
        self.masks.load_state_dict(masks)
        if not any(len(x) for made in found for x in made.values()):
            raise UnweaveError(f"the masks left no token in {len(found)} passes: {why}.")
        return found

    @torch.no_grad()
    def clean(self, batch: TokenBatch) -> _Pass:
        """A pass of the unchanged model."""
        seen: dict[Hook, Tensor] = {}
        hooks = [*self.hooks, *self.later]

        def keep(hook: Hook) -> Any:
            return lambda activation: seen.setdefault(hook, activation)

        ids, inputs = batch.inputs(self.model.device)
        with splice(self.model.module, {hook: keep(hook) for hook in hooks}):
            logits = self.model.module(ids, **inputs).logits
        activations = {str(hook): seen[hook] for hook in self.hooks}
        for name, activation in activations.items():
            if activation.shape[:2] != ids.shape or activation.ndim != 3:
                raise UnweaveError(f"the hook {name!r} has no one vector for each token.")
        mask = self.masks.by_token(batch).to(self.model.device)
        if bool(mask.any()):
            norms = {n: torch.linalg.vector_norm(a[mask], dim=-1, dtype=torch.float32) for n, a in activations.items()}
            mask[mask.clone()] = self.masks.by_norm(norms)
        return _Pass(ids, mask, inputs, logits, activations, [seen[hook] for hook in self.later])

    @contextmanager
    def batches(self) -> Iterator[Any]:
        """Clean passes without end, with the model's parameters frozen within the block."""
        with _frozen(self.model.module):
            yield _Passes(self)

    def _trainee(
        self, config: SAEConfig, site: Site, sample: Mapping[str, Tensor], *, steps: int, tokens: int, seed: int
    ) -> Trainee:
        x, start = site.rows(sample).x, self.start
        if start is not None:
            assert self.config.start is not None
            if config == settings_of(start, self.config.start):
                config = holding(config, start.to(x.device), x)
            start = _subtracting(start)
        assert self.config.end_to_end is not None
        trainee = _Spliced(config, x, steps=steps, tokens=tokens, seed=seed, start=start)
        trainee.attach(self, next(h for h in self.hooks if str(h) == site.inputs[0]), self.config.end_to_end)
        return trainee

    def plan(self, seconds: float = 0.0) -> Plan:
        """Steps, bytes and time, measured on some passes (for `seconds`, at least) and steps of each SAE."""
        per_pass = sum(len(next(iter(made.values()))) for made in self.sample) / len(self.sample)
        tokens, model = self.config.tokens, self.model.module
        steps = math.ceil(tokens / per_pass)
        masks = self.masks.state_dict()
        buffers = [Buffer("model", sum(p.nbytes for p in model.parameters()), str(self.model.device), present=True)]
        held = step = step_seconds = 0.0
        with self.batches() as batches:
            batch = self.rows.peek(self.prompts)
            with Meter() as passing:
                self.current = self.clean(batch)  # type: ignore[arg-type]
            started, made = time.perf_counter(), 0
            while made < 2 or time.perf_counter() - started < seconds:
                made += len(self.clean(batch).ids) > 0  # type: ignore[arg-type]
            rate = per_pass * made / (time.perf_counter() - started)
            rows = self.current.rows()
            if not len(next(iter(rows.values()))):
                rows = {}
            for config, sites in zip(self.config.saes, self.sites, strict=True):
                for site in sites:
                    with Meter() as building:
                        trainee = self.make(config, site, batches.peek(0), steps=steps, tokens=tokens, seed=0)
                    held += building.live
                    if rows:
                        with Meter() as stepping:
                            trainee.step(site.rows(rows).x)
                        held, step = held + stepping.live, max(step, stepping.peak - stepping.live)
                        started = time.perf_counter()
                        trainee.step(site.rows(rows).x).loss.item()
                        step_seconds += time.perf_counter() - started
        self.masks.load_state_dict(masks)
        at = str(self.stream.device)
        buffers += [
            Buffer("clean pass", passing.peak, at, lower="batch_size"),
            Buffer("weights, gradients and moments", int(held), at, lower="d_sae"),
            Buffer("spliced pass and step", int(step), at, lasting=False, lower="batch_size"),
        ]
        return Plan(
            tokens=tokens,
            rows=steps * self.prompts,
            passes=steps,
            prompts_per_pass=self.prompts,
            precision=str(dtype_of(model)).removeprefix("torch."),
            background=False,
            steps=steps,
            widths={name: x.shape[1] for name, x in self.sample[0].items()},
            saes=[f"{sae}, end to end" for sae in self.config.saes],
            harvest_rate=rate,
            step_seconds=step_seconds,
            kept=per_pass / (self.prompts * self.rows.context),
            buffers=buffers,
            disk_bytes=(2 if self.config.checkpoint_every else 1) * int(held),
            out=self.config.out,
        )


class _Passes(Iterator[dict[str, Tensor]]):
    """Clean passes over the rows, in their order, without those that the masks leave nothing of."""

    def __init__(self, session: SplicedSession) -> None:
        self.session = session

    def __next__(self) -> dict[str, Float[Tensor, "n d"]]:
        session = self.session
        for _ in range(_MAX_EMPTY_PASSES):
            batch = session.rows.next_rows(session.prompts)
            assert isinstance(batch, TokenBatch)
            session.current = session.clean(batch)
            if bool(session.current.mask.any()):
                return session.current.rows()
        why = session.masks.report.why_nothing(session.config.masks)
        raise UnweaveError(f"the masks left no token in {_MAX_EMPTY_PASSES} passes: {why}.")

    def peek(self, n: int) -> dict[str, Float[Tensor, "n d"]]:
        """The activations of the run's first passes, however many are asked for."""
        made = self.session.sample
        return {name: torch.cat([rows[name] for rows in made]) for name in made[0]}

    def state_dict(self, **_: Any) -> dict[str, Any]:
        """The position in the rows, and what the masks measured."""
        return {"rows": self.session.rows.state_dict(), "masks": self.session.masks.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved."""
        self.session.rows.load_state_dict(state["rows"])
        self.session.masks.load_state_dict(state["masks"])


class _Spliced(Trainee):
    """A trainee whose reconstruction stands in the model while its loss is computed."""

    def attach(self, session: SplicedSession, hook: Hook, loss: EndToEnd) -> None:
        """Say where the SAE stands, and what counts."""
        self.session, self.hook, self.end_to_end = session, hook, loss

    def loss(
        self, x: Float[Tensor, "n d_in"], sparsity_scale: float, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """That of the first unmasked tokens of the current pass, which `x` are the activations of."""
        usual, x_hat, codes = super().loss(x, sparsity_scale, target)
        error, settings, clean = squared_error(x_hat, x), self.end_to_end, self.session.current
        assert clean is not None
        mask = clean.mask & (clean.mask.flatten().cumsum(0) <= len(x)).view_as(clean.mask)  # the last step is cut
        later: list[Tensor] = []

        def put(activation: Tensor) -> Tensor:
            new = activation.clone()
            new[mask] = (x_hat / self.scale).to(new.dtype)
            return new

        def keep(activation: Tensor) -> Tensor:
            later.append(activation)
            return activation

        module = self.session.model.module
        with splice(module, {self.hook: put} | dict.fromkeys(self.session.later, keep)):
            logits = module(clean.ids, **clean.inputs).logits
        own = logits.new_zeros(())
        d = x.shape[1]
        if settings.beta is not None or settings.kl:
            kl = kl_loss(clean.logits, logits, mask)
            own = own + (d * settings.kl * kl if settings.beta is None else balanced(error, kl, settings.beta))
        if settings.ce:
            own = own + d * settings.ce * ce_loss(logits, clean.ids, mask)
        if settings.downstream:
            own = own + d * settings.downstream * downstream_error(clean.later, later, mask)
        # What is not the squared error (penalties, dead latents) stays.
        return usual - error + settings.error * error + own, x_hat, codes


def _subtracting(sae: SAE) -> SAE:
    """The SAE as training has it: in float32, and its decoder's bias is subtracted from the input."""
    made = copy.deepcopy(sae).float()
    move_bias(made, subtracted=True)
    if made.activation.needs_unit_norm:  # a file in bfloat16 has rows of one norm up to its rounding alone
        norms = made.W_dec.detach().norm(dim=1, keepdim=True)
        made.W_dec.data.mul_(norms.mean() / norms)
    return made


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
