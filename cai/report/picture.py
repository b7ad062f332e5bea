"""A comparison as a picture: one row of dots with whiskers for each rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cai.report.figure_style import COLOURS, GRID, MUTED, saved_figure, style_axes
from cai.report.figures import METRICS
from cai.report.summary import compared_sets
from cai.text.formatting import printable

DIRECTIONS = {"high": "higher is better", "low": "lower is better", "neither": ""}


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
