"""The L0 controller: it moves the sparsity coefficient until as many latents fire as were asked for.

L0 answers to the coefficient monotonically but slowly, over hundreds of steps, and how strongly depends on everything
else. So the logarithm of the coefficient follows the logarithm of L0 / target: one part in proportion to where L0 is
now, one part added up over the steps. The first makes the second stable; the second makes L0 arrive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from unweave._errors import UnweaveError

_AVERAGE = 0.1
"""Share of a step's L0 in the running mean."""
_LARGEST_ERROR = math.log(3)
"""Further off counts as this far off, so that a start with thousands of active latents does not wind the sum up."""
_LIMIT = math.log(1e4)
"""How far the coefficient may move from where it started, either way."""


@dataclass(frozen=True)
class L0Controller:
    """Multiplies the sparsity coefficient so that the mean L0 of the codes reaches a target.

    For penalties whose coefficient decides L0: L1, Lp, Tanh and L0, with ReLU, JumpReLU and Gated. It begins when the
    coefficient has warmed up.

    Attributes:
        target: Mean number of active latents per token to reach.
        rate: How far the logarithm of the coefficient moves in a step on which L0 is off by a factor of e. None: `8 /
            steps`, which lets it cross two decades in half of the run.
        gain: The part in proportion: the coefficient is multiplied by `(L0 / target)^gain` at once.
    """

    target: float = 32.0
    rate: float | None = None
    gain: float = 1.0

    def __post_init__(self) -> None:
        if not self.target > 0 or self.gain < 0 or (self.rate is not None and not self.rate > 0):
            raise UnweaveError(
                "L0Controller needs target > 0, rate > 0 and gain >= 0, got "
                f"target={self.target}, rate={self.rate} and gain={self.gain}."
            )


@dataclass
class ControllerState:
    """Where a controller stands.

    Args:
        config: The controller.
        steps: Steps of the whole run.
    """

    config: L0Controller
    steps: int
    l0: float | None = None
    """Running mean of L0."""
    total: float = 0.0
    """Sum of what the steps added to the logarithm of the coefficient."""

    @property
    def factor(self) -> float:
        """What the coefficient is multiplied by."""
        return math.exp(max(-_LIMIT, min(_LIMIT, self.total + self.config.gain * self._error())))

    def observe(self, l0: float) -> None:
        """Take a step's mean L0 into account."""
        self.l0 = l0 if self.l0 is None else self.l0 + _AVERAGE * (l0 - self.l0)
        rate = self.config.rate if self.config.rate is not None else 8 / max(self.steps, 1)
        self.total = max(-_LIMIT, min(_LIMIT, self.total + rate * self._error()))

    def _error(self) -> float:
        if self.l0 is None:
            return 0.0
        off = math.log(max(self.l0, 1e-3) / self.config.target)
        return max(-_LARGEST_ERROR, min(_LARGEST_ERROR, off))

    def state_dict(self) -> dict[str, Any]:
        return {"l0": self.l0, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.l0, self.total = state["l0"], state["total"]
