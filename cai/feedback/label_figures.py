"""What preferences look like before anything is trained on them: how sure, how long, which behaviours win, how true.

Truth is known for prompts of the embedded world alone, whose oracle scores a response. Labels are measured on held-out
prompts where there are any. A pair whose two responses the oracle scores alike is a tie and says nothing about labels;
one with a response that it cannot read is counted as unclear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from cai.behaviours import DETECTORS, n_words
from cai.feedback.labels import Floats
from cai.records import HELD_OUT, TOPIC, Message, Preference, topic_of
from cai.statistics import rate

LOOKED_AT = 1000
"""Pairs that the text detectors read, evenly spread: they take longer than everything else here."""


def figures(rows: Sequence[Preference], principles: Sequence[str], votes: Floats) -> dict[str, Any]:
    """Everything below. `votes`: log-odds towards the chosen response, (rows, principles), NaN where there is none."""
    p = np.array([row["p_chosen"] for row in rows])
    gold = np.array([gold_margin(row) for row in rows])
    held_out = np.array([HELD_OUT in row["tags"] for row in rows])
    measured = held_out if held_out.any() else np.ones(len(rows), dtype=bool)
    decided = measured & ~np.isnan(gold) & (gold != 0)
    found: dict[str, Any] = {
        "pairs": len(rows),
        "mean_confidence": float(p.mean()),
        "undecided": int((p == 0.5).sum()),
        "longer_wins": longer_wins(rows),
        "behaviours": behaviours(rows),
        "principles": by_principle(principles, votes, np.where(decided, gold, np.nan)),
    }
    if not np.isnan(gold).all():
        # An even label has said nothing, so it is not right.
        right = (gold > 0) & (p > 0.5)
        clusters = [topic_of(row["tags"], row["prompt_id"]) for row in rows]
        found["accuracy"] = rate(
            right[decided].astype(float).tolist(), [clusters[index] for index in np.flatnonzero(decided)]
        ).as_json()
        found["measured_on"] = "held_out" if held_out.any() else "all"
        found["ties"] = int((measured & (gold == 0)).sum())
        found["unclear"] = int((measured & np.isnan(gold)).sum())
        found["acts"] = acts(rows)
    return found


def gold_margin(row: Preference) -> float:
    """The oracle's score of the chosen response less that of the rejected one; NaN where it has none."""
    if not any(tag.startswith(TOPIC) for tag in row["tags"]):
        return float("nan")
    from cai.micro.oracle import gold_score

    chosen, rejected = (gold_score(row["prompt"], text(row[side])) for side in ("chosen", "rejected"))
    return float("nan") if chosen is None or rejected is None else chosen - rejected


def longer_wins(rows: Sequence[Preference]) -> dict[str, Any] | None:
    """Share of pairs of different length, in words, whose longer response is chosen; None without such pairs."""
    words = np.array([(n_words(text(row["chosen"])), n_words(text(row["rejected"]))) for row in rows])
    different = np.flatnonzero(words[:, 0] != words[:, 1]).tolist()
    clusters = [topic_of(rows[index]["tags"], rows[index]["prompt_id"]) for index in different]
    longer = (words[different, 0] > words[different, 1]).astype(float)
    return rate(longer.tolist(), clusters).as_json() if len(different) else None


def behaviours(rows: Sequence[Preference]) -> dict[str, dict[str, float]]:
    """Mean of every text detector over chosen and over rejected responses."""
    step = -(-len(rows) // LOOKED_AT)
    some = rows[::step]
    return {
        name: {
            side: float(np.mean([detector(text(row[side])) for row in some]))  # type: ignore[literal-required]
            for side in ("chosen", "rejected")
        }
        for name, detector in DETECTORS.items()
    }


def by_principle(principles: Sequence[str], votes: Floats, gold: Floats) -> dict[str, dict[str, Any]]:
    """How often each principle voted, how strongly (nats), how often with the label, and with the truth.

    `agreement_with_gold` is how often the principle favours the response that the oracle scores higher by everything it
    looks at. It is no accuracy: a principle about one thing may rightly favour the other response.
    """
    found: dict[str, dict[str, Any]] = {}
    for column, id in sorted(enumerate(principles), key=lambda pair: pair[1]):
        vote = votes[:, column]
        voted = ~np.isnan(vote)
        if not voted.any():
            continue
        known = voted & ~np.isnan(gold)
        found[id] = {
            "pairs": int(voted.sum()),
            "mean_strength": float(np.abs(vote[voted]).mean()),
            "agreement": float((vote[voted] > 0).mean()),
        }
        if known.any():
            found[id]["agreement_with_gold"] = float((vote[known] * gold[known] > 0).mean())
    return found


def acts(rows: Sequence[Preference]) -> dict[str, dict[str, int]]:
    """What wins against what in the embedded world, by class of request: {"harmful": {"refuse over comply": 12}}."""
    from cai.micro.oracle import read

    table: dict[str, Counter[str]] = {}
    for row in rows:
        chosen, rejected = (read(row["prompt"], text(row[side])) for side in ("chosen", "rejected"))
        if chosen.kind is not None:
            counts = table.setdefault(chosen.kind, Counter())
            counts[f"{chosen.act or 'unclear'} over {rejected.act or 'unclear'}"] += 1
    return {kind: dict(counts.most_common()) for kind, counts in sorted(table.items())}


def text(side: list[Message]) -> str:
    """The response of one side of a preference."""
    return side[-1]["content"]
