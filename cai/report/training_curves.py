"""A training run as a picture: what a stage logged, step by step, in panels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai.report.figure_style import COLOURS, MUTED, saved_figure, style_axes
from cai.text.formatting import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panels = Mapping[str, Mapping[str, str]]
"""The title of each panel, with its unit, to its lines: the name in metrics.jsonl to the label."""
Points = list[tuple[float, float]]
"""(step, value)."""


def draw_training_curves(folder: Path, panels: Panels, name: str = "curves.svg") -> Path | None:
    """Draws `metrics.jsonl` of a stage's folder into the folder. The suffix of `name` says how: .svg or .png.

    Metrics that were never logged have no line, and panels without a line are left out; None where none is left.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    points_by_panel = {
        title: {label: _points(rows, metric) for metric, label in labels.items()} for title, labels in panels.items()
    }
    drawn = {title: lines for title, lines in points_by_panel.items() if any(lines.values())}
    if not drawn:
        return None
    columns = min(2, len(drawn))
    n_rows = math.ceil(len(drawn) / columns)
    with saved_figure(folder / name, 4.6 * columns, 2.5 * n_rows) as figure:
        grid = list(figure.subplots(n_rows, columns, squeeze=False).flat)
        for axes, (title, lines) in zip(grid, drawn.items(), strict=False):
            _draw_panel(axes, title, lines)
        for axes in grid[len(drawn) :]:
            axes.set_visible(False)
        figure.supxlabel("step", fontsize=9, color=MUTED)
    return folder / name


def _points(rows: list[dict[str, Any]], metric: str) -> Points:
    """The metric at every step that logged it."""
    return [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]


def _draw_panel(axes: Axes, title: str, lines: Mapping[str, Points]) -> None:
    logged = {label: points for label, points in lines.items() if points}
    for index, (label, points) in enumerate(logged.items()):
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) == 1 else ""  # a line through one point would not be visible
        colour = COLOURS[1 + index % (len(COLOURS) - 1)]
        axes.plot(steps, values, color=colour, lw=1.6, marker=marker, label=printable(label))
    axes.set_title(printable(title), loc="left", fontsize=10, weight="bold")
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8.5, handlelength=1.2)
    style_axes(axes)
