"""The rows that stages exchange: one JSON object a line, with ids that are hashes of what the row is about.

Rows are plain dictionaries with known keys, so that 100,000 of them load in a second and any tool can read them. Tags
carry what later stages select by: `red_team` or `helpful`, `held_out` for prompts that no training stage may learn
from, and `topic:<name>` where several prompts ask about one thing and intervals must be clustered by it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

HELD_OUT = "held_out"
"""Tag of prompts that training stages leave out and evaluations use."""

TOPIC = "topic:"
"""Prefix of the tag that names what a prompt is about."""


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


class Prompt(TypedDict):
    id: str
    messages: list[Message]
    tags: list[str]
    source: str


class Sample(TypedDict):
    """One response to one prompt. `prompt` is the conversation, its last message the user's."""

    id: str
    prompt_id: str
    prompt: list[Message]
    tags: list[str]
    response: str
    reasoning: NotRequired[str]
    """What a thinking model wrote before its response."""
    finish_reason: Literal["stop", "length"]
    n_tokens: int
    model: str
    seed: int


class Round(TypedDict):
    """One critique and the revision it led to. `outcome` says whether `revision` may be learned from."""

    principle: str
    critique: str
    revision: str
    outcome: Literal["revised", "unchanged", "refused", "preamble-stripped"]


class Revision(Sample):
    """A sample whose `response` is its last usable revision; equal to `original` where no round gave one."""

    original: str
    rounds: list[Round]


class ScoredSample(Sample):
    """The best of several responses to one prompt. `of` is how many had a reward, `mean_reward` their mean."""

    reward: float
    rewards: dict[str, float]
    """Each source's score, unweighted."""
    mean_reward: float
    of: int


class Candidate(TypedDict):
    """One side of a pair."""

    id: str
    text: str
    model: str


class Rationale(TypedDict):
    """Reasons that a judge wrote, and the log-odds (nats) that *a* is better after them."""

    text: str
    log_odds: float


class PrincipleVote(TypedDict):
    """One principle's verdict in one order. `log_odds` (nats) is that *a* is better, whichever was shown first.

    A judge that rates has no order and votes in points: `scores` of *a* and *b*, `log_odds` their difference.
    """

    principle: str
    order: Literal["ab", "ba"]
    log_odds: float
    option_probability: float
    """Probability that the judge put on the options together."""
    rationales: NotRequired[list[Rationale]]
    scores: NotRequired[list[float]]


class Vote(TypedDict):
    """Every verdict on one pair of responses to one prompt."""

    id: str
    prompt_id: str
    prompt: list[Message]
    tags: list[str]
    a: Candidate
    b: Candidate
    votes: list[PrincipleVote]
    judge: str
    constitution: str
    human: NotRequired[float]
    """Probability that *a* is better by the people who labelled the pair, where any did; no judge sees it."""
    method: NotRequired[str]
    """How the judge was asked, where that was not pairwise."""


class Preference(TypedDict):
    """A labelled pair in TRL's conversational format: `prompt`, `chosen` and `rejected` are lists of messages.

    `p_chosen` is the label: the probability that `chosen` is the better one, at least 0.5.
    """

    id: str
    pair_id: str
    prompt_id: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    p_chosen: float
    log_odds: float
    source: Literal["ai", "human"]
    tags: list[str]
    judge: str
    constitution: str


def stable_id(*parts: object) -> str:
    """16 hex digits that depend on `parts` alone, the same on every machine and in every run."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]


def stable_seed(*parts: object) -> int:
    """A seed below 2**63 that depends on `parts` alone: randomness belongs to the item, not to when it is computed."""
    return int.from_bytes(hashlib.sha256(canonical_json(parts).encode()).digest()[:8], "big") >> 1


_CANONICAL = json.JSONEncoder(
    sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False
)


def canonical_json(value: object) -> str:
    """The one spelling of a value that is hashed and written: sorted keys, no spaces, no NaN."""
    return _CANONICAL.encode(value)


def read_rows(path: Path) -> list[Any]:
    """All rows of a JSONL file that this package wrote."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def row_lines(rows: Iterable[Any]) -> Iterator[str]:
    """Each row as the line that stands for it on disk."""
    for row in rows:
        yield canonical_json(row) + "\n"


def topic_of(tags: Sequence[str], default: str) -> str:
    """What a prompt is about: the cluster of its figures. `default`, usually the prompt's id, where no tag says."""
    return next((tag[len(TOPIC) :] for tag in tags if tag.startswith(TOPIC)), default)


@dataclass(frozen=True)
class Failure:
    """One request that has no answer, and why, in words a user can act on."""

    id: str
    reason: str


def is_held_out(row: Mapping[str, Any]) -> bool:
    """Whether the row's prompt is reserved for evaluation."""
    return HELD_OUT in row["tags"]
