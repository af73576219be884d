"""The coders of a run: every config at every site of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from unweave.training.config import SAEConfig
from unweave.training.sites import Site
from unweave.training.trainee import Trainee


def trainees_at(
    configs: Sequence[SAEConfig],
    sites: Sequence[Sequence[Site]],
    sample: Mapping[str, Float[Tensor, "n d"]],
    *,
    steps: int,
    tokens: int,
    seed: int,
) -> dict[str, list[Trainee]]:
    """Fresh coders by the name of their site.

    Args:
        configs: What to train.
        sites: Where, for each config.
        sample: Activations at every hook, aligned, that give the scales and initial biases.
        steps: Steps of the whole run.
        tokens: Tokens of the whole run.
        seed: The n-th config draws its weights with `seed + n`.
    """
    trainees: dict[str, list[Trainee]] = {}
    for i, (config, places) in enumerate(zip(configs, sites, strict=True)):
        for site in places:
            trainees.setdefault(str(site), []).append(
                new_trainee(config, site, sample, steps=steps, tokens=tokens, seed=seed + i)
            )
    return trainees


def new_trainee(
    config: SAEConfig, site: Site, sample: Mapping[str, Tensor], *, steps: int, tokens: int, seed: int
) -> Trainee:
    """One coder at one site."""
    x, target = site.rows(sample)
    widths, targets = (parts if len(parts) > 1 else None for parts in site.widths(sample))
    return Trainee(
        config, x, steps=steps, tokens=tokens, seed=seed, target=target, widths=widths, target_widths=targets
    )
