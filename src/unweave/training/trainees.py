"""The coders of a run: every config at every site of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from unweave.training.config import SAEConfig
from unweave.training.sites import Site
from unweave.training.trainee import Trainee


class MakeTrainee(Protocol):
    """Makes a coder at one site; see `new_trainee`."""

    def __call__(
        self,
        config: SAEConfig,
        site: Site,
        sample: Mapping[str, Float[Tensor, "n d"]],
        *,
        steps: int,
        tokens: int,
        seed: int,
    ) -> Trainee: ...


def new_trainee(
    config: SAEConfig,
    site: Site,
    sample: Mapping[str, Float[Tensor, "n d"]],
    *,
    steps: int,
    tokens: int,
    seed: int,
) -> Trainee:
    """One fresh coder at one site."""
    x, target = site.rows(sample)
    widths, targets = site.side_by_side(sample)
    return Trainee(
        config, x, steps=steps, tokens=tokens, seed=seed, target=target, widths=widths, target_widths=targets
    )


def trainees_at(
    configs: Sequence[SAEConfig],
    sites: Sequence[Sequence[Site]],
    sample: Mapping[str, Float[Tensor, "n d"]],
    *,
    steps: int,
    tokens: int,
    seed: int,
    make: MakeTrainee = new_trainee,
) -> dict[str, list[Trainee]]:
    """Coders by the name of their site.

    Args:
        configs: What to train.
        sites: Where, for each config.
        sample: Activations at every hook, aligned, that give the scales and initial biases.
        steps: Steps of the whole run.
        tokens: Tokens of the whole run.
        seed: The n-th config draws its weights with `seed + n`.
        make: Makes each; by default, fresh ones.
    """
    trainees: dict[str, list[Trainee]] = {}
    for i, (config, places) in enumerate(zip(configs, sites, strict=True)):
        for site in places:
            trainees.setdefault(str(site), []).append(
                make(config, site, sample, steps=steps, tokens=tokens, seed=seed + i)
            )
    return trainees
