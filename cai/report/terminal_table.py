"""A comparison as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cai.report.figures import METRICS
from cai.text.formatting import printable

if TYPE_CHECKING:
    from rich.console import RenderableType


def table(summary: Mapping[str, Any]) -> RenderableType:
    """Rates of the checkpoints with their intervals, and who wins head to head, for rich. `summary`: summary.json's."""
    from rich.console import Group

    sets = [
        key.removeprefix("checkpoints") for key in summary if key == "checkpoints" or key.startswith("checkpoints_")
    ]
    parts: list[RenderableType] = []
    for suffix in sets:
        parts.append(_rates(summary[f"checkpoints{suffix}"], suffix.removeprefix("_")))
        if head_to_head := summary.get(f"head_to_head{suffix}"):
            parts.append(_head_to_head(head_to_head))
    return Group(*parts)


def _rates(checkpoints: Mapping[str, Any], prompt_set: str) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = [metric for metric in METRICS if any(metric in rates for rates in checkpoints.values())]
    title = "Checkpoints" + (f" on {printable(prompt_set)}" if prompt_set else "")
    result = Table(title=title, title_justify="left", box=box.SIMPLE, header_style="bold", pad_edge=False)
    result.add_column("")
    for name in checkpoints:
        result.add_column(Text(printable(name)), justify="right")
    for metric in shown:
        cells = [_cell(rates.get(metric)) for rates in checkpoints.values()]
        result.add_row(f"{METRICS[metric].label}{ARROWS[METRICS[metric].better]}", *cells)
    counts = {(rate["n"], rate["topics"]) for rates in checkpoints.values() if (rate := rates.get("distinct"))}
    responses, topics = max(counts, default=(0, 0))
    result.caption = f"% with 95 % interval; {responses} responses about {topics} topics each; ↑ or ↓ is better"
    if any(rate.get("missing") for rates in checkpoints.values() for rate in rates.values()):
        result.caption += "; in brackets: worst cases, were all that failed one way or the other"
    result.caption_justify = "left"
    return result


ARROWS = {"high": " ↑", "low": " ↓", "neither": ""}


def _cell(rate: Mapping[str, Any] | None) -> str:
    if rate is None or rate["value"] is None:
        return "–"
    low, high = (100 * end for end in rate["interval"])
    worst = ""
    if rate.get("missing"):
        lowest, highest = (100 * end for end in rate["bounds"])
        worst = f" [red]({lowest:.0f}–{highest:.0f})[/red]"
    return f"{100 * rate['value']:.1f} [dim]{low:.0f}–{high:.0f}[/dim]{worst}"


def _head_to_head(entries: list[Mapping[str, Any]]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(title="Head to head", title_justify="left", box=box.SIMPLE, header_style="bold", pad_edge=False)
    for heading, justify in (("", "left"), ("wins %", "right"), ("won/tied/lost", "right"), ("", "left")):
        result.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for entry in entries:
        winner = {"a better": entry["a"], "b better": entry["b"]}.get(entry["verdict"])
        result.add_row(
            Text(printable(f"{entry['a']} against {entry['b']}")),
            _cell(entry),
            f"{entry['wins']}/{entry['ties']}/{entry['losses']}",
            Text(printable(f"{winner} better" if winner else "not distinguishable")),
        )
    return result
