"""A comparison as one HTML page that stands alone: no script, nothing from elsewhere, light and dark, wide and narrow.

Everything a model or a user wrote is text here and stays text: Jinja escapes it, the page's own policy forbids scripts
and connections, and characters that cannot be seen or turn the direction of writing are spelled out. Places on scales
are computed here; the template only puts them down.
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
from cai.report.figures import METRICS, UNBOUNDED
from cai.report.picture import COLOURS
from cai.storage.rows import HELD_OUT, TOPIC
from cai.text.formatting import printable

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

TEMPLATE = Path(__file__).parent / "page.html.jinja"
JOINERS = "\u200c\u200d"
"""Parts of ordinary words and emoji, which break without them."""


def page(comparison: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
    """The page for what the compare stage wrote to comparison.json and the examples chosen to go with it."""
    names = list(comparison["models"])
    return (
        _environment()
        .get_template(TEMPLATE.name)
        .render(
            comparison=comparison,
            names=names,
            colour={name: f"c{index % len(COLOURS)}" for index, name in enumerate(names)},
            sets=[_set(name, part, names, list(comparison["principles"])) for name, part in comparison["sets"].items()],
            examples=[_example(each) for each in examples],
            versions=_versions(),
            metrics=METRICS,
        )
    )


def visible(text: object) -> Markup:
    """`text` escaped, each character that does not show, or turns the others round, as its code point in a box."""
    from markupsafe import Markup, escape

    parts: list[str] = []
    for character in str(text):
        if _hidden(character):
            parts.append(f'<span class="odd">U+{ord(character):04X}</span>')
        else:
            parts.append(str(escape(character)))
    return Markup("".join(parts))


def _hidden(character: str) -> bool:
    if character in "\n\t" or character in JOINERS:
        return False
    return unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def _set(name: str, part: Mapping[str, Any], names: Sequence[str], order: Sequence[str]) -> dict[str, Any]:
    """One prompt set, its figures arranged as the page shows them."""
    return {
        "name": name,
        "prompts": part["prompts"],
        "topics": part["topics"],
        "metrics": [_metric(metric, part, names) for metric in METRICS if _anywhere(part["checkpoints"], metric)],
        "matrix": _matrix(part["head_to_head"], names),
        "head_to_head": part["head_to_head"],
        "principles": _by_principle(part["principles"], order),
        "explained": part["explained"] and _explained(part["explained"], order),
        "behaviours": _behaviours(part["behaviours"], names),
        "tags": part["tags"],
    }


def _anywhere(checkpoints: Mapping[str, Any], metric: str) -> bool:
    return any(metric in rates for rates in checkpoints.values())


def _metric(metric: str, part: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    lines = []
    for name in names:
        rate = part["checkpoints"][name].get(metric)
        difference = part["differences"].get(name, {}).get(metric)
        lines.append({"name": name, "rate": rate, "difference": difference, "word": _word(metric, difference)})
    return {"key": metric, "lines": lines} | METRICS[metric]._asdict()


def _word(metric: str, difference: Mapping[str, Any] | None) -> dict[str, str] | None:
    """What the data say about a checkpoint and the baseline: a word and whether it is good news."""
    if difference is None:
        return None
    word, better = difference["verdict"], METRICS[metric].better
    if word == "not distinguishable" or better == "neither":
        return {"text": word, "kind": "even"}
    return {"text": word, "kind": "good" if (word == "higher") == (better == "high") else "bad"}


def _matrix(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a table: the share of comparisons that the row's checkpoint won against the column's."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        a, b = entry["a"], entry["b"]
        if entry["value"] is None:
            continue
        winner = {"a better": a, "b better": b}.get(entry["verdict"])
        low, high = entry["interval"]
        worst = entry.get("bounds", [0.0, 1.0])
        both = {"winner": winner, "missing": entry.get("missing", 0)}
        cells[a, b] = {"value": entry["value"], "low": low, "high": high, "bounds": worst} | both
        turned = [1 - worst[1], 1 - worst[0]]
        cells[b, a] = {"value": 1 - entry["value"], "low": 1 - high, "high": 1 - low, "bounds": turned} | both
    return [{"name": row, "cells": [cells.get((row, column)) for column in names]} for row in names] if cells else []


def _by_principle(entries: Sequence[Mapping[str, Any]], order: Sequence[str]) -> dict[str, Any]:
    """Win rates by principle: a row a principle, in the constitution's order, a column a pair."""
    pairs = list(dict.fromkeys((entry["a"], entry["b"]) for entry in entries))
    found: dict[str, dict[tuple[str, str], Any]] = {}
    for entry in entries:
        found.setdefault(entry["principle"], {})[entry["a"], entry["b"]] = entry
    return {
        "pairs": pairs,
        "rows": [{"name": name, "cells": [found[name].get(pair) for pair in pairs]} for name in order if name in found],
    }


def _explained(found: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """What the principles did, arranged as two tables: a row a principle, in the constitution's order."""
    names = [name for name in order if name in found["principles"]]
    return {
        "names": names,
        "pairs": found["pairs"],
        "rows": [{"name": name, "without": found["without"][name]} | found["principles"][name] for name in names],
        "matrix": [{"name": row, "cells": [found["correlation"][row][column] for column in names]} for row in names],
        "remarks": [
            {"one": one, "other": other, "word": word, "correlation": each["correlation"]}
            for word, kind in (("say nearly the same", "redundant"), ("contradict each other", "conflicting"))
            for each in found[kind]
            for one, other in [each["principles"]]
        ],
        "turned": [{"name": name} | each for name in names for each in found["without"][name]["examples"]],
    }


def _behaviours(found: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    detectors = list(dict.fromkeys(detector for name in names for detector in found[name]))
    return [
        {
            "name": detector.replace("_", " "),
            "amount": detector in UNBOUNDED,
            "cells": [found[name].get(detector) for name in names],
        }
        for detector in detectors
    ]


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    """An example with its votes arranged as a table: a row a principle, a column a pair."""
    votes = [vote | {"by_id": {each["id"]: each for each in vote["principles"]}} for vote in example["votes"]]
    principles = list(dict.fromkeys(name for vote in votes for name in vote["by_id"]))
    kinds = [tag for tag in example["tags"] if tag != HELD_OUT and not tag.startswith(TOPIC)]
    return {**example, "votes": votes, "principles": principles, "kinds": kinds}


def percent(value: float, digits: int = 1) -> str:
    """`12.5`, without a sign for nought."""
    return f"{100 * value + 0.0:.{digits}f}"


def place(value: float) -> str:
    """Where a share lies along a scale, in per cent for SVG."""
    return f"{100 * min(max(value, 0.0), 1.0):.2f}%"


def _versions() -> dict[str, str]:
    found = {"cai": cai.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "scipy"):
        found[package] = importlib.metadata.version(package)
    return found


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
    environment.filters |= {"visible": visible, "printable": printable, "percent": percent, "place": place}
    environment.globals["colours"] = COLOURS
    return environment
