"""The coders of a run: every config at every site of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
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
    """One fresh coder at one site.

    Raises:
        UnweaveError: If the run ends within a temporal SAE's sequence, or the sample cannot be trained on.
    """
    if config.temporal is not None and tokens % config.temporal.context:
        context = config.temporal.context
        raise UnweaveError(f"{tokens:,} tokens are no whole number of a temporal SAE's sequences of {context}.")
    return Trainee(config, **site.sample(sample), steps=steps, tokens=tokens, seed=seed)


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
