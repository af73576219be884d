"""Pictures of what SAEs found: similarity of latents and true features, and recovery side by side.

All return a `matplotlib.figure.Figure` of their own; nothing goes through pyplot. Sizes are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unweave._errors import UnweaveError
from unweave.sae import SAE
from unweave.synthetic.dictionary import cosine_similarities
from unweave.synthetic.figures import (
    BLUE,
    DIVERGING,
    GREY,
    RED,
    check_path,
    new_figure,
    plain_axes,
    save_figure,
    show_figure,
    style,
)  # fmt: skip
from unweave.synthetic.ordering import find_best_feature_ordering_from_sae

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from unweave.synthetic.dictionary import FeatureDictionary


@torch.no_grad()
def plot_sae_feature_similarity(
    sae: SAE,
    feature_dict: FeatureDictionary,
    title: str | None = None,
    reorder_features: bool | Int[Tensor, " latents"] = False,
    decoder_only: bool = False,
    show_values: bool = False,
    height: int = 400,
    width: int = 800,
    save_path: str | Path | None = None,
    show_plot: bool = True,
    dtick: int | None = None,
    scale: float = 1.0,
) -> Figure:
    """Heat maps of the cosines of latents with true features: encoder and decoder, side by side.

    Args:
        sae: The SAE; its latents are the rows.
        feature_dict: The true features, which are the columns.
        title: Above both.
        reorder_features: True sorts the latents by the feature that their decoder matches best; a tensor of latents
            gives the order, and may leave some out.
        decoder_only: Leave the encoder out.
        show_values: Write the cosine, to two decimals, into each cell.
        height: Pixels.
        width: Pixels.
        save_path: A .png or .svg file to write.
        show_plot: In a notebook, show the picture. Elsewhere there is nothing to show it on.
        dtick: Distance of two ticks on the axes. None: round distances that leave room for the numbers.
        scale: Pixels of a saved PNG for each pixel of the figure.

    Returns:
        The figure. The rows' order is by position; the tick labels count positions, not latents, once reordered.

    Raises:
        UnweaveError: If matplotlib is missing, the widths of SAE and dictionary differ, or `save_path` is of another
            kind.
    """
    if save_path is not None:
        check_path(save_path)
    order = _order(sae, feature_dict, reorder_features)
    weights = {} if decoder_only else {"encoder": sae.W_enc.T}
    panels = {n: _cosines(w, feature_dict, order) for n, w in {**weights, "decoder": sae.W_dec}.items()}
    with style():
        figure = new_figure(width, height, title)
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, cosines) in zip(grid, panels.items(), strict=True):
            image = _heat_map(axes, cosines, dtick, show_values)
            axes.set_title(name)
            axes.set_xlabel("true feature (index)")
        grid[0].set_ylabel(_row_label(reorder_features))
        figure.colorbar(image, ax=list(grid), label="cosine similarity", aspect=30)
    _deliver(figure, save_path, show_plot, scale)
    return figure


@torch.no_grad()
def plot_similarity_across_saes(
    saes: Mapping[str, SAE] | Iterable[SAE],
    feature_dict: FeatureDictionary,
    title: str | None = None,
    reorder_features: bool | Int[Tensor, " latents"] = True,
    columns: int = 4,
    height: int | None = None,
    width: int | None = None,
    save_path: str | Path | None = None,
    dtick: int | None = None,
    scale: float = 1.0,
) -> Figure:
    """Heat maps of the cosines of decoder rows with true features, a panel for each SAE, all on one scale.

    Args:
        saes: SAEs by the name that stands above their panel, or in a row (then named by activation and width).
        feature_dict: The true features, which are the columns of each panel.
        title: Above all.
        reorder_features: True sorts each SAE's latents by the feature that they match best; a tensor is one order for
            all (`find_best_feature_ordering_across_saes` finds one); False leaves them.
        columns: Panels in a line, at most.
        height: Pixels; None: 270 for each line of panels.
        width: Pixels; None: 250 for each panel of a line, at least 420.
        save_path: A .png or .svg file to write.
        dtick: Distance of two ticks; None: round distances that leave room for the numbers.
        scale: Pixels of a saved PNG for each pixel of the figure.

    Raises:
        UnweaveError: If there are no SAEs, or for the reasons of `plot_sae_feature_similarity`.
    """
    if save_path is not None:
        check_path(save_path)
    named = list(saes.items()) if isinstance(saes, Mapping) else [(f"{s.activation}, {s.d_sae:,}", s) for s in saes]
    if not named:
        raise UnweaveError("there are no SAEs to draw.")
    across, down = _grid(len(named), columns)
    with style():
        figure = new_figure(width or max(250 * across + 90, 420), height or 270 * down + 40, title)
        grid = figure.subplots(down, across, squeeze=False)
        for axes in grid.flat[len(named) :]:
            axes.set_axis_off()
        for axes, (name, sae) in zip(grid.flat, named, strict=False):
            order = _order(sae, feature_dict, reorder_features)
            image = _heat_map(axes, _cosines(sae.W_dec, feature_dict, order), dtick, False)
            axes.set_title(name, fontsize=9)
        for axes in grid[:, 0]:
            axes.set_ylabel(_row_label(reorder_features))
        for i in range(across):  # below the last panel of each column
            grid.flat[max(range(i, len(named), across))].set_xlabel("true feature (index)")
        figure.colorbar(image, ax=grid, label="cosine similarity", aspect=30)
    _deliver(figure, save_path, False, scale)
    return figure


class Bar(NamedTuple):
    """One panel of `plot_recovery`."""

    label: str
    """Title of the panel, with the unit."""
    values: Sequence[float | None]
    """One for each SAE, None where the number is undefined; integers are written without decimals."""
    target: float | None = None
    """Where a perfect SAE stands, drawn as a line."""
    limit: float | None = None
    """Right end of the scale; None: what the values need."""


def plot_recovery(
    names: Sequence[str],
    bars: Sequence[Bar],
    title: str | None = None,
    columns: int = 4,
    height: int | None = None,
    width: int = 960,
    save_path: str | Path | None = None,
    scale: float = 1.0,
) -> Figure:
    """Bars that compare SAEs, a panel for each metric, with the value of a perfect SAE as a line.

    Args:
        names: The SAEs, from top to bottom.
        bars: The metrics.
        title: Above all.
        columns: Panels in a line, at most.
        height: Pixels; None: what the number of SAEs needs.
        width: Pixels.
        save_path: A .png or .svg file to write.
        scale: Pixels of a saved PNG for each pixel of the figure.

    Raises:
        UnweaveError: If there are no SAEs or metrics, or a metric has another number of values than there are SAEs.
    """
    if save_path is not None:
        check_path(save_path)
    if not names or not bars:
        raise UnweaveError("there is nothing to compare: pass at least one SAE and one metric.")
    for bar in bars:
        if len(bar.values) != len(names):
            raise UnweaveError(f"{bar.label!r} has {len(bar.values)} values for {len(names)} SAEs.")
    across, down = _grid(len(bars), columns)
    with style():
        figure = new_figure(width, height or down * (80 + 26 * len(names)) + 40, title)
        grid = figure.subplots(down, across, sharey=True, squeeze=False)
        for axes in grid.flat[len(bars) :]:
            axes.set_axis_off()
        for axes, bar in zip(grid.flat, bars, strict=False):
            _draw_bars(axes, bar)
            axes.set_yticks(range(len(names)), names)
        grid[0, 0].invert_yaxis()
        if any(bar.target is not None for bar in bars):
            figure.supxlabel("line: a perfect SAE", fontsize=8, color=RED, x=0.99, ha="right")
    _deliver(figure, save_path, False, scale)
    return figure


def _grid(panels: int, columns: int) -> tuple[int, int]:
    """Panels across and down, with lines as equal as they can be."""
    down = math.ceil(panels / max(columns, 1))
    return math.ceil(panels / down), down


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _draw_bars(axes: Axes, bar: Bar) -> None:
    values = [0.0 if v is None else v for v in bar.values]
    end = bar.limit or (max(max(values), bar.target or 0.0) or 1.0) * 1.05
    plain_axes(axes)
    axes.grid(False, axis="y")
    axes.barh(range(len(values)), values, height=0.62, color=BLUE)
    # Room to the right for the numbers, which stand behind the bars' ends: readable whatever the bars' colour.
    axes.set_xlim(min(0.0, min(values)), end * 1.32)
    axes.tick_params(axis="y", length=0)
    for i, value in enumerate(bar.values):
        axes.annotate(
            _number(value), (max(values[i], bar.target or 0.0, 0.0), i), (5, 0),
            textcoords="offset points", va="center", fontsize=8, color=GREY,
        )  # fmt: skip
    if bar.target is not None:
        axes.axvline(bar.target, color=RED, linewidth=1.4, linestyle=(0, (4, 2)))
    axes.set_title(bar.label, fontsize=9)
    axes.locator_params(axis="x", nbins=4, integer=all(isinstance(value, int) for value in bar.values))


def _order(sae: SAE, feature_dict: FeatureDictionary, reorder: bool | Tensor) -> Tensor:
    if isinstance(reorder, Tensor):
        valid = reorder.ndim == 1 and len(reorder) > 0 and not reorder.is_floating_point()
        if not valid or reorder.min() < 0 or reorder.max() >= sae.d_sae:
            raise UnweaveError(
                f"reorder_features must be indices of latents from 0 to {sae.d_sae - 1}, got a tensor of shape "
                f"{tuple(reorder.shape)}"
                + (f" with values from {reorder.min()} to {reorder.max()}." if reorder.numel() else ".")
            )
        return reorder.to(sae.device).long()
    if reorder:
        return find_best_feature_ordering_from_sae(sae, feature_dict)
    return torch.arange(sae.d_sae, device=sae.device)


def _cosines(weights: Tensor, feature_dict: FeatureDictionary, order: Tensor) -> Float[Tensor, "latents features"]:
    if weights.shape[1] != feature_dict.feature_vectors.shape[1]:
        raise UnweaveError(
            f"an SAE of width {weights.shape[1]} cannot be compared with features of width "
            f"{feature_dict.feature_vectors.shape[1]}."
        )
    return cosine_similarities(weights[order], feature_dict.feature_vectors.to(weights)).float().cpu()


def _row_label(reorder: bool | Tensor) -> str:
    given = isinstance(reorder, Tensor)
    return "latent (in the order given)" if given else "latent (by best match)" if reorder else "latent (index)"


def _heat_map(axes: Axes, values: Tensor, dtick: int | None, show_values: bool) -> AxesImage:
    from matplotlib.ticker import MaxNLocator, MultipleLocator

    image = axes.imshow(values.numpy(), cmap=DIVERGING, vmin=-1, vmax=1, aspect="auto")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MultipleLocator(dtick) if dtick else MaxNLocator(nbins=6, integer=True, min_n_ticks=2))
    if show_values:
        for (i, j), value in _cells(values):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    return image


def _cells(values: Tensor) -> Iterable[tuple[tuple[int, int], float]]:
    return (((i, j), v) for i, row in enumerate(values.tolist()) for j, v in enumerate(row))


def _deliver(figure: Figure, save_path: str | Path | None, show: bool, scale: float) -> None:
    if save_path is not None:
        save_figure(figure, save_path, scale)
    if show:
        show_figure(figure)
