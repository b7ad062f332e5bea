"""Which prompts the page shows: the clearest losses, wins and faults first, the others sampled by seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, TypedDict

from cai.maths.behaviours import DETECTORS
from cai.maths.vote_aggregation import mean_over_orders
from cai.report.figures import (
    AMOUNTS,
    ComparisonRows,
    ResponseKey,
    VerdictRule,
    log_odds_by_principle,
    pair_log_odds,
)
from cai.storage.rows import Message

NOTED_BEHAVIOURS = tuple(name for name in DETECTORS if name not in AMOUNTS and name != "distinct")
"""Detectors that say yes or no about one response."""


class ExampleResponse(TypedDict):
    """A checkpoint's response; without `text` where it failed."""

    name: str
    text: str | None
    reasoning: str | None
    notes: list[str]


class ExamplePrincipleVote(TypedDict):
    id: str
    log_odds: float
    """Nats by which a is better, the mean of both orders."""
    flipped: bool
    """Whether the two orders of showing disagree."""


class ExampleVote(TypedDict):
    """The judge's verdict on two checkpoints' responses; `log_odds` is None for equal texts."""

    a: str
    b: str
    log_odds: float | None
    principles: list[ExamplePrincipleVote]


class Example(TypedDict):
    """One prompt as the page shows it."""

    prompt_id: str
    tags: list[str]
    messages: list[Message]
    responses: list[ExampleResponse]
    votes: list[ExampleVote]
    why: str


def choose_examples(
    rows: ComparisonRows, checkpoints: Sequence[str], rule: VerdictRule, count: int, seed: int
) -> list[Example]:
    """Up to `count` prompts, each once: why it is shown, the conversation, every checkpoint's response, the votes."""
    examples: dict[str, Example] = {}
    for why, (prompt_id, number) in _ranked_responses(rows, checkpoints, rule, count, seed):
        if len(examples) == count:
            break
        if prompt_id not in examples:
            examples[prompt_id] = _example(rows, checkpoints, rule, (prompt_id, number), why)
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


def _example(
    rows: ComparisonRows, checkpoints: Sequence[str], rule: VerdictRule, key: ResponseKey, why: str
) -> Example:
    prompt = rows.prompts[key[0]]
    pairs = [(a, b) for b, a in combinations(checkpoints, 2)]
    return {
        "prompt_id": key[0],
        "tags": prompt["tags"],
        "messages": prompt["messages"],
        "responses": [_example_response(rows, checkpoint, key) for checkpoint in checkpoints],
        "votes": [_example_vote(pair, rows.votes[pair, *key], rule) for pair in pairs if (pair, *key) in rows.votes],
        "why": why,
    }


def _example_response(rows: ComparisonRows, checkpoint: str, key: ResponseKey) -> ExampleResponse:
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


def _example_vote(pair: tuple[str, str], vote: Mapping[str, Any], rule: VerdictRule) -> ExampleVote:
    return {
        "a": pair[0],
        "b": pair[1],
        "log_odds": pair_log_odds(vote, rule.weights),
        "principles": [
            {"id": principle, "log_odds": mean_over_orders(ab, ba), "flipped": ab * ba < 0}
            for principle, (ab, ba) in log_odds_by_principle(vote).items()
        ],
    }
