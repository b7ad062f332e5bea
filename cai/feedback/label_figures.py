"""What preferences look like before anything is trained on them: how sure, how long, which behaviours win, how true.

Truth is known for prompts of the embedded world alone, whose oracle scores a response. Labels are measured on held-out
prompts where there are any. A pair whose two responses the oracle scores alike is a tie and says nothing about labels;
one with a response that it cannot read is counted as unclear.

Preferences pass by once, on their way to the disk: of 100,000 only numbers are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cai.feedback.labels import Floats
from cai.feedback.votes import failed_pairs
from cai.maths.behaviours import DETECTORS, n_words
from cai.maths.statistics import rate
from cai.storage.rows import HELD_OUT, TOPIC, Message, Preference, topic_of

LOOKED_AT = 1000
"""Pairs that the text detectors read, evenly spread: they take longer than everything else here."""


@dataclass
class Seen:
    """What is kept of preferences that have passed by, a value for each: not the texts."""

    p_chosen: list[float] = field(default_factory=list)
    gold: list[float] = field(default_factory=list)
    """The oracle's score of the chosen response less that of the rejected one; NaN where it has none."""
    held_out: list[bool] = field(default_factory=list)
    clusters: list[str] = field(default_factory=list)
    n_words: list[tuple[int, int]] = field(default_factory=list)
    """Of the chosen and of the rejected response."""
    detected: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """What every text detector found, by side, in some of them."""
    acts: dict[str, Counter[str]] = field(default_factory=dict)
    """What wins against what in the embedded world, by class of request."""


def look(rows: Iterable[Preference], n: int) -> Seen:
    """Goes through `n` preferences once."""
    seen = Seen(detected={name: {"chosen": [], "rejected": []} for name in DETECTORS})
    step = -(-n // LOOKED_AT)
    for number, row in enumerate(rows):
        chosen, rejected = text(row["chosen"]), text(row["rejected"])
        of_world = any(tag.startswith(TOPIC) for tag in row["tags"])
        seen.p_chosen.append(row["p_chosen"])
        seen.held_out.append(HELD_OUT in row["tags"])
        seen.clusters.append(topic_of(row["tags"], row["prompt_id"]) if of_world else row["prompt_id"])
        seen.n_words.append((n_words(chosen), n_words(rejected)))
        seen.gold.append(_gold_margin(row, seen.acts) if of_world else np.nan)
        if number % step == 0:
            for name, detector in DETECTORS.items():
                seen.detected[name]["chosen"].append(float(detector(chosen)))
                seen.detected[name]["rejected"].append(float(detector(rejected)))
    return seen


def _gold_margin(row: Preference, acts: dict[str, Counter[str]]) -> float:
    """The oracle's margin, and its reading of both responses into `acts`."""
    from cai.micro.oracle import gold_score, read

    responses = text(row["chosen"]), text(row["rejected"])
    chosen, rejected = (read(row["prompt"], response) for response in responses)
    if chosen.kind is not None:
        acts.setdefault(chosen.kind, Counter())[f"{chosen.act or 'unclear'} over {rejected.act or 'unclear'}"] += 1
    better, worse = (gold_score(row["prompt"], response) for response in responses)
    return float("nan") if better is None or worse is None else better - worse


def figures(seen: Seen, principles: Sequence[str], votes: Floats, stages: Sequence[Path]) -> dict[str, Any]:
    """Everything below. `votes`: log-odds towards the chosen response, (rows, principles), NaN where there is none.

    What the judge of one of the `stages` failed on is within accuracy's bounds, whatever its label would be.
    """
    p, gold, held_out = np.array(seen.p_chosen), np.array(seen.gold), np.array(seen.held_out, dtype=bool)
    measured = held_out if held_out.any() else np.ones(len(p), dtype=bool)
    measured_on = "held_out" if held_out.any() else "all"
    decided = measured & ~np.isnan(gold) & (gold != 0)
    found: dict[str, Any] = {
        "pairs": len(p),
        "mean_confidence": float(p.mean()),
        "undecided": int((p == 0.5).sum()),
        "longer_wins": longer_wins(seen),
        "behaviours": {
            name: {side: float(np.mean(values)) for side, values in by_side.items()}
            for name, by_side in seen.detected.items()
        },
        "principles": by_principle(principles, votes, np.where(decided, gold, np.nan)),
    }
    if not np.isnan(gold).all():
        # An even label has said nothing, so it is not right.
        right = (gold > 0) & (p > 0.5)
        found["accuracy"] = rate(
            right[decided].astype(float).tolist(),
            [seen.clusters[index] for index in np.flatnonzero(decided)],
            missing=failed_pairs(stages, "oracle", measured_on),
        ).as_json()
        found["measured_on"] = measured_on
        found["ties"] = int((measured & (gold == 0)).sum())
        found["unclear"] = int((measured & np.isnan(gold)).sum())
        found["acts"] = {kind: dict(counts.most_common()) for kind, counts in sorted(seen.acts.items())}
    return found


def longer_wins(seen: Seen) -> dict[str, Any] | None:
    """Share of pairs of different length, in words, whose longer response is chosen; None without such pairs."""
    words = np.array(seen.n_words)
    different = np.flatnonzero(words[:, 0] != words[:, 1]).tolist()
    longer = (words[different, 0] > words[different, 1]).astype(float)
    return rate(longer.tolist(), [seen.clusters[index] for index in different]).as_json() if different else None


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


def text(side: list[Message]) -> str:
    """The response of one side of a preference."""
    return side[-1]["content"]
