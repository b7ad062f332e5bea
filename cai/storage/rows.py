"""The rows that stages exchange: one JSON object a line, with ids that are hashes of the row's content.

Rows are plain dictionaries with fixed keys, so that 100,000 of them load in a second and any tool can read them. Later
stages select rows by tags: `red_team` or `helpful`, `held_out` for prompts that no training stage may learn from, and
`topic:<name>` for prompts about the same topic, by which intervals are clustered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from cai.text.errors import BadInput, TooLong
from cai.text.left_out import FailureKind

HELD_OUT = "held_out"
"""Tag of prompts that evaluations use and training stages leave out."""

TOPIC = "topic:"
"""Prefix of the tag that names a prompt's topic."""


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: str


class Prompt(TypedDict):
    id: str
    messages: list[Message]
    tags: list[str]
    source: str


class Sample(TypedDict):
    """One response to one prompt. `prompt` is the conversation; its last message is the user's."""

    id: str
    prompt_id: str
    prompt: list[Message]
    tags: list[str]
    response: str
    reasoning: NotRequired[str]
    """The text that a thinking model wrote before its response."""
    finish_reason: Literal["stop", "length"]
    n_tokens: int
    model: str
    seed: int


class Round(TypedDict):
    """One critique and the revision by it. `outcome` says whether training may use `revision`."""

    principle: str
    critique: str
    revision: str
    outcome: Literal["revised", "unchanged", "refused", "preamble-stripped"]


class Revision(Sample):
    """A sample whose `response` is its last usable revision, or `original` where there is none."""

    original: str
    rounds: list[Round]


class ScoredSample(Sample):
    """The best of several responses to one prompt. `of` of them had a reward; `mean_reward` is the mean of these."""

    reward: float
    rewards: dict[str, float]
    """The unweighted score of each source of rewards."""
    mean_reward: float
    of: int


class Candidate(TypedDict):
    """One side of a pair."""

    id: str
    text: str
    model: str


class Rationale(TypedDict):
    """Reasons that a judge wrote before its verdict, and its log-odds (nats) that *a* is better."""

    text: str
    log_odds: float


class PrincipleVote(TypedDict):
    """One principle's verdict in one order. `log_odds` (nats) are those that *a* is better, in both orders.

    A judge that rates has no order and votes in points: `scores` of *a* and *b*, and `log_odds` their difference.
    """

    principle: str
    order: Literal["ab", "ba"]
    log_odds: float
    option_probability: float
    """Sum of the probabilities of the options."""
    rationales: NotRequired[list[Rationale]]
    scores: NotRequired[list[float]]


class Pair(TypedDict):
    """A pair of responses to one prompt, to be judged."""

    id: str
    prompt_id: str
    prompt: list[Message]
    tags: list[str]
    a: Candidate
    b: Candidate
    human: NotRequired[float]
    """Probability that *a* is better according to the people who labelled the pair, if any; judges never see it."""


class Vote(Pair):
    """All verdicts on one pair."""

    votes: list[PrincipleVote]
    judge: str
    constitution: str
    method: NotRequired[str]
    """The judge's method where it is not pairwise."""
    scale: NotRequired[int]
    """The highest rating of a judge that rates; the lowest is 1."""


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


NATS = "nats"
"""Unit of the votes of every judge but one that rates."""


def vote_unit(method: str | None, scale: int | None) -> str:
    """The unit of a judge's votes; `scale` is the highest rating. Points of two scales are two units."""
    return f"points from 1 to {scale}" if method == "rating" else NATS


def stable_id(*parts: object) -> str:
    """16 hexadecimal digits that depend on `parts` alone: the same on every machine and in every run."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]


def stable_seed(*parts: object) -> int:
    """A seed below 2**63 that depends on `parts` alone: an item's samples do not depend on the order of work."""
    return int.from_bytes(hashlib.sha256(canonical_json(parts).encode()).digest()[:8], "big") >> 1


_CANONICAL = json.JSONEncoder(
    sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False
)


def canonical_json(value: object) -> str:
    """The JSON of a value that is hashed and written: sorted keys, no spaces. Raises ValueError for NaN."""
    return _CANONICAL.encode(value)


def read_rows(path: Path) -> list[Any]:
    """All rows of a JSONL file that this package has written."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def row_lines(rows: Iterable[Any]) -> Iterator[str]:
    """The line of each row in a JSONL file."""
    for row in rows:
        yield canonical_json(row) + "\n"


def topic_of(tags: Sequence[str], default: str) -> str:
    """The topic that a prompt's tags name, by which figures are clustered; else `default`, usually the prompt's id."""
    return next((tag[len(TOPIC) :] for tag in tags if tag.startswith(TOPIC)), default)


@dataclass(frozen=True)
class Failure:
    """One item without a result, and the reason, in words that a user can act on."""

    id: str
    reason: str
    kind: FailureKind = "other"
    place: str = ""
    """Beginning of the reason that names the item, and not why it failed."""

    @property
    def cause(self) -> str:
        """The reason without the place."""
        return self.reason.removeprefix(self.place)

    def at(self, place: str, id: str | None = None) -> Failure:
        """The failure as that of item `id`, or of its own, with `place` before its reason."""
        return replace(
            self, id=self.id if id is None else id, reason=f"{place}: {self.reason}", place=f"{place}: {self.place}"
        )

    @classmethod
    def of_error(cls, id: str, error: BadInput) -> Failure:
        """The failure of an item that a model's tokenisation refuses."""
        return cls(id, str(error), "too_long" if isinstance(error, TooLong) else "other")

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Failure:
        """A failure of `failures.jsonl`, also of an earlier version, which has neither kind nor place."""
        names = [field.name for field in dataclass_fields(cls)]
        return cls(**{name: fields[name] for name in names if name in fields})


def is_held_out(row: Mapping[str, Any]) -> bool:
    """Whether the row's prompt is for evaluation only."""
    return HELD_OUT in row["tags"]


def held_out_rank(prompt_id: str) -> int:
    """A number below 2**63 that orders prompts where a share of them is held out: those with the lowest numbers are."""
    return stable_seed("hold_out", prompt_id)
