"""What all pictures share: a figure without global state, fonts and colours, and files that appear whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unweave._errors import UnweaveError
from unweave._files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
"""Pixels for an inch: figures are asked for in pixels, and font sizes are in points (1/72 inch)."""
DIVERGING = "RdBu_r"
"""Blue below 0, white at 0, red above: told apart in every common kind of colour blindness."""
# Okabe and Ito's palette, in an order in which neighbours differ most in lightness too.
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#595959",
)  # fmt: skip
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so pictures look the same everywhere
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "figure.titlesize": 11.0,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "axes.linewidth": 0.8,
    "svg.hashsalt": "unweave",  # the same picture gives the same bytes
}
SUFFIXES = (".png", ".svg")


def pictures_available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


@contextmanager
def style() -> Iterator[None]:
    """The fonts and lines of unweave's pictures, for what is drawn or saved inside.

    Raises:
        UnweaveError: If matplotlib is not installed.
    """
    if not pictures_available():
        raise UnweaveError("pictures need matplotlib: pip install 'unweave[plots]'.")
    import matplotlib

    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """An empty white figure of `width` x `height` pixels that keeps its parts from overlapping."""
    from matplotlib.figure import Figure

    if width <= 0 or height <= 0:
        raise UnweaveError(f"a picture needs a positive width and height in pixels, got {width} x {height}.")
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title)
    return figure


def save_figure(figure: Figure, path: str | Path, scale: float = 1.0) -> None:
    """Write a figure as PNG or SVG, by the suffix of `path`, whole or not at all.

    Args:
        figure: The figure.
        path: Where to; folders are made.
        scale: Pixels of a PNG for each pixel of the figure; 2 gives sharp pictures on dense screens.

    Raises:
        UnweaveError: If the suffix is neither .png nor .svg, or the scale is not positive.
    """
    path = check_path(path)
    if not scale > 0:
        raise UnweaveError(f"the scale of a picture must be above 0, got {scale}.")
    kind = path.suffix.lower()[1:]
    # A date in the file would make two equal pictures differ.
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    with style(), atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=DPI * scale, metadata=metadata)


def check_path(path: str | Path) -> Path:
    """The path of a picture, if its suffix is one that can be written."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UnweaveError(f"a picture is saved as {' or '.join(SUFFIXES)}, and {str(path)!r} ends in neither.")
    return path


def show_figure(figure: Figure) -> bool:
    """Show a figure in the notebook that runs this, if one does, and say whether it was shown."""
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        return False
    shows = import_module("IPython.display")
    buffer = BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=2 * DPI)
    shows.display(shows.Image(data=buffer.getvalue(), width=round(figure.get_figwidth() * DPI)))
    return True


def plain_axes(axes: Axes) -> None:
    """Only the two axes that carry a scale, and a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
