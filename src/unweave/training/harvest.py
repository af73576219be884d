"""How the model of a run is run: in which type, on which device, and whether ahead in the background."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from unweave._errors import UnweaveError
from unweave.activations import ActivationStream, Background, Rows
from unweave.activations.precision import model_dtype
from unweave.models import Hook, LoadedModel
from unweave.training.config import TrainConfig


def live_stream(config: TrainConfig, model: LoadedModel, hooks: Sequence[Hook], rows: Rows) -> ActivationStream:
    """The activations of a run, where its SAEs are trained."""
    return ActivationStream(
        model,
        hooks,
        rows,
        config.masks,
        config.prompts_per_pass,
        dtype=model_dtype(config.model_precision, model),
        device=sae_device(config, model),
    )


def sae_device(config: TrainConfig, model: LoadedModel) -> torch.device:
    """Where the SAEs are trained: on `config.device`, if the model has a device of its own, else where the model is.

    Raises:
        UnweaveError: The device cannot be used.
    """
    if config.model_device is None or config.device is None:
        return model.device
    try:
        return torch.empty(0, device=config.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UnweaveError(f"the device {config.device!r} cannot be used: {reason}.") from error


def runs_ahead(config: TrainConfig, stream: ActivationStream) -> bool:
    """Whether the model runs in the background."""
    return stream.model.device.type != "cpu" if config.background == "auto" else bool(config.background)


@contextmanager
def ahead_of(config: TrainConfig, stream: ActivationStream) -> Iterator[ActivationStream | Background]:
    """The stream; within the block in the background, if that is wanted."""
    if not runs_ahead(config, stream):
        yield stream
        return
    with Background(stream) as ahead:
        yield ahead
