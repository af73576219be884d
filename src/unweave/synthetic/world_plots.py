"""Pictures of a world: requested and measured firing rates, correlations, and how much its features overlap.

All return a `matplotlib.figure.Figure` of their own; nothing goes through pyplot. Sizes are in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.synthetic.figures import (
    BLUE,
    DIVERGING,
    GREY,
    ORANGE,
    RED,
    check_path,
    new_figure,
    plain_axes,
    save_figure,
    style,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

POINTS = 4000
"""Features up to which each is drawn as a point; above, points would hide each other, and their density is drawn."""
MIN_EXPECTED = 10
"""Expected firings from which a count is close enough to normal for its deviation to be shown in standard errors."""


def plot_firing_rates(
    requested: Float[Tensor, " features"],
    counts: Int[Tensor, " features"],
    samples: int,
    title: str | None = None,
    height: int = 400,
    width: int = 900,
    save_path: str | Path | None = None,
    scale: float = 1.0,
) -> Figure:
    """Requested against measured firing rates, and how far apart they are in standard errors.

    The band holds 99.9 % of the features when the rates are as requested; the deviations, over features that are
    expected to fire at least 10 times, then follow the standard normal density drawn over them.

    Args:
        requested: Firing probability of each feature.
        counts: On how many samples each fired.
        samples: Samples looked at.
        title: Above both.
        height: Pixels.
        width: Pixels.
        save_path: A .png or .svg file to write.
        scale: Pixels of a saved PNG for each pixel of the figure.

    Raises:
        UnweaveError: If the lengths differ, or there are no samples.
    """
    if save_path is not None:
        check_path(save_path)
    if requested.shape != counts.shape or requested.ndim != 1:
        raise UnweaveError(
            f"requested rates of shape {tuple(requested.shape)} do not go with counts of shape {tuple(counts.shape)}."
        )
    if samples < 1:
        raise UnweaveError(f"samples must be at least 1, got {samples}.")
    p = requested.detach().double().cpu().numpy()
    rates = counts.cpu().numpy() / samples
    with style():
        figure = new_figure(width, height, title)
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _rates(left, p, rates, samples)
        _deviations(right, p, rates, samples)
    if save_path is not None:
        save_figure(figure, save_path, scale)
    return figure


def _rates(axes: Axes, p: np.ndarray, rates: np.ndarray, samples: int) -> None:
    from matplotlib.ticker import NullFormatter

    fired, asked = rates > 0, p > 0
    shown = fired & asked
    plain_axes(axes)
    axes.set(xscale="log", yscale="log", xlabel="requested firing rate (per sample)",
             ylabel="measured firing rate (per sample)")  # fmt: skip
    lowest = max(p[asked].min() if asked.any() else 1.0, 0.1 / samples)
    highest = min(p.max() if asked.any() else 1.0, 1.0)
    ends = lowest / 1.5, min(highest * 1.5, 1.0)
    if ends[1] < 10 * ends[0]:  # whole decades, so that rates which are all alike still stand on a scale with numbers
        ends = 10 ** np.floor(np.log10(ends[0])), 10 ** np.ceil(np.log10(ends[1]))
    span = np.geomspace(*ends, 200)
    error = 3.29 * np.sqrt(span * (1 - np.minimum(span, 1)) / samples)
    floor = 0.5 / samples
    axes.fill_between(span, np.maximum(span - error, floor), span + error, color=ORANGE, alpha=0.3, linewidth=0,
                      label="99.9 % of features")  # fmt: skip
    axes.plot(span, span, color=RED, linewidth=1.2, label="as requested", zorder=3)
    if shown.sum() <= POINTS:
        axes.plot(p[shown], rates[shown], ".", color=BLUE, markersize=4, markeredgewidth=0,
                  label="feature")  # fmt: skip
    elif shown.any():
        image = axes.hexbin(p[shown], rates[shown], xscale="log", yscale="log", bins="log", mincnt=1, gridsize=60,
                            cmap=_blues(), linewidths=0.1, zorder=2.5)  # fmt: skip
        axes.figure.colorbar(image, ax=axes, label="features", aspect=30)
    never = int((~fired).sum())
    if never:
        axes.text(0.98, 0.03, f"{never:,} never fired (not shown)", transform=axes.transAxes, ha="right", fontsize=8,
                  color=GREY)  # fmt: skip
    axes.set_xlim(span[0], span[-1])
    axes.set_ylim(max(min(span[0], rates[shown].min() if shown.any() else 1.0) / 1.2, floor), 1.2 * span[-1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())  # at a narrow span they would overlap
    axes.legend(loc="upper left")
    axes.set_title(f"{len(p):,} features, {samples:,} samples")


def _blues() -> Colormap:
    """Lighter to darker blue, without the near-white end that cannot be told from paper."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["Blues"](np.linspace(0.25, 1, 256)))


def _deviations(axes: Axes, p: np.ndarray, rates: np.ndarray, samples: int) -> None:
    testable = (p * samples >= MIN_EXPECTED) & ((1 - p) * samples >= MIN_EXPECTED)
    plain_axes(axes)
    axes.set(xlabel="measured − requested (standard errors)", ylabel="density")
    axes.set_title(f"{testable.sum():,} features expected to fire ≥ {MIN_EXPECTED} times", fontsize=9)
    if not testable.any():
        axes.text(0.5, 0.5, "more samples are needed", transform=axes.transAxes, ha="center", color=GREY)
        return
    q = p[testable]
    z = (rates[testable] - q) / np.sqrt(q * (1 - q) / samples)
    reach = max(4.0, float(np.ceil(np.abs(z).max())))
    bins = int(np.clip(np.sqrt(len(z)) * reach / 2, 8, 80))
    axes.hist(z, bins=bins, range=(-reach, reach), density=True, color=BLUE, label="features")
    grid = np.linspace(-reach, reach, 300)
    axes.plot(grid, np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi), color=RED, linewidth=1.4, label="standard normal")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.22)  # room for the legend above the data
    axes.legend(loc="upper right", ncols=2)


def plot_firing_correlations(
    measured: Float[Tensor, "features features"],
    requested: Float[Tensor, "features features"] | None = None,
    title: str | None = None,
    limit: float | None = None,
    height: int = 430,
    width: int | None = None,
    save_path: str | Path | None = None,
    scale: float = 1.0,
) -> Figure:
    """Correlations of which features fire together, beside those that were requested if they are given.

    Both panels show the features in the order of a hierarchical clustering of the requested correlations (the measured
    ones if none are given), so that features which go together stand together. The diagonal, which is 1, is left out.

    Args:
        measured: Pearson correlation of the firing (0 or 1) of each pair.
        requested: What it should be.
        title: Above all.
        limit: Where the colours end. None: the 99.5th percentile of the largest |correlation| shown, at least 0.05.
        height: Pixels.
        width: Pixels; None: 470 for one panel, 900 for two.
        save_path: A .png or .svg file to write.
        scale: Pixels of a saved PNG for each pixel of the figure.

    Raises:
        UnweaveError: If a matrix is not square, or the shapes differ.
    """
    if save_path is not None:
        check_path(save_path)
    if measured.ndim != 2 or measured.shape[0] != measured.shape[1] or len(measured) < 1:
        raise UnweaveError(f"correlations must be a square matrix, got the shape {tuple(measured.shape)}.")
    if requested is not None and requested.shape != measured.shape:
        raise UnweaveError(
            f"requested correlations of shape {tuple(requested.shape)} do not go with measured ones of shape "
            f"{tuple(measured.shape)}."
        )
    panels = {"requested": requested} if requested is not None else {}
    panels["measured"] = measured
    shown = {name: matrix.detach().double().cpu().nan_to_num(0.0) for name, matrix in panels.items()}
    order = cluster_order(next(iter(shown.values())))
    off = ~np.eye(len(order), dtype=bool)
    with style():
        figure = new_figure(width or (900 if len(shown) == 2 else 470), height, title)
        grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        if limit is None:
            values = [np.abs(m.numpy()[off]) for m in shown.values()]
            limit = max([0.05, *(float(np.quantile(v, 0.995)) for v in values if len(v))])
        for axes, (name, matrix) in zip(grid, shown.items(), strict=True):
            ordered = np.where(off, matrix.numpy()[np.ix_(order, order)], np.nan)
            axes.set_facecolor("#d9d9d9")  # the diagonal
            image = axes.imshow(ordered, cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest",
                                aspect="auto")  # fmt: skip
            axes.set_title(name)
            axes.set_xlabel("feature (clustered)")
        grid[0].set_ylabel("feature (clustered)")
        figure.colorbar(image, ax=list(grid), label="correlation of firing", aspect=30, extend="both")
    if save_path is not None:
        save_figure(figure, save_path, scale)
    return figure


def cluster_order(correlations: Float[Tensor, "n n"]) -> np.ndarray:
    """An order that puts correlated features side by side: leaves of average linkage on 1 − correlation."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    if len(correlations) < 3:
        return np.arange(len(correlations))
    distance = (1 - correlations.double().clamp(-1, 1)).numpy()
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0)
    condensed = squareform(distance, checks=False)
    tree = linkage(condensed, "average")
    if len(correlations) <= 400:  # quartic at worst
        tree = optimal_leaf_ordering(tree, condensed)
    return leaves_list(tree)


def plot_superposition(
    feature_vectors: Float[Tensor, "features d"],
    max_cosines: Float[Tensor, " features"],
    title: str | None = None,
    shown: int = 128,
    height: int = 400,
    width: int = 900,
    save_path: str | Path | None = None,
    scale: float = 1.0,
) -> Figure:
    """How much features overlap: cosines of the first ones with each other, and each one's largest.

    Args:
        feature_vectors: The dictionary; of unit norm or not.
        max_cosines: Largest |cosine| of each feature with another one.
        title: Above both.
        shown: Features in the heat map.
        height: Pixels.
        width: Pixels.
        save_path: A .png or .svg file to write.
        scale: Pixels of a saved PNG for each pixel of the figure.
    """
    if save_path is not None:
        check_path(save_path)
    first = torch.nn.functional.normalize(feature_vectors[:shown].detach().double().cpu(), dim=1)
    largest = max_cosines.detach().double().cpu().numpy()
    features, d = feature_vectors.shape
    with style():
        figure = new_figure(width, height, title)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
        image = left.imshow((first @ first.T).numpy(), cmap=DIVERGING, vmin=-1, vmax=1, aspect="auto")
        left.set(xlabel="feature (index)", ylabel="feature (index)")
        which = f" (first {len(first)})" if len(first) < features else ""
        left.set_title(f"{features:,} features in {d:,} dimensions{which}", fontsize=9)
        figure.colorbar(image, ax=left, label="cosine similarity", aspect=30)
        plain_axes(right)
        right.hist(largest, bins=40, range=(0, 1), color=BLUE)
        right.axvline(largest.mean(), color=RED, linewidth=1.4, linestyle=(0, (4, 2)))
        which = f", of a sample of {len(largest):,}" if len(largest) < features else ""
        right.set_title(f"mean {largest.mean():.3f} (line){which}", fontsize=9)
        right.set(xlabel="largest |cosine| with another feature", ylabel="features", xlim=(0, 1))
    if save_path is not None:
        save_figure(figure, save_path, scale)
    return figure
