"""The L0 controller: it moves the sparsity coefficient until as many latents fire as were asked for.

L0 answers to the coefficient monotonically but slowly, over hundreds of steps, and how strongly depends on everything
else. So the logarithm of the coefficient follows where the logarithm of L0 / target is going: one part in proportion to
what it will be a little later, at the rate at which it moves now, and one part added up over the steps. The second part
makes L0 arrive, the first makes that stable. The sum waits while L0 is on its way and will soon be there, as at the
start, where thousands of latents may be active; else it would wind up, and L0 would swing past the target. How strongly
L0 answers is not known beforehand, so each time that it crosses the target both parts get weaker: what would swing
comes to rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from unweave._errors import UnweaveError

_AVERAGE, _SLOW_AVERAGE = 0.1, 0.02
"""Shares of a step's L0 in two running means of its logarithm, which lag behind by 10 and by 50 steps."""
_AHEAD = 0.05
"""How far ahead is looked, as a share of the run."""
_ARRIVES = 0.1
"""Share of the run within which L0 has to arrive at its present speed, for the sum to wait."""
_SLOWER, _SLOWEST = 0.5, 1 / 8
"""What the rate is multiplied by each time that L0 crosses the target, and how far it falls by that."""
_LARGEST_ERROR = math.log(3)
"""Further off counts as this far off."""
_LIMIT = math.log(1e4)
"""How far the coefficient may move from where it started, either way."""


@dataclass(frozen=True)
class L0Controller:
    """Multiplies the sparsity coefficient so that the mean L0 of the codes reaches a target.

    For penalties whose coefficient decides L0: L1, Lp, PAnneal, Tanh and L0, with ReLU, JumpReLU and Gated. Of several
    it moves these alone; Frequency and Contrastive keep their coefficients. It begins when the coefficient has warmed
    up.

    Attributes:
        target: Mean number of active latents per token to reach.
        rate: How far the logarithm of the coefficient moves in a step on which L0 is off by a factor of e, until L0
            first crosses the target. None: `16 / steps`, which lets it cross a decade in a seventh of the run.
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
    fast: float | None = None
    """Running mean of the logarithm of L0 / target."""
    slow: float = 0.0
    """The same, further behind."""
    total: float = 0.0
    """Sum of what the steps added to the logarithm of the coefficient."""
    slowed: float = 1.0
    """What the rate is multiplied by, and its root what the gain is."""

    @property
    def factor(self) -> float:
        """What the coefficient is multiplied by."""
        return math.exp(max(-_LIMIT, min(_LIMIT, self.total + self.config.gain * self.slowed**0.5 * self._error())))

    def observe(self, l0: float) -> None:
        """Take a step's mean L0 into account."""
        now = math.log(max(l0, 1e-3) / self.config.target)
        if self.fast is None:
            self.fast = self.slow = now
        before = self.fast
        self.fast += _AVERAGE * (now - self.fast)
        if before * self.fast < 0:
            self.slowed = max(_SLOWEST, self.slowed * _SLOWER)
        self.slow += _SLOW_AVERAGE * (now - self.slow)
        rate = self.config.rate if self.config.rate is not None else 16 / max(self.steps, 1)
        on_its_way = -self._per_step() * math.copysign(1.0, self.fast)
        if on_its_way * _ARRIVES * self.steps < abs(self.fast):
            self.total = max(-_LIMIT, min(_LIMIT, self.total + rate * self.slowed * self._error()))

    def _per_step(self) -> float:
        """How far the logarithm of L0 moves in a step."""
        assert self.fast is not None
        return (self.fast - self.slow) / (1 / _SLOW_AVERAGE - 1 / _AVERAGE)

    def _error(self) -> float:
        """Where the logarithm of L0 / target is going."""
        if self.fast is None:
            return 0.0
        ahead = self.fast + self._per_step() * _AHEAD * self.steps
        return max(-_LARGEST_ERROR, min(_LARGEST_ERROR, ahead))

    def state_dict(self) -> dict[str, Any]:
        return {"fast": self.fast, "slow": self.slow, "total": self.total, "slowed": self.slowed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fast, self.slow = state["fast"], state["slow"]
        self.total, self.slowed = state["total"], state["slowed"]
