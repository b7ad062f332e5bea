"""One pair of responses put to a judge, principle by principle, in both orders: the questions, and the votes they give.

And the votes of a whole stage, read back.

The judge's log-odds that *a* is better is the difference of the next-token log-probabilities of the two options (Lee et
al. 2023, arXiv 2309.00267). Left out: which pairs and principles are asked about (stages choose) and what votes mean.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cai.constitution import Principle
from cai.engines import Choice, Failure, Question
from cai.feedback.labels import Ballots
from cai.records import Message, PrincipleVote
from cai.templates import OPTIONS, TemplateSet

ORDERS: tuple[Literal["ab", "ba"], ...] = ("ab", "ba")
"""Which response is shown first."""
MIN_MASS = 0.1
"""Probability that the options must hold together, unless a recipe says otherwise."""


class Pair(NamedTuple):
    """Two responses to one conversation. `id` is unique among what is asked at once."""

    id: str
    messages: Sequence[Message]
    a: str
    b: str


def empty(text: str) -> bool:
    """Whether there is nothing in a response to read: nothing, blanks, marks without a shape."""
    return not any(char.isprintable() and not char.isspace() for char in text)


def to_questions(pair: Pair, principles: Sequence[Principle], templates: TemplateSet) -> Iterator[Question]:
    """Questions with a common beginning stand side by side: pair, then order, then principle."""
    texts = {"a": pair.a, "b": pair.b}
    for order in ORDERS:
        first, second = (texts[side] for side in order)
        for principle in principles:
            yield Question(
                question_id(pair, order, principle),
                templates.compare(pair.messages, first, second, principle),
                OPTIONS,
            )


def to_votes(
    pair: Pair, principles: Sequence[Principle], answers: Mapping[str, Choice | Failure], min_mass: float
) -> tuple[list[PrincipleVote], list[Failure]]:
    """Votes of the principles that were answered in both orders, and what failed; the pair itself where none was.

    One order alone leaks the judge's preference for a position, so a principle's votes are kept together or not at all.
    Options that hold less than `min_mass` of the probability between them are no answer.
    """
    by_principle = [
        [_to_vote(pair, order, principle, answers, min_mass) for order in ORDERS] for principle in principles
    ]
    return together(pair, by_principle)


def together(
    pair: Pair, by_principle: Sequence[Sequence[PrincipleVote | Failure]]
) -> tuple[list[PrincipleVote], list[Failure]]:
    """Each principle's votes where both orders have one, and what failed; the pair itself where no principle has."""
    votes: list[PrincipleVote] = []
    failures: list[Failure] = []
    for both in by_principle:
        failed = [vote for vote in both if isinstance(vote, Failure)]
        failures += failed
        if not failed:
            votes += [vote for vote in both if not isinstance(vote, Failure)]
    if failures and not votes:
        reason = f"no principle was answered in both orders; first of {len(failures)}: {failures[0].reason}"
        failures = [Failure(pair.id, reason)]
    return votes, failures


def _to_vote(
    pair: Pair,
    order: Literal["ab", "ba"],
    principle: Principle,
    answers: Mapping[str, Choice | Failure],
    min_mass: float,
) -> PrincipleVote | Failure:
    """The log-odds that *a* is better, whichever was shown first."""
    answer = answers[question_id(pair, order, principle)]
    where = f"pair {pair.id}, {principle.id!r}, order {order}"
    if isinstance(answer, Failure):
        return Failure(answer.id, f"{where}: {answer.reason}")
    if answer.mass < min_mass:
        return Failure(answer.id, f"{where}: {too_little(answer.mass, min_mass)}")
    first_better = answer.log_probs[0] - answer.log_probs[1]
    log_odds = first_better if order == "ab" else -first_better
    return PrincipleVote(principle=principle.id, order=order, log_odds=log_odds, mass=answer.mass)


def too_little(mass: float, wanted: float) -> str:
    """Why an answer is none whose options hold so little of the probability."""
    return f"the options hold {mass:.3g} of the probability, less than min_mass {wanted:g}"


def question_id(pair: Pair, order: str, principle: Principle) -> str:
    """Names the question about a pair in one order under one principle."""
    return f"{pair.id}/{order}/{principle.id}"


class Read(NamedTuple):
    """Vote rows without their votes, and the votes of all of them as columns."""

    rows: list[dict[str, Any]]
    principles: list[str]
    ballots: Ballots


def read_votes(paths: Iterable[Path]) -> Read:
    """All vote rows of several files. Only numbers are kept of the votes: 100,000 pairs have millions."""
    rows: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    pair, principle, swapped, log_odds = array("q"), array("q"), array("b"), array("d")
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                votes = row.pop("votes")
                pair.extend([len(rows)] * len(votes))
                principle.extend([numbers.setdefault(vote["principle"], len(numbers)) for vote in votes])
                swapped.extend([vote["order"] == "ba" for vote in votes])
                log_odds.extend([vote["log_odds"] for vote in votes])
                rows.append(row)
    principles = sorted(numbers)
    # In alphabetical order, so that sums come out the same to the last bit whichever row was read first.
    column = np.argsort(np.array([numbers[id] for id in principles], dtype=np.int64))
    columns = Ballots(np.array(pair), column[np.array(principle)], np.array(swapped, dtype=bool), np.array(log_odds))
    return Read(rows, principles, columns)
