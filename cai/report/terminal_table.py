"""A comparison as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cai.report.figures import METRICS
from cai.report.summary import compared_sets
from cai.text.formatting import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from cai.maths.statistics import RateFigure
    from cai.report.figure_types import HeadToHead

ARROWS = {"high": " ↑", "low": " ↓", "neither": ""}


def comparison_tables(summary: Mapping[str, Any]) -> RenderableType:
    """Rates of the checkpoints with their intervals, and who wins head to head, for rich. `summary`: summary.json's."""
    from rich.console import Group

    tables: list[RenderableType] = []
    for compared in compared_sets(summary):
        tables.append(_rates_table(compared.rates, compared.prompt_set))
        if compared.head_to_head:
            tables.append(_head_to_head_table(compared.head_to_head))
    return Group(*tables)


def _rates_table(checkpoints: Mapping[str, Mapping[str, RateFigure]], prompt_set: str) -> Table:
    from rich.text import Text

    table = _empty_table("Checkpoints" + (f" on {printable(prompt_set)}" if prompt_set else ""))
    table.add_column("")
    for checkpoint in checkpoints:
        table.add_column(Text(printable(checkpoint)), justify="right")
    for name, metric in METRICS.items():
        if any(name in rates for rates in checkpoints.values()):
            cells = [_cell(rates.get(name)) for rates in checkpoints.values()]
            table.add_row(f"{metric.label}{ARROWS[metric.better]}", *cells)
    counts = [(rate["n"], rate["topics"]) for rates in checkpoints.values() if (rate := rates.get("distinct"))]
    n_responses, n_topics = max(counts, default=(0, 0))
    table.caption = f"% with 95 % interval; {n_responses} responses about {n_topics} topics each; ↑ or ↓ is better"
    if any(rate.get("missing") for rates in checkpoints.values() for rate in rates.values()):
        table.caption += "; in brackets: worst cases, were all that failed one way or the other"
    table.caption_justify = "left"
    return table


def _head_to_head_table(entries: Sequence[HeadToHead]) -> Table:
    from rich.text import Text

    table = _empty_table("Head to head")
    table.add_column("")
    table.add_column("wins %", justify="right")
    table.add_column("won/tied/lost", justify="right")
    table.add_column("")
    for entry in entries:
        winner = {"a better": entry["a"], "b better": entry["b"]}.get(entry["verdict"])
        table.add_row(
            Text(printable(f"{entry['a']} against {entry['b']}")),
            _cell(entry),
            f"{entry['wins']}/{entry['ties']}/{entry['losses']}",
            Text(printable(f"{winner} better" if winner else "not distinguishable")),
        )
    return table


def _empty_table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.SIMPLE, header_style="bold", pad_edge=False)


def _cell(rate: RateFigure | None) -> str:
    if rate is None or rate["value"] is None:
        return "–"
    low, high = (100 * end for end in rate["interval"])
    cell = f"{100 * rate['value']:.1f} [dim]{low:.0f}–{high:.0f}[/dim]"
    if rate.get("missing"):
        lowest, highest = (100 * end for end in rate["bounds"])
        cell += f" [red]({lowest:.0f}–{highest:.0f})[/red]"
    return cell
