"""Confidence against how often it was right, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cai.report.picture import COLOURS, SOFT

PARTS = {"reliability": "as the labels are", "reliability_after_temperature": "after temperature, on other prompts"}


def draw_reliability(found: Mapping[str, Any], path: Path) -> None:
    """Draws what `cai.feedback.calibration` measured: a dot a bin, if any, whiskers its 95 %. Suffix: .svg or .png."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "cai", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(5.2, 5), layout="constrained")
        axes = figure.subplots()
        axes.plot([0.5, 1], [0.5, 1], color=SOFT, lw=1, ls="--", zorder=0)
        for number, (part, label) in enumerate(PARTS.items(), 1):
            if not found[part]:
                continue
            colour = COLOURS[number]
            for each in found[part]:
                axes.vlines(each["confidence"], *each["interval"], color=colour, lw=2, alpha=0.4)
            x, y, n = zip(*((each["confidence"], each["right"], each["n"]) for each in found[part]), strict=True)
            sizes = [20 + 160 * each / sum(n) for each in n]
            axes.scatter(x, y, s=sizes, color=colour, edgecolor="white", label=label, clip_on=False, zorder=3)
        axes.set_xlim(0.5, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("confidence", color=SOFT)
        axes.set_ylabel("share right", color=SOFT)
        axes.grid(color="#e3e6ea", lw=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, colors=SOFT)
        axes.spines[:].set_visible(False)
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
        options = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 160}
        figure.savefig(path, facecolor="white", **options)  # type: ignore[arg-type]
