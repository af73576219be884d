"""A run beside the model itself: its batches are clean passes over rows of text, in the order of the text.

    rows of text -> clean pass -> activations at the hooks -> a step of each coder -> the next rows

The model is frozen. What a step against the model does with a pass is in `unweave.training.end_to_end`; that of a
temporal SAE's decoder, which is trained on its error but reads whole rows, in `unweave.training.temporal_tuning`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unweave._errors import UnweaveError
from unweave.activations import TokenBatch
from unweave.activations.masks import Masks, lengths_of
from unweave.models import Hook, Meter, capture, dtype_of, splice
from unweave.models.meter import typical_seconds
from unweave.sae import SAE
from unweave.training.buffers import Buffer
from unweave.training.config import SAEConfig
from unweave.training.end_to_end import CleanPass, SplicedTrainee, later_hooks
from unweave.training.fresh import scale_of
from unweave.training.further import as_trained, holding, settings_of
from unweave.training.plan import Plan, step_once
from unweave.training.session import Session
from unweave.training.sites import Site
from unweave.training.temporal_tuning import Sequences, TemporalTuning
from unweave.training.trainee import Trainee

_MAX_EMPTY_PASSES = 64
_SAMPLE_PASSES = 8
"""Passes whose activations give the scale and the initial bias, and the share of tokens that the masks leave."""


@dataclass
class SplicedSession(Session):
    """A prepared run against the model: its batches are clean passes, and its trainees put their output into others.

    Args:
        start: The SAE to train further; None: fresh ones.
    """

    start: SAE | None = None

    def __post_init__(self) -> None:
        self.make = self._trainee
        self.prompts = max(1, self.config.batch_size // self.rows.context)
        """Rows in a step."""
        self.later = later_hooks(self.config, self.model)
        self.masks = Masks(self.config.masks, self.model.tokenizer, self.rows.context)
        self.current: CleanPass | None = None
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
    def clean(self, batch: TokenBatch) -> CleanPass:
        """A pass of the unchanged model."""
        seen: dict[Hook, Tensor] = {}
        hooks = dict.fromkeys([*self.stream.hooks, *self.later])

        def keep(hook: Hook) -> Any:
            return lambda activation: seen.setdefault(hook, activation)

        ids, inputs = batch.inputs(self.model.device)
        logits = None
        if self.config.end_to_end is None:
            activations = capture(self.model.module, self.stream.hooks, input_ids=ids, **inputs)
        else:
            with splice(self.model.module, {hook: keep(hook) for hook in hooks}):
                logits = self.model.module(ids, **inputs).logits
            activations = {str(hook): seen[hook] for hook in self.stream.hooks}
        for name, activation in activations.items():
            if activation.shape[:2] != ids.shape or activation.ndim != 3:
                raise UnweaveError(f"the hook {name!r} has no one vector for each token.")
        mask = self.masks.by_token(batch).to(self.model.device)
        if bool(mask.any()):
            mask[mask.clone()] = self.masks.by_norm({n: lengths_of(a[mask]) for n, a in activations.items()})
        return CleanPass(ids, mask, inputs, logits, activations, [seen[hook] for hook in self.later])

    @contextmanager
    def batches(self) -> Iterator[Any]:
        """Clean passes without end, with the model's parameters frozen within the block."""
        with _frozen(self.model.module):
            yield _Passes(self)

    def _trainee(
        self, config: SAEConfig, site: Site, sample: Mapping[str, Tensor], *, steps: int, tokens: int, seed: int
    ) -> Trainee:
        """A coder that reads the passes, fresh or further."""
        made = site.sample(sample)
        if self.start is not None and (method := self.config.start.method) is not None:  # type: ignore[union-attr]
            tuning = TemporalTuning(self.start, method, config, **made, steps=steps, tokens=tokens)
            tuning.read = partial(self._sequences, site)
            return tuning
        x = made["sample"]
        start = None if self.start is None else as_trained(self.start).to(x.device)
        if self.start is not None and start is not None:
            assert self.config.start is not None
            if config == settings_of(self.start, self.config.start):
                config = holding(config, start, x)
                if start.tied and not start.per_token:  # what is in units of the inputs, in those of training
                    factor = scale_of(x)
                    assert isinstance(factor, float)
                    config = replace(config, activation=config.activation.rescaled(factor))
        trainee = SplicedTrainee(config, **made, steps=steps, tokens=tokens, seed=seed, start=start)
        trainee.attach(self, site)
        return trainee

    def _sequences(self, site: Site, n: int) -> Sequences:
        """The current pass at a site of one hook, and its first tokens that count."""
        assert self.current is not None
        (hook,) = site.inputs
        return self.current.activations[hook], self.current.first(n)

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
            rate = per_pass / typical_seconds(lambda: self.clean(batch), seconds=seconds)  # type: ignore[arg-type]
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
                            trainee.step(*site.rows(rows))
                        held, step = held + stepping.live, max(step, stepping.peak - stepping.live)
                        step_seconds += typical_seconds(partial(step_once, trainee, site, rows))
        self.masks.load_state_dict(masks)
        self.kept = per_pass / (self.prompts * self.rows.context)
        self.look_ahead()
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
            saes=[f"{sae}, end to end" if self.config.end_to_end else str(sae) for sae in self.config.saes],
            harvest_rate=rate,
            step_seconds=step_seconds,
            kept=self.kept,
            once=self.once,
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
