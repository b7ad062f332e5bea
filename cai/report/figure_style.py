"""How every picture looks: colours, axes, and files whose bytes depend on what is drawn alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#5b6472", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7f3fbf")
"""Told apart by people with any colour vision (Okabe and Ito 2008); the grey comes first and is the baseline's."""
MUTED = "#5b6472"
"""Of labels beside the data."""
GRID = "#e3e6ea"


@contextmanager
def saved_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of that size (inches) that is written to `path` at the end; the suffix says how: .svg or .png."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "cai", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        options: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 160}
        figure.savefig(path, facecolor="white", **options)


def style_axes(axes: Axes) -> None:
    """A light grid behind the data, and neither frame nor ticks."""
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=MUTED)
    axes.spines[:].set_visible(False)
