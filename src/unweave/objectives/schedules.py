"""How a coefficient or a k moves over a run: small functions of the step, named by where they start and end.

A schedule is read before the step that it acts on. Step 0 has the start, and whatever is to be reached by the end of
the run is reached at its last step.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from unweave._errors import UnweaveError

Shape = Literal["linear", "cosine", "exponential"]


@dataclass(frozen=True)
class Schedule:
    """A factor that moves from one value to another. The default is a linear warm-up over a tenth of the run.

    Attributes:
        start: Factor up to `begin`.
        end: Factor from `begin + over` on.
        begin: Share of the run after which it starts to move.
        over: Share of the run over which it moves; 0 jumps.
        shape: "linear", "cosine" (a half wave: flat at both ends) or "exponential" (linear in the logarithm).
    """

    start: float = 0.0
    end: float = 1.0
    begin: float = 0.0
    over: float = 0.1
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        if self.start < 0 or self.end < 0:
            raise UnweaveError(f"a schedule's factors are at least 0, got {self.start} and {self.end}.")
        _check_shares(self.begin, self.over)
        _check_shape(self.shape, self.start, self.end)

    def __call__(self, step: int, steps: int) -> float:
        """The factor at a step.

        Args:
            step: The step about to be taken, from 0.
            steps: Steps of the whole run.
        """
        return _between(self.start, self.end, _progress(step, steps, self.begin, self.over), self.shape)


@dataclass(frozen=True)
class KSchedule:
    """Anneals k from a larger one to the activation function's own, which is what the SAE is saved with.

    Attributes:
        start: k at step 0.
        over: Share of the run over which k moves.
        shape: "linear", "cosine" or "exponential".
    """

    start: float
    over: float = 0.1
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        if not self.start > 0:
            raise UnweaveError(f"a schedule of k starts above 0, got {self.start}.")
        _check_shares(0.0, self.over)
        _check_shape(self.shape, self.start, 1.0)

    def __call__(self, k: float, step: int, steps: int) -> float:
        """The k of a step, which need not be whole, on the way to `k`."""
        return _between(self.start, k, _progress(step, steps, 0.0, self.over), self.shape)


def _check_shares(begin: float, over: float) -> None:
    if begin < 0 or over < 0 or begin + over > 1 + 1e-9:
        raise UnweaveError(f"a schedule moves within the run: begin={begin} and over={over} are shares of it.")


def _check_shape(shape: str, start: float, end: float) -> None:
    if shape not in ("linear", "cosine", "exponential"):
        raise UnweaveError(f"a schedule's shape is 'linear', 'cosine' or 'exponential', got {shape!r}.")
    if shape == "exponential" and min(start, end) <= 0:
        raise UnweaveError("an exponential schedule cannot start or end at 0.")


def _progress(step: int, steps: int, begin: float, over: float) -> float:
    """How much of the way is gone, from 0 to 1."""
    first = round(begin * steps)
    last = min(round((begin + over) * steps), max(steps - 1, 0))  # the last step is at the end, not one before it
    if step >= last:
        return 1.0
    return max(0.0, (step - first) / (last - first))


def _between(start: float, end: float, t: float, shape: Shape) -> float:
    if t in (0.0, 1.0):
        return end if t else start
    if shape == "exponential":
        return start * (end / start) ** t
    if shape == "cosine":
        t = (1 - math.cos(math.pi * t)) / 2
    return start + (end - start) * t


def factor_of(schedule: Schedule | None, step: int, steps: int) -> float:
    """What a coefficient is multiplied by at a step; 1 without a schedule."""
    return 1.0 if schedule is None else schedule(step, steps)


AnyPart = TypeVar("AnyPart")


def scheduled(part: AnyPart, step: int, steps: int) -> AnyPart:
    """An objective's settings with the coefficient that its schedule gives it at a step."""
    settings: Any = part
    if settings.schedule is None:
        return part
    return cast(
        AnyPart, dataclasses.replace(settings, coefficient=settings.coefficient * settings.schedule(step, steps))
    )
