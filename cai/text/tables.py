"""Figures as plain lines in columns, the same on a terminal and in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cai.maths.chance import against_chance
from cai.text.formatting import printable


def aligned_lines(rows: Sequence[Sequence[str]], alignment: str = "") -> list[str]:
    """Cells in columns, two spaces apart. `alignment` has `<` or `>` for each column; `<` where it is too short."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    formats = [f"{side}{width}" for side, width in zip(alignment.ljust(len(widths), "<"), widths, strict=True)]
    return ["  ".join(map(format, row, formats)).rstrip() for row in cells]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns under a ruled header."""
    rule = ["-" * max(len(printable(cell)) for cell in column) for column in zip(headers, *rows, strict=True)]
    return aligned_lines([headers, rule, *rows])


def nested_lines(figures: Mapping[str, Any]) -> list[str]:
    """Any nested figures, a line each, rates with their intervals."""
    lines: list[str] = []
    for key, value in figures.items():
        if is_rate(value):
            lines.append(f"{key}: {rate_text(value)}")
        elif isinstance(value, Mapping):
            lines += [f"{key}:", *(f"  {line}" for line in nested_lines(value))]
        else:
            lines.append(f"{key}: {value}")
    return [printable(line) for line in lines]


def is_rate(value: object) -> bool:
    """Whether a figure has a value and an interval."""
    return isinstance(value, Mapping) and "value" in value and "interval" in value


def rate_text(rate: Mapping[str, Any] | None) -> str:
    """`0.12 [0.08, 0.17]`, with the worst cases after it if something failed; a dash where there is no rate."""
    if rate is None or rate.get("value") is None:
        return "-"
    interval = rate.get("interval")
    bounds = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval and None not in interval else ""
    worst = f", worst case {rate['bounds'][0]:.2f} to {rate['bounds'][1]:.2f}" if rate.get("missing") else ""
    return f"{rate['value']:.2f}{bounds}{worst}"


def accuracy_text(accuracy: Mapping[str, Any] | None) -> str:
    """`rate_text` of a share of right choices between two, and a remark where it is no better than chance."""
    text = rate_text(accuracy)
    if accuracy is None or accuracy.get("value") is None:
        return text
    standing = against_chance(accuracy["interval"])
    return text if standing == "better than chance" else f"{text}, {standing}"
