"""A comparison as a picture: one row of dots with whiskers for each rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cai.report.figures import METRICS
from cai.text.formatting import printable

COLOURS = ("#5b6472", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7f3fbf")
"""One a checkpoint, told apart by people with any colour vision (Okabe and Ito 2008); the baseline is grey."""

SOFT = "#5b6472"
WAYS = {"high": "higher is better", "low": "lower is better", "neither": ""}


def draw(summary: Mapping[str, Any], path: Path, prompt_set: str = "") -> None:
    """Draws the checkpoints' rates with their 95 % intervals. The suffix of `path` says how: .svg or .png.

    `summary` is summary.json's; `prompt_set` names another prompt set than the first.
    """
    import matplotlib
    from matplotlib.figure import Figure

    checkpoints = summary[f"checkpoints_{prompt_set}" if prompt_set else "checkpoints"]
    shown = [metric for metric in METRICS if any(metric in rates for rates in checkpoints.values())]
    shown = [metric for metric in shown if metric != "unclear" or "well_formed" not in shown]
    step = 0.62 / max(len(checkpoints), 1)
    with matplotlib.rc_context({"svg.hashsalt": "cai", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(7.2, 0.9 + 0.3 * len(shown) * (1 + 0.35 * len(checkpoints))), layout="constrained")
        axes = figure.subplots()
        for index, (name, rates) in enumerate(checkpoints.items()):
            offset = (index - (len(checkpoints) - 1) / 2) * step
            places = [(row, rates[metric]) for row, metric in enumerate(shown) if _known(rates.get(metric))]
            heights = [row + offset for row, _ in places]
            values = [100 * rate["value"] for _, rate in places]
            ends = [[100 * end for end in rate["interval"]] for _, rate in places]
            colour = COLOURS[index % len(COLOURS)]
            axes.hlines(heights, [low for low, _ in ends], [high for _, high in ends], color=colour, lw=2, alpha=0.55)
            axes.plot(
                values, heights, "o", color=colour, ms=6.5, mec="white", mew=0.8, label=printable(name), clip_on=False
            )
        for row in range(1, len(shown)):
            axes.axhline(row - 0.5, color="#e3e6ea", lw=0.8, zorder=0)
        axes.set_yticks([])
        for row, metric in enumerate(shown):
            beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            beside["ha"] = "right"
            axes.annotate(METRICS[metric].label, (0, row), (-14, 2), weight="bold", **beside)
            axes.annotate(WAYS[METRICS[metric].better], (0, row), (-14, -11), color=SOFT, fontsize=8.5, **beside)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(-1, 101)
        axes.set_xticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)], color=SOFT)
        axes.grid(axis="x", color="#e3e6ea", lw=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.legend(loc="outside upper left", ncols=min(4, len(checkpoints)), frameon=False, handletextpad=0.2)
        options: dict[str, Any] = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 160}
        figure.savefig(path, facecolor="white", **options)


def _known(rate: Mapping[str, Any] | None) -> bool:
    return rate is not None and rate["value"] is not None
