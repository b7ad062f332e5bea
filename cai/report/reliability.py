"""Confidence of labels against how often they are right, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cai.report.figure_style import COLOURS, MUTED, saved_figure, style_axes

LABELS = {"reliability": "as the labels are", "reliability_after_temperature": "after temperature, on other prompts"}
"""Key of the calibration's figures to how the picture calls the bins there."""


def draw_reliability(calibration: Mapping[str, Any], path: Path) -> None:
    """Draws the bins that `cai.feedback.judge_calibration` measured, with 95 % whiskers, to a file .svg or .png."""
    with saved_figure(path, 5.2, 5) as figure:
        axes = figure.subplots()
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, lw=1, ls="--", zorder=0)
        for index, (key, label) in enumerate(LABELS.items(), 1):
            bins = calibration[key]
            if not bins:
                continue
            n_pairs = sum(reliability_bin["n"] for reliability_bin in bins)
            for reliability_bin in bins:
                axes.vlines(
                    reliability_bin["confidence"], *reliability_bin["interval"], color=COLOURS[index], lw=2, alpha=0.4
                )
            axes.scatter(
                [reliability_bin["confidence"] for reliability_bin in bins],
                [reliability_bin["right"] for reliability_bin in bins],
                s=[20 + 160 * reliability_bin["n"] / n_pairs for reliability_bin in bins],
                color=COLOURS[index],
                edgecolor="white",
                label=label,
                clip_on=False,
                zorder=3,
            )
        axes.set_xlim(0.5, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("confidence", color=MUTED)
        axes.set_ylabel("share right", color=MUTED)
        style_axes(axes)
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
