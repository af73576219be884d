"""What a run will cost, measured on a few passes and one step before anything is spent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unweave.activations import ActivationStream
from unweave.training.config import TrainConfig
from unweave.training.sites import Site
from unweave.training.trainees import new_trainee

CALIBRATION_TOKENS = 32_768
"""Activations that give scales, initial biases and points before training, and thresholds after it; at most."""


@dataclass(frozen=True)
class Plan:
    """A run's shapes, bytes and expected time; `str(plan)` is what the command line prints.

    Attributes:
        tokens: Tokens to train on.
        steps: Optimiser steps.
        widths: Width of the activations at each hook.
        saes: Each SAE in words.
        harvest_rate: Unmasked tokens per second that the model alone would give.
        step_seconds: Time of one optimiser step of all SAEs.
        kept: Share of the tokens that the masks leave.
        ring_bytes: Memory of the shuffling ring.
        sae_bytes: Memory of all weights, gradients, moments and low-precision copies.
    """

    tokens: int
    steps: int
    widths: dict[str, int]
    saes: list[str]
    harvest_rate: float
    step_seconds: float
    kept: float
    ring_bytes: int
    sae_bytes: float

    @property
    def seconds(self) -> float:
        """Expected time of the training loop."""
        return self.tokens / self.harvest_rate + self.steps * self.step_seconds

    def __str__(self) -> str:
        hooks = ", ".join(f"{name} (width {width})" for name, width in self.widths.items())
        return (
            f"plan: {self.tokens:,} tokens in {self.steps:,} steps, at {hooks}\n"
            f"      {'; '.join(self.saes)}\n"
            f"      the model gives {self.harvest_rate:,.0f} tokens/s, a step takes {self.step_seconds * 1000:.0f} ms: "
            f"about {duration(self.seconds)}\n"
            f"      {size(self.ring_bytes)} shuffling ring, {size(self.sae_bytes)} weights, gradients and moments; "
            f"masks leave {self.kept:.1%} of the tokens"
        )


def plan_run(config: TrainConfig, stream: ActivationStream, sites: Sequence[Sequence[Site]]) -> Plan:
    """Measure a forward pass and a training step of each SAE; the stream is not moved on.

    Args:
        config: The run.
        stream: Its activations.
        sites: Where each SAE of the config is trained.
    """
    cost = stream.measure()
    widths = stream.widths()
    steps, seconds, n_bytes = -(-config.tokens // config.batch_size), 0.0, 0.0
    n = config.batch_size
    if _needs_points(config):
        n = max(n, min(CALIBRATION_TOKENS, config.ring_size))
    sample = {name: torch.randn(n, width, device=stream.device) for name, width in widths.items()}
    for sae, places in zip(config.saes, sites, strict=True):
        for site in places:
            trainee = new_trainee(sae, site, sample, steps=steps, tokens=config.tokens, seed=0)
            rows = site.rows({name: x[: config.batch_size] for name, x in sample.items()})
            trainee.step(*rows)
            started = time.perf_counter()
            trainee.step(*rows).loss.item()
            seconds += time.perf_counter() - started
            # Weights, gradients and moments; the encoder's rows in bf16 and int8 are 3 bytes for half of the weights.
            per_parameter = 9.5 + (4 if sae.moments == "bf16" else 8)
            n_bytes += per_parameter * sum(p.numel() for p in trainee.sae.parameters())
    return Plan(
        tokens=config.tokens,
        steps=steps,
        widths=widths,
        saes=[str(sae) for sae in config.saes],
        harvest_rate=cost.tokens_per_second,
        step_seconds=seconds,
        kept=cost.kept,
        ring_bytes=config.ring_size * sum(cost.bytes_per_token.values()),
        sae_bytes=n_bytes,
    )


def _needs_points(config: TrainConfig) -> bool:
    """Whether an SAE begins with statistics or points of many activations."""
    return any(c.normalize == "whiten" or c.W_dec_init == "data" or c.dictionary is not None for c in config.saes)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(n: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
