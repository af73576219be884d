"""Training on a world with known features, by the ordinary trainer: the samples are made as they are needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae import SAE
from unweave.synthetic.arguments import require_count
from unweave.synthetic.scores import check_world
from unweave.training.config import SAEConfig
from unweave.training.finish import finished_sae
from unweave.training.trainee import Trainee
from unweave.training.trainer import Run, fit

if TYPE_CHECKING:
    from unweave.synthetic.dictionary import FeatureDictionary
    from unweave.synthetic.generator import ActivationGenerator

HELD_OUT_SAMPLES, HELD_OUT_BATCH = 32_768, 4096
HELD_OUT_SEED = 1_592_641_051
"""Of the stream that the input scale and BatchTopK thresholds are measured on; one that nobody trains on by chance."""
TOY_LR = 3e-4


class SyntheticActivationIterator:
    """Endless batches of a world's activations.

    Args:
        feature_dict: The features.
        activations_generator: What fires; every batch moves it on.
        batch_size: Samples in a batch.
        device: Where the batches are put; None: where the dictionary is.
    """

    def __init__(
        self,
        feature_dict: FeatureDictionary,
        activations_generator: ActivationGenerator,
        batch_size: int,
        *,
        device: str | torch.device | None = None,
    ) -> None:
        require_count("batch_size", batch_size)
        check_world(feature_dict, activations_generator)
        self.feature_dict, self.activations_generator = feature_dict, activations_generator
        self.batch_size, self.device = batch_size, device

    @torch.no_grad()
    def next_batch(self) -> Float[Tensor, "batch_size hidden_dim"]:
        """The next batch."""
        batch = self.feature_dict(self.activations_generator.sample_codes(self.batch_size))
        return batch if self.device is None else batch.to(self.device)

    def __iter__(self) -> Iterator[Float[Tensor, "batch_size hidden_dim"]]:
        return self

    def __next__(self) -> Float[Tensor, "batch_size hidden_dim"]:
        return self.next_batch()

    def skip(self, n_batches: int) -> None:
        """Draw so many batches without making activations of them, as a resumed run does to go on where it was."""
        for _ in range(n_batches):
            self.activations_generator.sample_codes(self.batch_size)

    def held_out(self) -> Float[Tensor, "n hidden_dim"]:
        """Samples of a stream of their own; the batches do not move on."""
        fork = self.activations_generator.fork(HELD_OUT_SEED)
        own = SyntheticActivationIterator(self.feature_dict, fork, HELD_OUT_BATCH, device=self.device)
        return torch.cat([own.next_batch() for _ in range(HELD_OUT_SAMPLES // HELD_OUT_BATCH)])


@dataclass(frozen=True)
class Snapshot:
    """An SAE in the middle of its training.

    Attributes:
        sae: As if training ended here: it takes raw activations, and a BatchTopK threshold is calibrated.
        n_training_samples: Samples trained on so far.
        n_training_steps: Steps taken so far.
    """

    sae: SAE
    n_training_samples: int
    n_training_steps: int


class Toys:
    """SAEs in training on one stream of a world.

    Args:
        configs: What to train; every SAE sees every batch.
        iterator: The batches. The input scale and the initial bias come from samples apart from them.
        training_samples: Samples to train on.
        seed: Gives the initial weights: the first SAE's is `seed`, the second's `seed + 1`, ...
        starts: SAEs that take raw activations, to start from copies of; None where a fresh one is meant.
    """

    def __init__(
        self,
        configs: Sequence[SAEConfig],
        iterator: SyntheticActivationIterator,
        training_samples: int,
        *,
        seed: int,
        starts: Sequence[SAE | None],
    ) -> None:
        steps = -(-training_samples // iterator.batch_size)
        self._held_out = iterator.held_out()
        self.trainees = [
            Trainee(c, self._held_out, steps=steps, tokens=training_samples, seed=seed + i, start=start)
            for i, (c, start) in enumerate(zip(configs, starts, strict=True))
        ]

    def finished(self, i: int = 0) -> SAE:
        """A copy of SAE i for raw activations."""
        return finished_sae(self.trainees[i], [self._held_out], {})


def named(iterator: SyntheticActivationIterator) -> Iterator[dict[str, Tensor]]:
    """Batches as the trainer takes them, by hook; a world has one."""
    return ({"": batch} for batch in iterator)


def train_toy_sae(
    sae: SAE | SAEConfig,
    feature_dict: FeatureDictionary,
    activations_generator: ActivationGenerator,
    training_samples: int = 10_000_000,
    batch_size: int = 1024,
    lr: float | None = None,
    lr_warm_up_steps: int | None = None,
    lr_decay_steps: int | None = None,
    device: str | torch.device = "cpu",
    n_snapshots: int = 0,
    snapshot_fn: Callable[[Snapshot], None] | None = None,
    *,
    config: SAEConfig | None = None,
    seed: int = 0,
    progress: bool = False,
) -> SAE:
    """Train one SAE on a world, by the ordinary trainer, and return it for the world's raw activations.

    Args:
        sae: A config, of which an SAE is made and trained; or an SAE, which is trained in place. Its decoder rows have
            unit norm afterwards. Until the end (or if training fails) it stays as it was.
        feature_dict: The features.
        activations_generator: What fires. Training moves its stream on.
        training_samples: Samples to train on; the last batch is cut to end there.
        batch_size: Samples in a step.
        lr: Learning rate. None: the config's; for an SAE without one, 3e-4.
        lr_warm_up_steps: Steps over which the rate rises linearly. None: the config's share; for an SAE without, 0.
        lr_decay_steps: Steps, at the end, over which it falls linearly to 0. None: as with the warm-up.
        device: Where to train.
        n_snapshots: How often `snapshot_fn` is called, evenly spaced, the last time at the end.
        snapshot_fn: Takes a `Snapshot`.
        config: How an SAE that is passed as `sae` is trained; `d_sae` and `activation` must be its own.
        seed: Gives the initial weights of an SAE that is made.
        progress: Whether to show progress on standard error.

    Raises:
        UnweaveError: If an argument is out of range, or SAE, config and world do not fit together.
    """
    require_count("training_samples", training_samples)
    require_count("n_snapshots", n_snapshots, least=0)
    if (snapshot_fn is None) != (n_snapshots == 0):
        raise UnweaveError(
            f"n_snapshots={n_snapshots} and snapshot_fn={snapshot_fn!r} go together: give both or neither."
        )
    start = sae if isinstance(sae, SAE) else None
    if isinstance(sae, SAE):
        check_world(feature_dict, activations_generator, sae.d_in)
        plain = SAEConfig(sae.d_sae, sae.activation, lr=TOY_LR, warmup=0.0, decay=0.0)
        settings = config or plain
    elif config is not None:
        raise UnweaveError("config says how an SAE is trained that is passed as sae, and sae is a config already.")
    else:
        settings = sae
    iterator = SyntheticActivationIterator(feature_dict, activations_generator, batch_size, device=device)
    steps = -(-training_samples // batch_size)
    settings = with_schedule(settings, steps, lr, lr_warm_up_steps, lr_decay_steps)
    toys = Toys([settings], iterator, training_samples, seed=seed, starts=[start])
    run = Run({"": toys.trainees}, training_samples)

    due = [-(-steps * (i + 1) // n_snapshots) for i in range(n_snapshots)]

    def after_step() -> None:
        while due and run.step >= due[0]:  # more snapshots than steps: several at one
            due.pop(0)
            assert snapshot_fn is not None
            snapshot_fn(Snapshot(toys.finished(), run.seen, run.step))

    fit(run, named(iterator), progress=progress, after_step=after_step)
    trained = toys.finished()
    if start is None:
        return trained
    start.load_state_dict(trained.state_dict())
    start.metadata |= trained.metadata
    return start


def with_schedule(
    config: SAEConfig, steps: int, lr: float | None, warm_up_steps: int | None, decay_steps: int | None
) -> SAEConfig:
    """A config with another learning rate and schedule, where they are given in steps of a run of `steps`.

    Raises:
        UnweaveError: If a number of steps is negative or more than the run has.
    """
    changes: dict[str, Any] = {} if lr is None else {"lr": lr}
    for name, key, value in (
        ("lr_warm_up_steps", "warmup", warm_up_steps), ("lr_decay_steps", "decay", decay_steps),
    ):  # fmt: skip
        if value is None:
            continue
        if require_count(name, value, least=0) > steps:
            raise UnweaveError(f"{name} is {value}, and the run has {steps} steps.")
        changes[key] = value / steps
    return dataclasses.replace(config, **changes)
