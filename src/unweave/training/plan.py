"""What a run will cost, measured on a few passes and steps before anything is spent."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unweave._errors import UnweaveError
from unweave.activations import ActivationStream, StreamCost
from unweave.activations.limits import free_disk, free_memory
from unweave.models import Meter
from unweave.training.config import TrainConfig
from unweave.training.harvest import runs_ahead
from unweave.training.sites import Site
from unweave.training.trainees import MakeTrainee, new_trainee

CALIBRATION_TOKENS = 32_768
"""Activations that give scales, initial biases and points before training, and thresholds after it; at most."""

_AHEAD = 3
"""Passes that a background stream holds: two that are ready, and the one that is being made."""
_SLACK = 0.95
"""Share of what is free that a run may ask for."""


@dataclass(frozen=True)
class Buffer:
    """Something that takes memory.

    Attributes:
        name: What it is.
        bytes: How much.
        device: Where.
        lasting: Whether it is held during all of the run. Of the others only the largest counts on a device, since one
            comes after the other.
        present: Whether it has been allocated already.
        lower: Which setting makes it smaller.
    """

    name: str
    bytes: int
    device: str
    lasting: bool = True
    present: bool = False
    lower: str = ""


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
        return {device: _peak(self.buffers, device) for device in dict.fromkeys(b.device for b in self.buffers)}

    def buffer(self, name: str) -> int:
        """Bytes of one of the buffers."""
        return sum(b.bytes for b in self.buffers if b.name == name)

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            UnweaveError: Memory or disk will not suffice; the sentence says which setting to lower.
        """
        for device in self.memory:
            _check_memory(self.buffers, device)
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
        for device, total in self.memory.items():
            parts = [b for b in self.buffers if b.device == device and b.bytes]
            lasting = ", ".join(f"{b.name} {size(b.bytes)}" for b in parts if b.lasting)
            passing = ", ".join(f"{b.name} {size(b.bytes)}" for b in parts if not b.lasting)
            lines.append(f"memory on {device} {size(total)}: {lasting}; the largest of {passing or 'nothing else'}")
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
    _check_memory([*buffers, Buffer("weights, gradients and moments", sum(least), at, lower="d_sae")], at)
    steps, step_seconds, lasting, step, start = -(-config.tokens // config.batch_size), 0.0, 0, 0, 0
    weights = 0
    for sae, site in wanted:
        n = min(CALIBRATION_TOKENS, config.ring_size)
        dtypes = {name: cost.dtypes[name] for name in cost.widths}
        sample = {h: torch.randn(n, w, device=device).to(dtypes[h]) for h, w in cost.widths.items()}
        with Meter() as building:
            trainee = make(sae, site, sample, steps=steps, tokens=config.tokens, seed=0)
        batch = {name: x[: config.batch_size] for name, x in sample.items()}
        with Meter() as first:
            trainee.step(*site.rows(batch))
        held = building.live + first.live
        with Meter() as second:
            trainee.step(*site.rows(batch))
        started = time.perf_counter()
        trainee.step(*site.rows(batch)).loss.item()
        step_seconds += time.perf_counter() - started
        start = max(start, n * per_token + building.peak - building.live)
        step = max(step, first.peak - first.live, second.peak)
        lasting += held
        weights += sum(p.nbytes for p in trainee.sae.parameters())
        del trainee, sample, batch
    buffers += [
        Buffer("weights, gradients and moments", lasting, at, lower="d_sae"),
        Buffer("step", step, at, lasting=False, lower="batch_size"),
        Buffer("start", start, at, lasting=False),
        # The finished SAEs are copies, and what lies transposed in memory is written from one.
        Buffer("saving", (1 if config.out is None else 2) * weights, at, lasting=False),
    ]
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


def _size_of(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters()) + sum(b.nbytes for b in module.buffers())


def _peak(buffers: Sequence[Buffer], device: str) -> int:
    here = [b for b in buffers if b.device == device]
    return sum(b.bytes for b in here if b.lasting) + max((b.bytes for b in here if not b.lasting), default=0)


def _check_memory(buffers: Sequence[Buffer], device: str) -> None:
    """Refuse buffers that do not fit into what is free beside what has been allocated already."""
    new = [b for b in buffers if not b.present]
    needed, free = _peak(new, device), free_memory(device)
    if needed <= _SLACK * free:
        return
    largest = max((b for b in new if b.device == device and b.lower), key=lambda b: b.bytes)
    raise UnweaveError(
        f"the run needs {size(needed)} of memory on {device}, where {size(free)} are free, {size(largest.bytes)} of it "
        f"for the {largest.name}: lower {largest.lower}."
    )


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(n: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "kB", "MB"):
        if n < 999.5:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB" if n < 999.5 else f"{n / 1000:.1f} TB"
