"""A prepared run: its model, its hooks and its data, with nothing trained yet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.activations import ActivationStream, ShuffledBatches, TokenRows
from unweave.models import LoadedModel, dtype_of, head_index, tl_name
from unweave.training.config import TrainConfig, to_dict
from unweave.training.harvest import ahead_of
from unweave.training.plan import CALIBRATION_TOKENS, Plan, plan_run
from unweave.training.rows import AnyRows, held_out_share, open_rows, rows_metadata, tokens_once
from unweave.training.sites import Site, where
from unweave.training.trainees import MakeTrainee, new_trainee


@dataclass
class Session:
    """A prepared run: everything is loaded and checked, nothing is trained."""

    config: TrainConfig
    model: LoadedModel
    sites: list[list[Site]]
    """Of each SAE of the config."""
    rows: AnyRows
    stream: ActivationStream
    data: Any
    make: MakeTrainee = new_trainee
    """Makes the coders."""
    kept: float = 1.0
    """Share of the tokens that the masks leave, once there is a plan."""

    @property
    def once(self) -> float | None:
        """Tokens to train on that the data give when they are read once; None while that is not known."""
        whole = tokens_once(self.rows)
        return None if whole is None else whole * self.kept

    def plan(self, seconds: float = 0.0) -> Plan:
        """Shapes, steps, bytes and time, measured on some forward passes (for `seconds`, at least) and steps."""
        plan = plan_run(self.config, self.stream, self.sites, seconds, make=self.make)
        self.kept = plan.kept
        self.look_ahead()
        return replace(plan, once=self.once)

    def look_ahead(self) -> None:
        """Read so much text as the ring takes before the first step, to find out where little of it ends."""
        if isinstance(self.rows, TokenRows):
            most = min(self.config.tokens, self.config.ring_size, 4 * CALIBRATION_TOKENS)
            self.rows.peek(math.ceil(most / (self.rows.context * self.kept)))

    @contextmanager
    def batches(self) -> Iterator[Any]:
        """Shuffled batches without end, the model running ahead if it is to."""
        with ahead_of(self.config, self.stream) as stream:
            yield ShuffledBatches(stream, self.config.batch_size, self.config.ring_size, self.config.seed)

    def held_out(self) -> dict[str, Tensor]:
        """Activations of held-out documents (of training ones if the text was given as training text alone)."""
        return _held_out_activations(self)

    def metadata(self, site: Site) -> dict[str, Any]:
        """Where an SAE comes from."""
        return _metadata(self, site)


def _held_out_activations(session: Session) -> dict[str, Tensor]:
    """Activations of held-out documents (of training ones if the text was given as training text alone)."""
    config = session.config
    rows = open_rows(session.data, session.model, config, held_out=held_out_share(session.model, config) > 0)
    hooks = session.stream.hooks
    at, n = session.stream.device, config.prompts_per_pass
    stream = ActivationStream(session.model, hooks, rows, config.masks, n, device=at)
    parts: list[dict[str, Tensor]] = []
    for part in stream:
        parts.append(part)
        if sum(len(p[str(hooks[0])]) for p in parts) >= CALIBRATION_TOKENS:
            break
    if not parts:
        raise UnweaveError("the masks leave no held-out token to calibrate thresholds on.")
    return {name: torch.cat([p[name] for p in parts])[:CALIBRATION_TOKENS] for name in map(str, hooks)}


def _metadata(session: Session, site: Site) -> dict[str, Any]:
    config, module = session.config, session.model.module
    names = {str(hook): tl_name(module, hook) or str(hook) for hook in session.stream.hooks}
    return {
        "model_name": session.model.name,
        "model_class_name": type(session.model.module).__name__,
        **where(site, names),
        "hook_head_index": head_index(module, next(h for h in session.stream.hooks if str(h) == site.inputs[0])),
        "context_size": session.rows.context,
        "dataset_path": config.data if session.data is config.data else None,
        "seqpos_slice": [None],
        "exclude_special_tokens": config.masks.special_tokens,
        **rows_metadata(session.model, config),
        "masks": to_dict(config.masks),
        "model_precision": str(dtype_of(session.stream.model.module)).removeprefix("torch."),
        "training_tokens": config.tokens,
        "training_epochs": math.ceil(config.tokens / session.once) if session.once else session.rows.epoch + 1,
        "seed": config.seed,
    }
