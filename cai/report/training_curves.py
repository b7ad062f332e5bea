"""A training run as a picture: what a stage logged, step by step, in panels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cai.report.picture import COLOURS, SOFT
from cai.text.formatting import printable

Panels = Mapping[str, Mapping[str, str]]
"""The title of each panel, with its unit, to its lines: the name in metrics.jsonl to the label."""


def curves(folder: Path, panels: Panels, name: str = "curves.svg") -> Path | None:
    """Draws `metrics.jsonl` of a stage's folder into the folder. The suffix of `name` says how: .svg or .png.

    Metrics that were never logged have no line, and panels without a line are left out; None where none is left.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = {title: {label: _points(rows, metric) for metric, label in some.items()} for title, some in panels.items()}
    shown = {title: some for title, some in lines.items() if any(some.values())}
    if not shown:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    path = folder / name
    columns = min(2, len(shown))
    height = math.ceil(len(shown) / columns)
    with matplotlib.rc_context({"svg.hashsalt": "cai", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(4.6 * columns, 2.5 * height), layout="constrained")
        grid = list(figure.subplots(height, columns, squeeze=False).flat)
        for axes, (title, some) in zip(grid, shown.items(), strict=False):
            _draw(axes, title, some)
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        figure.supxlabel("step", fontsize=9, color=SOFT)
        options: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 160}
        figure.savefig(path, facecolor="white", **options)
    return path


def _points(rows: list[dict[str, Any]], metric: str) -> list[tuple[float, float]]:
    """(step, value) of every row that has the metric."""
    return [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]


def _draw(axes: Any, title: str, lines: Mapping[str, list[tuple[float, float]]]) -> None:
    for number, (label, points) in enumerate((label, points) for label, points in lines.items() if points):
        steps, values = zip(*points, strict=True)
        mark = "o" if len(points) == 1 else ""  # a line of one point is not seen
        axes.plot(steps, values, color=COLOURS[1 + number % (len(COLOURS) - 1)], lw=1.6, marker=mark,
                  label=printable(label))  # fmt: skip
    axes.set_title(printable(title), loc="left", fontsize=10, weight="bold")
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8.5, handlelength=1.2)
    axes.grid(color="#e3e6ea", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=SOFT)
    axes.spines[:].set_visible(False)
