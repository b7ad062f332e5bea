"""Pictures: a comparison's rates, the reliability of labels, what training logged; colours and axes of all of them.

The bytes of a file depend on what is drawn alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai.report.figures import METRICS
from cai.report.summary import compared_sets
from cai.text.formatting import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#5b6472", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7f3fbf")
"""Told apart by people with any colour vision (Okabe and Ito 2008); the grey comes first and is the baseline's."""
MUTED = "#5b6472"
"""Of labels beside the data."""
GRID = "#e3e6ea"

DIRECTIONS = {"high": "higher is better", "low": "lower is better", "neither": ""}
LABELS = {"reliability": "as the labels are", "reliability_after_temperature": "after temperature, on other prompts"}
"""Key of the calibration's figures to how the picture calls the bins there."""

Panels = Mapping[str, Mapping[str, str]]
"""The title of each panel, with its unit, to its lines: the name in metrics.jsonl to the label."""
Points = list[tuple[float, float]]
"""(step, value)."""


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


def draw_rates(summary: Mapping[str, Any], path: Path, prompt_set: str = "") -> None:
    """Draws the checkpoints' rates with their 95 % intervals. The suffix of `path` says how: .svg or .png.

    `summary` is summary.json's; `prompt_set` names another prompt set than the first.
    """
    (checkpoints,) = (compared.rates for compared in compared_sets(summary) if compared.prompt_set == prompt_set)
    metrics = [metric for metric in METRICS if any(metric in rates for rates in checkpoints.values())]
    metrics = [metric for metric in metrics if metric != "unclear" or "well_formed" not in metrics]
    step = 0.62 / max(len(checkpoints), 1)
    height = 0.9 + 0.3 * len(metrics) * (1 + 0.35 * len(checkpoints))
    with saved_figure(path, 7.2, height) as figure:
        axes = figure.subplots()
        for index, (checkpoint, rates) in enumerate(checkpoints.items()):
            offset = (index - (len(checkpoints) - 1) / 2) * step
            heights, values, lows, highs = [], [], [], []
            for row, metric in enumerate(metrics):
                rate = rates.get(metric)
                if rate is not None and rate["value"] is not None:
                    heights.append(row + offset)
                    values.append(100 * rate["value"])
                    lows.append(100 * rate["interval"][0])
                    highs.append(100 * rate["interval"][1])
            colour = COLOURS[index % len(COLOURS)]
            axes.hlines(heights, lows, highs, color=colour, lw=2, alpha=0.55)
            axes.plot(
                values, heights, "o", color=colour, ms=6.5, mec="white", mew=0.8, label=printable(checkpoint),
                clip_on=False,
            )  # fmt: skip
        for row in range(1, len(metrics)):
            axes.axhline(row - 0.5, color=GRID, lw=0.8, zorder=0)
        axes.set_yticks([])
        for row, metric in enumerate(metrics):
            place: dict[str, Any] = {
                "xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"
            }  # fmt: skip
            axes.annotate(METRICS[metric].label, (0, row), (-14, 2), weight="bold", **place)
            axes.annotate(DIRECTIONS[METRICS[metric].better], (0, row), (-14, -11), color=MUTED, fontsize=8.5, **place)
        axes.set_ylim(len(metrics) - 0.5, -0.5)
        axes.set_xlim(-1, 101)
        axes.set_xticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)])
        style_axes(axes)
        figure.legend(loc="outside upper left", ncols=min(4, len(checkpoints)), frameon=False, handletextpad=0.2)


def draw_reliability(calibration: Mapping[str, Any], path: Path) -> None:
    """Draws the bins that `cai.feedback.judge_calibration` measured, with 95 % whiskers, to a file .svg or .png."""
    with saved_figure(path, 5.2, 5) as figure:
        axes = figure.subplots()
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, lw=1, ls="--", zorder=0)
        for colour, (key, label) in zip(COLOURS[1:], LABELS.items(), strict=False):
            if bins := calibration[key]:
                confidences, shares, n_pairs, intervals = (
                    [entry[name] for entry in bins] for name in ("confidence", "right", "n", "interval")
                )
                axes.vlines(confidences, *zip(*intervals, strict=True), color=colour, lw=2, alpha=0.4)
                sizes = [20 + 160 * n / sum(n_pairs) for n in n_pairs]
                axes.scatter(
                    confidences, shares, sizes, color=colour, edgecolor="white", label=label, clip_on=False, zorder=3
                )
        axes.set_xlim(0.5, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("confidence", color=MUTED)
        axes.set_ylabel("share right", color=MUTED)
        style_axes(axes)
        figure.legend(loc="outside upper left", ncols=2, frameon=False)


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
