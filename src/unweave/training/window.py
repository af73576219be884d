"""Which window JumpReLU's thresholds learn through: as wide as configured, and wider where that would be empty."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.sae import JumpReLU

if TYPE_CHECKING:
    from unweave.training.trainee import Trainee

EVERY, ROWS, ENTRIES = 25, 256, 1 << 22
"""Steps between two looks at the pre-activations, at how many rows, and how many pre-activations at most."""


@torch.no_grad()
def follow_spread(trainee: Trainee, x: Float[Tensor, "n d_in"]) -> None:
    """Give a JumpReLU SAE in training the window that its pre-activations ask for, on some steps.

    Args:
        trainee: What is trained, and where it stands.
        x: Inputs of the step about to be taken, at the scale of training.
    """
    sae, configured = trainee.sae, trainee.config.activation
    if trainee.step_count % EVERY or not isinstance(configured, JumpReLU) or configured.least_in_window == 0:
        return
    assert sae.threshold is not None
    rows = x[: max(1, min(ROWS, ENTRIES // sae.d_sae))]
    pre = sae.pre_activations(rows - sae.b_dec if sae.apply_b_dec_to_input else rows)
    set_window(trainee, configured.widened(pre - sae.threshold).bandwidth)


def set_window(trainee: Trainee, bandwidth: float | None) -> None:
    """Give a JumpReLU SAE in training a window, and its thresholds the learning rate that goes with it.

    Args:
        trainee: What is trained.
        bandwidth: The window's width; None for other activation functions.
    """
    sae = trainee.sae
    if isinstance(sae.activation, JumpReLU) and bandwidth is not None:
        sae.activation = dataclasses.replace(sae.activation, bandwidth=bandwidth)
        trainee.rates["threshold"] = trainee.config.threshold_rate(sae.d_in, bandwidth)
