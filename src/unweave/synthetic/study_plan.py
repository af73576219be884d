"""What a study of a world will cost, measured on a few batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unweave.synthetic.model import SyntheticModel
from unweave.synthetic.survey import expected_of
from unweave.synthetic.training import SyntheticActivationIterator, Toys
from unweave.synthetic.worlds import World


@dataclass(frozen=True)
class StudyPlan:
    """What a study will cost, measured on a few batches before anything is spent.

    Attributes:
        world: The world.
        l0: Mean number of features that fire on a sample.
        build_seconds: Time that it took to build the model.
        seconds: Expected time of all the rest.
        dictionary_bytes: Memory of the features' vectors.
        sae_bytes: Memory of all weights, gradients and moments.
    """

    world: World
    l0: float
    build_seconds: float
    seconds: float
    dictionary_bytes: int
    sae_bytes: float

    def __str__(self) -> str:
        from unweave.training.buffers import size
        from unweave.training.plan import duration

        world = self.world
        lines = [
            f"plan: {world.name}, {world.model.num_features:,} features in {world.model.hidden_dim:,} dimensions, "
            f"{self.l0:.1f} of them on a sample; statistics on {world.samples:,} samples"
        ]
        if world.saes:
            steps = -(-world.training_samples // world.batch_size)
            lines.append(f"{len(world.saes)} SAEs on {world.training_samples:,} samples in {steps:,} steps")
            lines.append("; ".join(map(str, world.saes)))
        lines.append(
            f"{size(self.dictionary_bytes)} dictionary, {size(self.sae_bytes)} weights, gradients and moments; "
            f"about {duration(self.seconds)}"
        )
        return "\n      ".join(lines)


def plan_study(world: World, model: SyntheticModel, build_seconds: float) -> StudyPlan:
    """Measure sampling and a training step of each SAE; the world's stream is not moved on."""
    stream = model.activation_generator.fork(0)
    batches = SyntheticActivationIterator(model.feature_dict, stream, world.batch_size)
    drawing = _seconds(lambda: stream.sample_codes(world.batch_size)) / world.batch_size
    making = _seconds(batches.next_batch) / world.batch_size
    seconds, sae_bytes = world.samples * drawing, 0.0
    if world.saes:
        sample = batches.next_batch()
        toys = Toys(world.saes, batches, world.training_samples, seed=0, starts=[None] * len(world.saes))
        steps = sum(_seconds(lambda t=t: t.step(sample)) for t in toys.trainees)  # type: ignore[misc]
        seconds += world.training_samples * (making + steps / world.batch_size)
        # Scoring encodes and decodes, which is about half of a step, and samples anew for each SAE.
        seconds += world.eval_samples * (len(world.saes) * making + steps / world.batch_size / 2)
        for trainee in toys.trainees:
            per_parameter = 9.5 + (4 if trainee.config.moments == "bf16" else 8)
            sae_bytes += per_parameter * sum(p.numel() for p in trainee.sae.parameters())
    vectors = model.feature_dict.feature_vectors
    return StudyPlan(
        world=world, l0=float(expected_of(model).rates.sum()),
        build_seconds=build_seconds, seconds=seconds,
        dictionary_bytes=vectors.numel() * vectors.element_size(), sae_bytes=sae_bytes,
    )  # fmt: skip


def _seconds(action: Callable[[], Any]) -> float:
    """Time of an action that was done once before."""
    action()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
