"""Warnings in words, from the numbers that are logged anyway and from the first batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.training.config import SAEConfig

Row = dict[str, Any]

_MOST_IN_ONE, _LEAST = 0.5, 16
"""Share of the variance that one dimension may hold; and rows and dimensions below which that says nothing."""


def outlier_dimension(x: Float[Tensor, "n d"], *, whitens: bool) -> str | None:
    """What to know of activations whose variance is mostly in one dimension; None of all others.

    Latents then serve that dimension or die, which the explained variance of all dimensions together does not show: in
    a world of 128 features in 32 dimensions, with 97 % of the variance in one, a third of the latents died, and of the
    others' variance 0.23 was explained in place of 0.63. With whitening it was 0.57 whatever the outlier.

    Args:
        x: Activations, centred or not.
        whitens: Whether what is trained on them could take them whitened.
    """
    if min(x.shape) < _LEAST:
        return None
    x = x.float()
    centred = x - x.mean(0)
    variance = centred.square().mean(0)
    share, i = (variance / variance.sum()).max(0)
    if not share > _MOST_IN_ONE:  # of equal rows it is NaN
        return None
    kurtosis = centred[:, i].pow(4).mean() / variance[i].square()
    whiten = "normalize='whiten', or " if whitens else ""
    return (
        f"dimension {int(i)} holds {float(share):.0%} of the variance (its kurtosis is {float(kurtosis):.3g}, and 3 is "
        f"normal), so latents serve it or die: try {whiten}the output of the norm that comes next"
    )


def may_whiten(config: SAEConfig) -> bool:
    """Whether the same SAE can be trained on whitened activations."""
    try:
        replace(config, normalize="whiten")
    except UnweaveError:
        return False
    return True


def warnings_for(history: Sequence[Row]) -> list[str]:
    """What is going wrong in one SAE's training, judged from its logged rows (oldest first); usually nothing.

    Each warning holds at the last row only; the caller shows a warning once.
    """
    if len(history) < 4:
        return []
    last, found = history[-1], []
    window = history[-len(history) // 2 :]
    progress = last["tokens"] / last["total_tokens"]
    if last["dead"] > 0.2 and last["dead"] >= history[-2]["dead"]:
        trend = "and rising" if last["dead"] > history[-2]["dead"] else "and not falling"
        found.append(f"{last['dead']:.0%} of the latents are dead {trend}: try a higher learning rate or fewer latents")
    target = last.get("target_l0")
    if target and progress > 0.3 and len(window) >= 4:
        l0s = [row["l0"] for row in window]
        if abs(last["l0"] / target - 1) > 0.5 and max(l0s) - min(l0s) < 0.02 * last["l0"]:
            moves = len({row.get("coefficient") for row in window}) > 1  # a controller has tried that already
            advice = "a higher learning rate" if moves else "a higher sparsity coefficient"
            found.append(f"L0 is flat at {last['l0']:.0f}, the target is {target:g}: try {advice}")
        thresholds = [row["threshold"] for row in window if "threshold" in row]
        still = bool(thresholds) and max(thresholds) - min(thresholds) < 1e-3 * max(thresholds)
        if still and abs(last["l0"] / target - 1) > 0.2:
            found.append("the threshold is not moving: try a higher threshold_lr or a wider bandwidth")
    if progress > 0.1 and last["l0"] < 0.5:
        found.append(f"L0 is {last['l0']:.2g}, hardly any latent fires: try a lower sparsity coefficient")
    if progress > 0.2 and (last["explained_variance"] or 0) < 0:
        found.append(f"explained variance is {last['explained_variance']:.2f}: try a lower learning rate")
    return found
