"""What a run will cost, measured on a few passes and steps before anything is spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from unweave._errors import UnweaveError
from unweave.activations import ActivationStream, StreamCost
from unweave.activations.limits import free_disk
from unweave.kernels.scratch import scratch_bytes, scratch_sizes
from unweave.models import Meter
from unweave.models.meter import typical_seconds
from unweave.training.buffers import Buffer, check_memory, peak, size
from unweave.training.config import TrainConfig
from unweave.training.dead import revives
from unweave.training.harvest import runs_ahead
from unweave.training.sites import Site
from unweave.training.trainee import Trainee
from unweave.training.trainees import MakeTrainee, new_trainee

CALIBRATION_TOKENS = 32_768
"""Activations that give scales, initial biases and points before training, and thresholds after it; at most."""

_AHEAD = 3
"""Passes that a background stream holds: two that are ready, and the one that is being made."""


@dataclass(frozen=True)
class Plan:
    """A run's shapes, bytes and expected time; `str(plan)` is what the command line prints.

    Attributes:
        tokens: Tokens to train on.
        rows: Rows that the model will be run on; from a cache, the tokens in it that the masks leave.
        passes: Forward passes of the model; 0 from a cache.
        prompts_per_pass: Rows in a pass.
        precision: Type that the model runs in.
        background: Whether the model runs ahead in a thread of its own.
        steps: Optimiser steps.
        widths: Width of the activations at each hook.
        saes: Each SAE in words.
        harvest_rate: Unmasked tokens per second that the model alone would give.
        step_seconds: Time of one optimiser step of all SAEs.
        kept: Share of the tokens that the masks leave.
        once: Tokens to train on that the data give when they are read once; None if that is not known beforehand.
        buffers: What takes memory, and how much.
        disk_bytes: The most that the run's folder will hold: checkpoints and finished SAEs.
        out: The run's folder.
    """

    tokens: int
    rows: int
    passes: int
    prompts_per_pass: int
    precision: str
    background: bool
    steps: int
    widths: dict[str, int]
    saes: list[str]
    harvest_rate: float
    step_seconds: float
    kept: float
    once: float | None = None
    buffers: list[Buffer] = field(default_factory=list)
    disk_bytes: int = 0
    out: str | None = None

    @property
    def seconds(self) -> float:
        """Expected time of the training loop."""
        model, saes = self.tokens / self.harvest_rate, self.steps * self.step_seconds
        return max(model, saes) if self.background else model + saes

    @property
    def memory(self) -> dict[str, int]:
        """Bytes at the run's peak, by device."""
        return {device: peak(self.buffers, device) for device in dict.fromkeys(b.device for b in self.buffers)}

    def buffer(self, name: str) -> int:
        """Bytes of one of the buffers."""
        return sum(b.bytes for b in self.buffers if b.name == name)

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            UnweaveError: Memory or disk will not suffice; the sentence says which setting to lower.
        """
        for device in self.memory:
            check_memory(self.buffers, device)
        if self.out is not None and self.disk_bytes > (free := free_disk(self.out)):
            raise UnweaveError(
                f"the run needs {size(self.disk_bytes)} on disk for checkpoints and SAEs, and {str(self.out)!r} has "
                f"{size(free)} free: lower buffer, or choose another folder."
            )

    def __str__(self) -> str:
        hooks = ", ".join(f"{name} (width {width})" for name, width in self.widths.items())
        source, what = (
            "the model",
            (
                f"{self.rows:,} rows in {self.passes:,} passes of {self.prompts_per_pass}, in {self.precision}"
                f"{', ahead in the background' * self.background}"
            ),
        )
        if not self.passes:
            source, what = "the cache", f"{self.tokens / self.rows:.2f} times the {self.rows:,} tokens of a cache"
        lines = [
            f"plan: {self.tokens:,} tokens in {self.steps:,} steps, at {hooks}",
            *self.saes,
            f"{what}; masks leave {self.kept:.1%} of the tokens",
            f"{source} gives {self.harvest_rate:,.0f} tokens/s, a step takes {self.step_seconds * 1000:.0f} ms: "
            f"{self.tokens / self.seconds:,.0f} tokens/s, about {duration(self.seconds)}",
        ]
        if self.passes and (said := repeats(self.tokens, self.once)):
            lines.insert(-1, said)
        for device, total in self.memory.items():
            parts = [b for b in self.buffers if b.device == device and b.bytes]
            lasting = ", ".join(f"{b.name} {size(b.bytes)}" for b in parts if b.lasting)
            passing = ", ".join(f"{b.name} {size(b.bytes)}" for b in parts if not b.lasting)
            lines.append(f"memory on {device} {size(total)}: {lasting}")
            if passing:
                lines.append(f"  and the largest of {passing}")
        if self.out is not None:
            lines.append(f"disk {size(self.disk_bytes)} at most, in {self.out}")
        return "\n      ".join(lines)


def plan(config: TrainConfig, *, model: Any = None, data: Any = None, seconds: float = 5.0) -> Plan:
    """What a run will cost. Nothing is trained or written.

    Args:
        config: The run.
        model: A model that is loaded already, in place of `config.model`.
        data: Texts, tokens or images that are in memory, in place of `config.data`.
        seconds: How long to measure forward passes, at least.

    Raises:
        UnweaveError: Something about the input is wrong, or even the buffers whose size is known beforehand do not
            fit; `Plan.check` raises where anything does not.
    """
    from unweave.training.train import prepare

    return prepare(config, model, data).plan(seconds)


def plan_run(
    config: TrainConfig,
    stream: ActivationStream,
    sites: Sequence[Sequence[Site]],
    seconds: float = 0.0,
    make: MakeTrainee = new_trainee,
) -> Plan:
    """Measure forward passes and a training step of each SAE; the stream is not moved on.

    Args:
        config: The run.
        stream: Its activations.
        sites: Where each SAE of the config is trained.
        seconds: How long to measure forward passes, at least; two are measured in any case.
        make: Makes an SAE.

    Raises:
        UnweaveError: What is known without trying already does not fit.
    """
    cost = stream.measure(seconds=seconds)
    at, model_at = str(stream.device), str(stream.model.device)
    background, per_token = runs_ahead(config, stream), sum(cost.bytes_per_token.values())
    given = stream.given.module
    buffers = [
        Buffer("model", _size_of(given), model_at, present=True),
        Buffer("its copy", cost.copy_bytes, model_at, present=True),
        Buffer("ring", config.ring_size * per_token, at, lower="buffer"),
        Buffer("batch", config.batch_size * per_token, at, lower="batch_size"),
        Buffer("pass", cost.pass_bytes, model_at, lasting=background, lower="prompts_per_pass"),
    ]
    if background:
        ready = _AHEAD * cost.prompts_per_pass * stream.rows.context * per_token
        buffers.append(Buffer("passes ahead", ready, at, lower="prompts_per_pass"))
    rows = math.ceil(config.tokens / (stream.rows.context * cost.kept))
    return with_steps(config, sites, cost, stream.device, buffers, background=background, rows=rows, make=make)


def with_steps(
    config: TrainConfig,
    sites: Sequence[Sequence[Site]],
    cost: StreamCost,
    device: torch.device,
    buffers: list[Buffer],
    *,
    background: bool,
    rows: int,
    ring_bytes: int | None = None,
    make: MakeTrainee = new_trainee,
) -> Plan:
    """The plan, once a step of each SAE is measured.

    Args:
        config: The run.
        sites: Where each SAE of the config is trained.
        cost: What activations cost.
        device: Where the SAEs are trained.
        buffers: What takes memory besides.
        background: Whether activations come while the SAEs are trained.
        rows: See `Plan`.
        ring_bytes: Of the ring in a checkpoint; None: those of its activations.
        make: Makes an SAE.
    """
    at, per_token = str(device), sum(cost.bytes_per_token.values())
    wanted = [(sae, site) for sae, places in zip(config.saes, sites, strict=True) for site in places]
    least = [16 * sae.d_sae * sum(sum(w.values()) for w in site.widths_of(cost.widths)) for sae, site in wanted]
    check_memory([*buffers, Buffer("weights, gradients and moments", sum(least), at, lower="d_sae")], at)
    steps, step_seconds, lasting, step, start = -(-config.tokens // config.batch_size), 0.0, 0, 0, 0
    weights, reviving = 0, 0
    for sae, site in wanted:
        n = min(CALIBRATION_TOKENS, config.ring_size)
        dtypes = {name: cost.dtypes[name] for name in cost.widths}
        sample = {h: torch.randn(n, w, device=device).to(dtypes[h]) for h, w in cost.widths.items()}
        there = scratch_sizes()
        with Meter() as building:
            trainee = make(sae, site, sample, steps=steps, tokens=config.tokens, seed=0)
        batch = {name: x[: config.batch_size] for name, x in sample.items()}
        with Meter() as first:
            trainee.step(*site.rows(batch))
        # What steps reuse is not theirs; of what grew, all is new, and where it was smaller before is not in the count.
        made = sum(n for name, n in scratch_sizes().items() if there.get(name) != n)
        held = building.live + first.live - made
        with Meter() as second:
            trainee.step(*site.rows(batch))
        step_seconds += typical_seconds(partial(step_once, trainee, site, batch))
        start = max(start, n * per_token + building.peak - building.live)
        later = second.peak
        if trainee.fused is not None and trainee.fused.dense:
            screen, more = trainee.fused.sparse_bytes(config.batch_size)
            held, later = held + screen, later + more
        step = max(step, first.peak - first.live, later)
        if trainee.fused is not None and (more := trainee.fused.revival_bytes(config.batch_size, sae.d_sae // 2)):
            reviving = max(reviving, later + more)
        elif trainee.fused is None and revives(trainee):
            some = config.batch_size * (sae.d_sae // 2) * 2 * 4  # pre-activations and their gradients
            check_memory([*buffers, Buffer("step if half the latents die", some, at, lasting=False, lower="d_sae")], at)
            trainee.tokens_since_fired[: sae.d_sae // 2] = trainee.dead_after
            with Meter() as third:
                trainee.step(*site.rows(batch))
            reviving = max(reviving, third.peak)
        lasting += held
        weights = max(weights, sum(p.nbytes for p in trainee.sae.parameters()))
        del trainee, sample, batch
    buffers += [
        Buffer("weights, gradients and moments", lasting, at, lower="d_sae"),
        Buffer("step", step, at, lasting=False, lower="batch_size"),
        Buffer("step if half the latents die", reviving, at, lasting=False, lower="d_sae"),
        Buffer("start", start, at, lasting=False),
        # A finished SAE is a copy, and what it was copied from goes, with its moments, before the next one is made.
        Buffer("saving", weights, at, lasting=False),
    ]
    if device.type == "cpu":  # all SAEs use the same memory in their steps, and it stays when a run has ended
        buffers.append(Buffer("reused", scratch_bytes(), at, present=True, lower="d_sae"))
    checkpoint = (config.ring_size * per_token if ring_bytes is None else ring_bytes) + lasting
    return Plan(
        tokens=config.tokens,
        rows=rows,
        passes=-(-rows // cost.prompts_per_pass) if cost.prompts_per_pass else 0,
        prompts_per_pass=cost.prompts_per_pass,
        precision=cost.precision,
        background=background,
        steps=steps,
        widths=cost.widths,
        saes=[str(sae) for sae in config.saes],
        harvest_rate=cost.tokens_per_second,
        step_seconds=step_seconds,
        kept=cost.kept,
        buffers=buffers,
        disk_bytes=(2 if config.checkpoint_every else 1) * checkpoint,  # the old one goes once the new one is there
        out=config.out,
    )


def step_once(trainee: Trainee, site: Site, batch: dict[str, torch.Tensor]) -> None:
    trainee.step(*site.rows(batch)).loss.item()  # which waits for the device


def _size_of(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters()) + sum(b.nbytes for b in module.buffers())


def repeats(tokens: int, once: float | None) -> str | None:
    """That the data begin again in a run, and how often they are read; None if once is enough, or it is not known."""
    if not once or tokens <= once:
        return None
    return f"the training data end after {once:,.0f} tokens and begin again: they are read {tokens / once:,.1f} times"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
