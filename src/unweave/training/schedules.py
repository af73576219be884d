"""How the learning rate and the sparsity coefficient move over a run."""

from __future__ import annotations


def learning_rate_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Linear warm-up, constant, linear decay.

    Step 0 already moves: its factor is one warm-up step, not 0. The last step has one decay step left.

    Args:
        step: The step about to be taken, from 0.
        steps: Steps of the whole run.
        warmup: Share of the run to rise over; 0 starts at 1.
        decay: Share of the run, at its end, to fall over.
    """
    rise = (step + 1) / max(round(warmup * steps), 1)
    fall = (steps - step) / max(round(decay * steps), 1)
    return max(0.0, min(1.0, rise, fall))


def warmup_factor(step: int, steps: int, warmup: float) -> float:
    """0 at step 0, rising linearly to 1 at step `warmup * steps`."""
    n = round(warmup * steps)
    return min(1.0, step / n) if n else 1.0
