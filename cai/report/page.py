"""A comparison as one self-contained HTML page, without scripts or external resources, for any screen, light or dark.

Everything that a model or a user wrote stays text: Jinja escapes it, the page's content security policy forbids scripts
and connections, and characters that are invisible or change the direction of text are spelled out. This module arranges
the figures in tables and chooses the prompts that are shown as examples: the clearest losses, wins and faults first,
the others sampled by seed. The template only writes them down.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import random
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cai
from cai.feedback.explain import MIN_COMMON_PAIRS, Explanation, correlation_remarks
from cai.maths.behaviours import DETECTORS
from cai.maths.statistics import RateFigure
from cai.maths.vote_aggregation import mean_over_orders
from cai.report.figure_types import Comparison, HeadToHead, PrincipleRate, PromptSetFigures, RateDifference
from cai.report.figures import (
    AMOUNTS,
    METRICS,
    ComparisonRows,
    ResponseKey,
    VerdictRule,
    log_odds_by_principle,
    pair_log_odds,
)
from cai.report.pictures import COLOURS
from cai.storage.rows import HELD_OUT, TOPIC
from cai.text.formatting import printable

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup


TEMPLATE = Path(__file__).parent / "page.html.jinja"
JOINERS = "\u200c\u200d"
"""Invisible characters that stay as they are: words of some languages and emoji need them."""
NOTED_BEHAVIOURS = tuple(name for name in DETECTORS if name not in AMOUNTS and name != "distinct")
"""Detectors that say yes or no about one response."""


def render_page(comparison: Comparison, examples: Sequence[Mapping[str, Any]]) -> str:
    """The page for the contents of comparison.json, and the examples of `choose_examples`."""
    checkpoints = list(comparison["models"])
    principles = list(comparison["principles"])
    sets = [_arrange_set(name, figures, checkpoints, principles) for name, figures in comparison["sets"].items()]
    return _page_template().render(
        comparison=comparison,
        names=checkpoints,
        colour={checkpoint: f"c{index % len(COLOURS)}" for index, checkpoint in enumerate(checkpoints)},
        sets=sets,
        examples=examples,
        versions=_versions(),
    )


def visible(text: object) -> Markup:
    """`text` escaped; characters that do not show or change the direction of text become their code points in boxes."""
    from markupsafe import Markup, escape

    return Markup("").join(
        Markup(f'<span class="odd">U+{ord(character):04X}</span>') if _is_hidden(character) else escape(character)
        for character in str(text)
    )


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


def _arrange_verdict(metric: str, difference: RateDifference | None) -> dict[str, str] | None:
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


def _arrange_win_rates(entries: Sequence[PrincipleRate], principles: Sequence[str]) -> dict[str, Any]:
    """A row a principle, in the constitution's order, and a column a pair of checkpoints."""
    pairs = list(dict.fromkeys((entry["a"], entry["b"]) for entry in entries))
    cells = {(entry["principle"], entry["a"], entry["b"]): entry for entry in entries}
    asked = {entry["principle"] for entry in entries}
    names = [principle for principle in principles if principle in asked]
    return {
        "pairs": pairs,
        "rows": [{"name": name, "cells": [cells.get((name, *pair)) for pair in pairs]} for name in names],
    }


def _arrange_explained(explained: Explanation, principles: Sequence[str]) -> dict[str, Any]:
    """What the principles did, as two tables: a row a principle, in the constitution's order."""
    names = [principle for principle in principles if principle in explained["principles"]]
    without = explained["without"]
    correlations = {frozenset(entry["principles"]): entry for entry in explained["correlations"]}
    return {
        "names": names,
        "pairs": explained["pairs"],
        "rows": [{"name": name, "without": without[name]} | explained["principles"][name] for name in names],
        "matrix": [
            {"name": row, "cells": [correlations.get(frozenset((row, column))) for column in names]} for row in names
        ],
        "correlations_left_out": explained["correlations_left_out"],
        "min_common_pairs": MIN_COMMON_PAIRS,
        "remarks": [{"text": text, **correlated} for text, correlated in correlation_remarks(explained)],
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


def choose_examples(
    rows: ComparisonRows, checkpoints: Sequence[str], rule: VerdictRule, count: int, seed: int
) -> list[dict[str, Any]]:
    """Up to `count` prompts, each once, as the page shows them.

    Each has `why` it is shown, the prompt's `messages` and `kinds`, every checkpoint's response in `responses`, without
    text where it failed, and the verdicts in `votes`, by the ids in `principles`. Log-odds are nats that a is better,
    the mean of both orders; a pair of equal texts has none.
    """
    examples: dict[str, dict[str, Any]] = {}
    for why, (prompt_id, number) in _ranked_responses(rows, checkpoints, rule, count, seed):
        if len(examples) == count:
            break
        if prompt_id not in examples:
            examples[prompt_id] = {"why": why} | _example(rows, checkpoints, rule, (prompt_id, number))
    return list(examples.values())


def _ranked_responses(
    rows: ComparisonRows, checkpoints: Sequence[str], rule: VerdictRule, count: int, seed: int
) -> Iterator[tuple[str, ResponseKey]]:
    """(why, response): a quarter losses of the last checkpoint, a sixth wins, a sixth faults, then any."""
    last, baseline = checkpoints[-1], checkpoints[0]
    leads = []
    for (pair, prompt_id, number), vote in rows.votes.items():
        log_odds = pair_log_odds(vote, rule.weights)
        if pair == (last, baseline) and log_odds is not None:
            leads.append((log_odds, (prompt_id, number)))
    leads.sort()
    losses = [key for log_odds, key in leads if log_odds < -rule.tie_below][: count // 4]
    wins = [key for log_odds, key in reversed(leads) if log_odds > rule.tie_below][: count // 6]
    yield from ((f"a clear loss of {last} to {baseline}", key) for key in losses)
    yield from ((f"a clear win of {last} over {baseline}", key) for key in wins)
    keys = sorted({key[1:] for key in rows.samples})
    random.Random(seed).shuffle(keys)
    faults = [
        (f"{checkpoint}: {fault}", key)
        for checkpoint in reversed(checkpoints[1:] or checkpoints)
        for key in keys
        if (row := rows.samples.get((checkpoint, *key)))
        for fault in _faults(rows, row)
    ]
    yield from faults[: count // 6]
    yield from (("drawn at random", key) for key in keys)


def _faults(rows: ComparisonRows, sample: Mapping[str, Any]) -> list[str]:
    """What is plainly wrong with a response, by the oracle where it has read the response."""
    reading = rows.oracle_readings.get(sample["id"])
    if reading is not None and reading.unclear:
        return ["unclear"]
    if reading is not None and reading.kind == "harmful" and reading.act == "comply":
        return ["complied with harm"]
    return [detector for detector in ("looping", "truncated") if DETECTORS[detector](sample["response"])]


def _example(rows: ComparisonRows, checkpoints: Sequence[str], rule: VerdictRule, key: ResponseKey) -> dict[str, Any]:
    prompt = rows.prompts[key[0]]
    votes: list[dict[str, Any]] = []
    for b, a in combinations(checkpoints, 2):
        if vote := rows.votes.get(((a, b), *key)):
            by_principle = {
                principle: {"log_odds": mean_over_orders(ab, ba), "flipped": ab * ba < 0}
                for principle, (ab, ba) in log_odds_by_principle(vote).items()
            }
            log_odds = pair_log_odds(vote, rule.weights)
            votes.append({"a": a, "b": b, "log_odds": log_odds, "by_principle": by_principle})
    return {
        "kinds": [tag for tag in prompt["tags"] if tag != HELD_OUT and not tag.startswith(TOPIC)],
        "messages": prompt["messages"],
        "responses": [_example_response(rows, checkpoint, key) for checkpoint in checkpoints],
        "votes": votes,
        "principles": list(dict.fromkeys(principle for vote in votes for principle in vote["by_principle"])),
    }


def _example_response(rows: ComparisonRows, checkpoint: str, key: ResponseKey) -> dict[str, Any]:
    sample = rows.samples.get((checkpoint, *key))
    if sample is None:
        return {"name": checkpoint, "text": None, "reasoning": None, "notes": ["failed"]}
    notes = []
    reading = rows.oracle_readings.get(sample["id"])
    if reading is not None:
        notes += [f"unclear: {reading.why}"] if reading.unclear else [str(reading.act), *sorted(reading.attributes)]
        notes += [] if reading.on_topic else ["off topic"]
    else:
        notes += [name.replace("_", " ") for name in NOTED_BEHAVIOURS if DETECTORS[name](sample["response"])]
    if sample["finish_reason"] == "length":
        notes.append("cut off at the limit")
    return {"name": checkpoint, "text": sample["response"], "reasoning": sample.get("reasoning"), "notes": notes}


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
def _page_template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(TEMPLATE.parent)
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters |= {"visible": visible, "printable": printable, "percent": percent, "position": position}
    jinja.globals["colours"] = COLOURS
    return jinja.get_template(TEMPLATE.name)
