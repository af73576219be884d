"""The sparsity terms of one SAE in training: their coefficients, and everything that moves those.

A term's coefficient is its own at the width, times its warm-up or schedule, times what keeps an annealed penalty
continuous, times the L0 controller's factor. All of it that a later step depends on is in `state_dict`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unweave.objectives import Penalty
from unweave.sae import SAE
from unweave.sae.codes import Codes
from unweave.training.config import SAEConfig
from unweave.training.controller import ControllerState


class Sparsity:
    """The sum of a configuration's penalties, each times its coefficient of the moment.

    Args:
        config: Names the penalties and their schedules.
        d_in: Width of the inputs, which default coefficients depend on.
        steps: Steps of the whole run.
    """

    def __init__(self, config: SAEConfig, d_in: int, steps: int) -> None:
        self.terms, self.steps, self.warmup = config.sparsity_terms, steps, config.sparsity_warmup
        self._base = [term.coefficient_for(d_in) for term in self.terms]
        self._continuity = [1.0] * len(self.terms)
        self._current: list[Penalty] = [term.at(0, steps) for term in self.terms]
        controller = config.l0_controller
        self.controller = None if controller is None else ControllerState(controller, steps)

    def coefficient(self, i: int = 0) -> float:
        """Coefficient of a term apart from its warm-up or schedule; 0 where there are no terms."""
        if not self.terms:
            return 0.0
        moved = self.controller is not None and self.terms[i].decides_l0
        return self._base[i] * self._continuity[i] * (self.controller.factor if moved else 1.0)  # type: ignore[union-attr]

    def scaled(self, step: int, warm: float, i: int = 0) -> float:
        """Coefficient of a term at a step.

        Args:
            step: The step about to be taken.
            warm: The warm-up's factor, for terms without a schedule of their own.
            i: Which term.
        """
        schedule = self.terms[i].schedule if self.terms else None
        return self.coefficient(i) * (warm if schedule is None else schedule(step, self.steps))

    def __call__(self, pre: Codes, codes: Codes, sae: SAE, step: int, warm: float) -> Float[Tensor, ""]:
        """The penalty of a batch; what changes its shape at this step gets its coefficient here."""
        total = codes.values.new_zeros(())
        for i, term in enumerate(self.terms):
            now = term.at(step, self.steps)
            value = now(pre, codes, sae)
            if now != self._current[i]:
                with torch.no_grad():
                    before, after = float(self._current[i](pre, codes, sae)), float(value.detach())
                ratio = before / after if after > 0 else 1.0
                self._continuity[i] *= ratio if ratio > 0 and math.isfinite(ratio) else 1.0
                self._current[i] = now
            total = total + self.scaled(step, warm, i) * value
        return total

    def observe(self, l0: Tensor, step: int) -> None:
        """Tell the controller the mean L0 of the step that was taken."""
        warm = step >= round(self.warmup * self.steps) or all(term.schedule is not None for term in self.terms)
        if self.controller is not None and warm:
            self.controller.observe(float(l0))

    def state_dict(self) -> dict[str, Any]:
        return {
            "continuity": list(self._continuity),
            "controller": None if self.controller is None else self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Continue from what `state_dict` returned before a step."""
        self._continuity = list(state["continuity"])
        self._current = [term.at(max(step - 1, 0), self.steps) for term in self.terms]
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
