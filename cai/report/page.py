"""A comparison as one self-contained HTML page, without scripts or external resources, for any screen, light or dark.

Everything that a model or a user wrote stays text: Jinja escapes it, the page's content security policy forbids scripts
and connections, and characters that are invisible or change the direction of text are spelled out. This module arranges
the figures in tables; the template only writes them down.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cai
from cai.maths.statistics import RateFigure
from cai.report.examples import Example
from cai.report.figure_types import Comparison, DifferenceFigure, HeadToHead, PrincipleWinRate, PromptSetFigures
from cai.report.figures import AMOUNTS, METRICS
from cai.report.pictures import COLOURS
from cai.storage.rows import HELD_OUT, TOPIC
from cai.text.formatting import printable

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

    from cai.feedback.explain import Explanation

TEMPLATE = Path(__file__).parent / "page.html.jinja"
JOINERS = "\u200c\u200d"
"""Invisible characters that stay as they are: words of some languages and emoji need them."""


def render_page(comparison: Comparison, examples: Sequence[Example]) -> str:
    """The page for the contents of comparison.json, and examples chosen for it."""
    checkpoints = list(comparison["models"])
    principles = list(comparison["principles"])
    return (
        _environment()
        .get_template(TEMPLATE.name)
        .render(
            comparison=comparison,
            names=checkpoints,
            colour={checkpoint: f"c{index % len(COLOURS)}" for index, checkpoint in enumerate(checkpoints)},
            sets=[
                _arrange_set(prompt_set, figures, checkpoints, principles)
                for prompt_set, figures in comparison["sets"].items()
            ],
            examples=[_arrange_example(example) for example in examples],
            versions=_versions(),
        )
    )


def visible(text: object) -> Markup:
    """`text` escaped; characters that do not show or change the direction of text become their code points in boxes."""
    from markupsafe import Markup, escape

    parts: list[str] = []
    for character in str(text):
        if _is_hidden(character):
            parts.append(f'<span class="odd">U+{ord(character):04X}</span>')
        else:
            parts.append(str(escape(character)))
    return Markup("".join(parts))


def _is_hidden(character: str) -> bool:
    if character in "\n\t" or character in JOINERS:
        return False
    return unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def _arrange_set(
    prompt_set: str, figures: PromptSetFigures, checkpoints: Sequence[str], principles: Sequence[str]
) -> dict[str, Any]:
    """The figures of one prompt set in the arrangement of the template."""
    explained = figures.get("explained")
    return {
        "name": prompt_set,
        "prompts": figures["prompts"],
        "topics": figures["topics"],
        "metrics": [
            _arrange_metric(metric, figures, checkpoints)
            for metric in METRICS
            if any(metric in rates for rates in figures["checkpoints"].values())
        ],
        "matrix": _arrange_matrix(figures["head_to_head"], checkpoints),
        "head_to_head": figures["head_to_head"],
        "principles": _arrange_win_rates(figures["principles"], principles),
        "explained": _arrange_explained(explained, principles) if explained else None,
        "behaviours": _arrange_behaviours(figures["behaviours"], checkpoints),
        "tags": figures["tags"],
    }


def _arrange_metric(metric: str, figures: PromptSetFigures, checkpoints: Sequence[str]) -> dict[str, Any]:
    """A line for each checkpoint."""
    lines = [
        {
            "name": checkpoint,
            "rate": figures["checkpoints"][checkpoint].get(metric),
            "verdict": _arrange_verdict(metric, figures["differences"].get(checkpoint, {}).get(metric)),
        }
        for checkpoint in checkpoints
    ]
    return {"lines": lines, **METRICS[metric]._asdict()}


def _arrange_verdict(metric: str, difference: DifferenceFigure | None) -> dict[str, str] | None:
    """What is known of a checkpoint's rate and the baseline's, and whether it is good news."""
    if difference is None:
        return None
    verdict, better = difference["verdict"], METRICS[metric].better
    if verdict == "not distinguishable" or better == "neither":
        return {"text": verdict, "kind": "even"}
    return {"text": verdict, "kind": "good" if (verdict == "higher") == (better == "high") else "bad"}


def _arrange_matrix(entries: Sequence[HeadToHead], checkpoints: Sequence[str]) -> list[dict[str, Any]]:
    """A row a checkpoint: the shares of comparisons that it won against the checkpoint of each column."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        if entry["value"] is None:
            continue
        a, b = entry["a"], entry["b"]
        low, high = entry["interval"]
        lowest, highest = entry.get("bounds", [0.0, 1.0])
        shared = {"winner": {"a better": a, "b better": b}.get(entry["verdict"]), "missing": entry.get("missing", 0)}
        cells[a, b] = {"value": entry["value"], "low": low, "high": high, "bounds": [lowest, highest], **shared}
        cells[b, a] = {
            "value": 1 - entry["value"], "low": 1 - high, "high": 1 - low, "bounds": [1 - highest, 1 - lowest], **shared
        }  # fmt: skip
    if not cells:
        return []
    return [{"name": row, "cells": [cells.get((row, column)) for column in checkpoints]} for row in checkpoints]


def _arrange_win_rates(entries: Sequence[PrincipleWinRate], principles: Sequence[str]) -> dict[str, Any]:
    """A row a principle, in the constitution's order, and a column a pair of checkpoints."""
    pairs = list(dict.fromkeys((entry["a"], entry["b"]) for entry in entries))
    cells = {(entry["principle"], entry["a"], entry["b"]): entry for entry in entries}
    asked = {entry["principle"] for entry in entries}
    rows = [
        {"name": principle, "cells": [cells.get((principle, *pair)) for pair in pairs]}
        for principle in principles
        if principle in asked
    ]
    return {"pairs": pairs, "rows": rows}


def _arrange_explained(explained: Explanation, principles: Sequence[str]) -> dict[str, Any]:
    """What the principles did, as two tables: a row a principle, in the constitution's order."""
    names = [principle for principle in principles if principle in explained["principles"]]
    correlation, without = explained["correlation"], explained["without"]
    return {
        "names": names,
        "pairs": explained["pairs"],
        "rows": [{"name": name, "without": without[name]} | explained["principles"][name] for name in names],
        "matrix": [{"name": row, "cells": [correlation[row][column] for column in names]} for row in names],
        "remarks": [
            {"principles": remark["principles"], "text": text, "correlation": remark["correlation"]}
            for text, remarks in (
                ("say nearly the same", explained["redundant"]),
                ("contradict each other", explained["conflicting"]),
            )
            for remark in remarks
        ],
        "turned": [{"name": name} | example for name in names for example in without[name]["examples"]],
    }


def _arrange_behaviours(
    behaviours: Mapping[str, Mapping[str, RateFigure]], checkpoints: Sequence[str]
) -> list[dict[str, Any]]:
    """A row a detector, a column a checkpoint."""
    detectors = dict.fromkeys(detector for checkpoint in checkpoints for detector in behaviours[checkpoint])
    return [
        {
            "name": detector.replace("_", " "),
            "amount": detector in AMOUNTS,
            "cells": [behaviours[checkpoint].get(detector) for checkpoint in checkpoints],
        }
        for detector in detectors
    ]


def _arrange_example(example: Example) -> dict[str, Any]:
    """An example with its votes as a table: a row a principle, a column a pair."""
    votes = [{**vote, "by_principle": {part["id"]: part for part in vote["principles"]}} for vote in example["votes"]]
    principles = list(dict.fromkeys(part["id"] for vote in example["votes"] for part in vote["principles"]))
    kinds = [tag for tag in example["tags"] if tag != HELD_OUT and not tag.startswith(TOPIC)]
    return {**example, "votes": votes, "principles": principles, "kinds": kinds}


def percent(value: float, digits: int = 1) -> str:
    """A share in per cent, `12.5`; adding 0.0 keeps a negative zero from getting a sign."""
    return f"{100 * value + 0.0:.{digits}f}"


def position(value: float) -> str:
    """The position of a share on a scale, as an SVG coordinate in per cent."""
    return f"{100 * min(max(value, 0.0), 1.0):.2f}%"


def _versions() -> dict[str, str]:
    """Package to its version."""
    packages = ("torch", "transformers", "numpy", "scipy")
    return {"cai": cai.__version__, "python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "printable": printable, "percent": percent, "position": position}
    environment.globals["colours"] = COLOURS
    return environment
