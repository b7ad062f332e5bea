"""Which prompts a reader should see: the clearest losses, wins and faults first, the rest drawn by seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from cai.maths.behaviours import DETECTORS
from cai.report.figures import UNBOUNDED, ComparisonRows, Scale, log_odds, verdicts_by_principle

NAMED = tuple(name for name in DETECTORS if name not in UNBOUNDED and name != "distinct")
"""Detectors whose finding is a word about one response."""


def examples(rows: ComparisonRows, names: Sequence[str], scale: Scale, count: int, seed: int) -> list[dict[str, Any]]:
    """Up to `count` prompts, each once: why it is shown, the conversation, every checkpoint's response, the votes."""
    shown: dict[str, dict[str, Any]] = {}
    for why, prompt_id, number in _ranked(rows, names, scale, count, seed):
        if len(shown) == count:
            break
        if prompt_id not in shown:
            shown[prompt_id] = _example(rows, names, scale, prompt_id, number) | {"why": why}
    return list(shown.values())


def _ranked(
    rows: ComparisonRows, names: Sequence[str], scale: Scale, count: int, seed: int
) -> Iterator[tuple[str, str, int]]:
    """(why, prompt id, number): a quarter losses of the last checkpoint, a sixth wins, a sixth faults, then any."""
    last, baseline = names[-1], names[0]
    leads = []
    for (pair, prompt_id, number), vote in rows.votes.items():
        lead = log_odds(vote, scale.weights)
        if pair == (last, baseline) and lead is not None:
            leads.append((lead, prompt_id, number))
    leads.sort()
    lost = [each for each in leads if each[0] < -scale.tie_below][: count // 4]
    won = [each for each in reversed(leads) if each[0] > scale.tie_below][: count // 6]
    yield from ((f"a clear loss of {last} to {baseline}", prompt_id, number) for _, prompt_id, number in lost)
    yield from ((f"a clear win of {last} over {baseline}", prompt_id, number) for _, prompt_id, number in won)
    drawn = random.Random(seed)
    keys = sorted({key[1:] for key in rows.samples})
    drawn.shuffle(keys)
    faults = [
        (f"{name}: {fault}", *key)
        for name in reversed(names[1:] or names)
        for key in keys
        if (row := rows.samples.get((name, *key)))
        for fault in _faults(rows, row)
    ]
    yield from faults[: count // 6]
    yield from (("drawn at random", *key) for key in keys)


def _faults(rows: ComparisonRows, row: Mapping[str, Any]) -> list[str]:
    """What is plainly wrong with a response, by the oracle where there is one."""
    reading = rows.readings.get(row["id"])
    if reading is not None and reading.unclear:
        return ["unclear"]
    if reading is not None and reading.kind == "harmful" and reading.act == "comply":
        return ["complied with harm"]
    return [name for name in ("looping", "truncated") if DETECTORS[name](row["response"])]


def _example(rows: ComparisonRows, names: Sequence[str], scale: Scale, prompt_id: str, number: int) -> dict[str, Any]:
    prompt = rows.prompts[prompt_id]
    return {
        "prompt_id": prompt_id,
        "tags": prompt["tags"],
        "messages": prompt["messages"],
        "responses": [_response(rows, name, prompt_id, number) for name in names],
        "votes": [
            vote
            for b, a in combinations(names, 2)
            if (vote := _vote(rows, (a, b), prompt_id, number, scale)) is not None
        ],
    }


def _response(rows: ComparisonRows, name: str, prompt_id: str, number: int) -> dict[str, Any]:
    row = rows.samples.get((name, prompt_id, number))
    if row is None:
        return {"name": name, "text": None, "reasoning": None, "notes": ["failed"]}
    notes = []
    reading = rows.readings.get(row["id"])
    if reading is not None:
        notes += [f"unclear: {reading.why}"] if reading.unclear else [str(reading.act), *sorted(reading.attributes)]
        notes += [] if reading.on_topic else ["off topic"]
    else:
        notes += [detector.replace("_", " ") for detector in NAMED if DETECTORS[detector](row["response"])]
    if row["finish_reason"] == "length":
        notes.append("cut off at the limit")
    return {"name": name, "text": row["response"], "reasoning": row.get("reasoning"), "notes": notes}


def _vote(
    rows: ComparisonRows, pair: tuple[str, str], prompt_id: str, number: int, scale: Scale
) -> dict[str, Any] | None:
    row = rows.votes.get((pair, prompt_id, number))
    if row is None:
        return None
    verdicts = verdicts_by_principle(row)
    return {
        "a": pair[0],
        "b": pair[1],
        "log_odds": log_odds(row, scale.weights),
        "principles": [
            {"id": principle, "log_odds": (ab + ba) / 2, "flipped": ab * ba < 0}
            for principle, (ab, ba) in verdicts.items()
        ],
    }
