"""Draws pretraining: loss, judge accuracy and world accuracy by step, one line a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cai.report.pictures import COLOURS, GRID, MUTED, saved_figure
from cai.text.formatting import printable

PANELS = {
    "loss": "training loss, nats",
    "validation_loss": "validation loss, nats",
    "judge_accuracy": "judge accuracy, validation",
    "world_accuracy": "world accuracy, validation",
}


def draw_curves(runs: Mapping[str, Path], path: Path) -> None:
    """Draws the metrics.jsonl of each named run to a .svg or .png file."""
    from matplotlib.ticker import LogLocator, NullLocator

    with saved_figure(path, 9, 5) as figure:
        panels = figure.subplots(2, 2).flat
        for axes, (metric, title) in zip(panels, PANELS.items(), strict=True):
            for number, (name, log) in enumerate(runs.items()):
                rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
                points = [(row["step"], row[metric]) for row in rows if metric in row]
                steps, values = zip(*points, strict=True) if points else ((), ())
                axes.plot(steps, values, color=COLOURS[1 + number % (len(COLOURS) - 1)], lw=1.8, label=printable(name))
            axes.set_title(title, loc="left", fontsize=10, weight="bold")
            if metric.endswith("loss"):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
                axes.yaxis.set_minor_locator(NullLocator())
                axes.yaxis.set_major_formatter("{x:g}")
            else:
                axes.set_ylim(0.45, 1.01)
            axes.grid(color=GRID, lw=0.8)
            axes.tick_params(length=0, colors=MUTED, which="both")
            axes.spines[:].set_visible(False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False)
        figure.supxlabel("step", fontsize=9, color=MUTED)
