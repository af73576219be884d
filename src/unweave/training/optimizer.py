"""Adam over the parameters of an SAE: one pass over the rows of each matrix.

The pass updates moments and weights, brings decoder rows back to norm 1, and leaves the encoder's rows as the next
step's product wants them. The formula is `torch.optim.Adam`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from unweave import kernels

_EPS = 1e-8


class RowGrad(NamedTuple):
    """A gradient of some rows of a matrix; the other rows' is 0."""

    rows: Float[Tensor, "c d"]
    slot: Int64[Tensor, " m"] | None
    """Which of `rows` belongs to each latent, -1 for none; None: there is one for each latent, in order."""


def as_rows(name: str, parameter: Tensor) -> Tensor:
    """A parameter of an SAE, or its gradient, as a matrix, latent by latent where it has latents."""
    if parameter.ndim < 2:
        return parameter.view(1, -1)
    if parameter.ndim > 2:  # a cross-layer transcoder's skip, layer after layer
        return parameter.flatten(0, -2)
    return parameter.T if name.startswith("W_enc") else parameter


def squares_of(grads: Mapping[str, Tensor | RowGrad]) -> Float[Tensor, ""]:
    """The squared norm of all gradients that are whole tensors, in float64."""
    rows = [kernels.squared_norm(as_rows(name, g)).double() for name, g in grads.items() if isinstance(g, Tensor)]
    return torch.stack(rows).sum()


@torch.no_grad()
def remove_parallel_part(W_dec: Tensor) -> None:
    """Take out of each row's gradient what would only change the row's norm; rows have unit norm."""
    assert W_dec.grad is not None
    along = torch.linalg.vecdot(W_dec.grad, W_dec)
    W_dec.grad.addcmul_(along[:, None], W_dec, value=-1)


class Adam:
    """Adam with a learning rate for each parameter.

    Args:
        parameters: Of an SAE, by name; W_dec and the transpose of W_enc are contiguous.
        betas: Decay rates of the two moments.
        moments: dtype of the matrices' moments. bfloat16 halves their memory and is rounded stochastically, since a
            second moment that decays by a thousandth would otherwise never change.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], betas: tuple[float, float], moments: torch.dtype = torch.float32
    ) -> None:
        self.parameters, self.betas, self.steps = dict(parameters), betas, 0
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        for name, parameter in self.parameters.items():
            dtype = moments if parameter.ndim == 2 else parameter.dtype
            zeros = torch.zeros_like(as_rows(name, parameter.detach()), dtype=dtype)
            self.moments[name] = (zeros, zeros.clone())

    @torch.no_grad()
    def step(
        self,
        grads: Mapping[str, Tensor | RowGrad],
        rates: Mapping[str, float],
        *,
        grad_scale: float | Float[Tensor, ""] = 1.0,
        unit: str | None = None,
        screen: tuple[str, kernels.Precision] | None = None,
        instead_of: kernels.Screen | None = None,
    ) -> kernels.Screen | None:
        """Update every parameter.

        Args:
            grads: Gradient of each parameter.
            rates: Learning rate of each parameter.
            grad_scale: Multiplies the gradients (clipping). With a tensor that is NaN nothing is changed.
            unit: Parameter whose rows are brought back to norm 1, or whose blocks' (`W_dec.0`, `W_dec.1`, ...) are.
            screen: Parameter for whose rows a `Screen` is returned, and of which precision.
            instead_of: The screen before, whose memory may be overwritten.
        """
        self.steps += 1
        made = None
        for name, parameter in self.parameters.items():
            grad = grads[name]
            if isinstance(grad, Tensor):
                grad = RowGrad(as_rows(name, grad), None)
            first, second = self.moments[name]
            wanted = screen is not None and screen[0] == name
            renewed = kernels.adam_rows(
                as_rows(name, parameter.detach()), grad.rows, grad.slot, first, second,
                lr=rates[name], betas=self.betas, eps=_EPS, step=self.steps, grad_scale=grad_scale,
                unit=name.partition(".")[0] == unit, screen=screen[1] if screen is not None and wanted else None,
                instead_of=instead_of if wanted else None,
            )  # fmt: skip
            made = renewed if wanted else made
            torch.autograd.graph.increment_version(parameter)
        return made

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The moments, by parameter."""
        return {name: {"exp_avg": m, "exp_avg_sq": v} for name, (m, v) in self.moments.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """Continue from what `state_dict` returned after a number of steps."""
        self.steps = steps
        for name, moments in self.moments.items():
            for own, key in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
                own.copy_(state[name][key])
