"""Unit tests for principles: whether a judge sees the author's examples as the author does.

Every example of a constitution is put to the judge under its own principle, in both orders. It passes where the
log-odds, averaged over the orders, are on the side of the response that the author calls better. Evenness passes
nothing, and no answer is no pass.

Left out: whether the principle is a good one, and how it gets along with the others (that takes votes of a run).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cai.constitution import Constitution, Example, Principle
from cai.contracts.engine import Engine
from cai.engines.retry import choose_all
from cai.feedback import calibration
from cai.feedback.labels import probability
from cai.feedback.votes import MIN_OPTION_PROBABILITY, ResponsePair, to_questions, to_votes
from cai.maths.statistics import rate, worst_case
from cai.templates import TemplateSet
from cai.text.errors import BadInput, nearest
from cai.text.formatting import printable, shorten


@dataclass(frozen=True)
class Outcome:
    """One example under its principle: the judge's log-odds (nats) for the better response, in both orders."""

    principle: str
    number: int
    """Of the example in its principle, from 1."""
    prompt: str
    log_odds: tuple[float, float] | None
    """Shown first, and shown second; None where the judge gave no answer."""
    reason: str = ""
    """Why there is none."""

    @property
    def name(self) -> str:
        """`principle/number`."""
        return f"{self.principle}/{self.number}"

    @property
    def passed(self) -> bool:
        return self.log_odds is not None and sum(self.log_odds) > 0

    @property
    def flipped(self) -> bool:
        """Whether the verdict turns with the order."""
        return self.log_odds is not None and self.log_odds[0] * self.log_odds[1] < 0

    @property
    def p_better(self) -> float:
        """Probability of the better response by the averaged log-odds."""
        return 0.0 if self.log_odds is None else float(probability(np.array(sum(self.log_odds) / 2)))

    def as_json(self) -> dict[str, Any]:
        """The example's name, prompt and verdict."""
        return {
            "name": self.name,
            "prompt": self.prompt,
            "p_better": None if self.log_odds is None else self.p_better,
            "reason": self.reason,
        }


def with_examples_of(constitution: Constitution, other: Constitution) -> Constitution:
    """The constitution with somebody else's examples instead of its own. Raises BadInput for an id that it has not."""
    ids = [each.id for each in constitution.principles]
    for each in other.principles:
        if each.id not in ids:
            known = f"expected one of {constitution.path}{nearest(each.id, ids)}"
            raise BadInput(printable(f"{each.where}: found the principle {each.id!r}, {known}"))
    given = {each.id: each.examples for each in other.principles}
    changed = (replace(each, examples=given.get(each.id, ())) for each in constitution.principles)
    return replace(constitution, principles=tuple(changed))


def run_examples(constitution: Constitution, engine: Engine, templates: TemplateSet, retries: int = 1) -> list[Outcome]:
    """Every example put to the judge, in the document's order. Raises BadInput where there is none."""
    cases = list(examples_of(constitution))
    if not cases:
        raise BadInput(printable(f"{constitution.path}: none of its principles has an example to test"))
    questions = [question for principle, _, _, pair in cases for question in to_questions(pair, [principle], templates)]
    answers = choose_all(engine, questions, retries)
    outcomes = []
    for principle, number, example, pair in cases:
        votes, failures = to_votes(pair, [principle], answers, MIN_OPTION_PROBABILITY)
        odds = {vote["order"]: vote["log_odds"] for vote in votes}
        outcomes.append(
            Outcome(
                principle.id, number, example.prompt,
                (odds["ab"], odds["ba"]) if votes else None, failures[0].reason if failures else "",
            )
        )  # fmt: skip
    return outcomes


def examples_of(constitution: Constitution) -> Iterator[tuple[Principle, int, Example, ResponsePair]]:
    """(principle, number in it from 1, example, the example as a pair whose `a` is the better one)."""
    for principle in constitution.principles:
        for number, example in enumerate(principle.examples, 1):
            pair = ResponsePair(f"{principle.id}/{number}", example.conversation, example.better, example.worse)
            yield principle, number, example, pair


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Accuracy, flip rate and confidence, over all examples and by principle; intervals are clustered by prompt.

    An example without an answer has not passed. `bounds` say how far it may move each rate, whatever the answer.
    """
    by_principle: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_principle.setdefault(outcome.principle, []).append(outcome)
    return _measured(outcomes) | {
        "principles": {
            id: _measured(some) | {"failing": [each.as_json() for each in some if not each.passed]}
            for id, some in by_principle.items()
        }
    }


def calibration_error(outcomes: Sequence[Outcome]) -> float | None:
    """Expected calibration error over the examples that have an answer."""
    odds = np.array([sum(each.log_odds) / 2 for each in outcomes if each.log_odds is not None])
    return calibration.calibration_error(odds, np.ones(len(odds))) if len(odds) else None


def _measured(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    accuracy = rate([float(each.passed) for each in outcomes], [each.prompt for each in outcomes])
    answered = [each for each in outcomes if each.log_odds is not None]
    failed = len(outcomes) - len(answered)
    flips = sum(each.flipped for each in answered)
    right = sum(each.passed for each in answered)
    return {
        "accuracy": accuracy.value,
        "interval": list(accuracy.interval),
        "n": len(outcomes),
        "failed": failed,
        "flip_rate": flips / len(answered) if answered else None,
        "confidence": sum(max(each.p_better, 1 - each.p_better) for each in answered) / len(answered)
        if answered
        else None,
        "bounds": {
            "accuracy": list(worst_case(right, len(answered), failed)),
            "flip_rate": list(worst_case(flips, len(answered), failed)),
        },
    }


def lines(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The figures as a table, then every example that fails."""
    found = figures(outcomes)
    width = max(len("all"), *(len(id) for id in found["principles"]))
    yield f"{'':{width}}  passed  accuracy, 95 % interval  flips  confidence"
    for id, each in [*found["principles"].items(), ("all", found)]:
        low, high = each["interval"]
        flips, sure = ("-" if each[key] is None else f"{100 * each[key]:.0f} %" for key in ("flip_rate", "confidence"))
        passed = f"{round(each['accuracy'] * each['n'])}/{each['n']}"
        share = f"{100 * each['accuracy']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
        yield printable(f"{id:{width}}  {passed:>6}  {share:>23}  {flips:>5}  {sure:>10}")
    for outcome in outcomes:
        if not outcome.passed:
            why = outcome.reason or f"the better response has probability {outcome.p_better:.2f}"
            yield printable(f"failing {outcome.name}: {shorten(repr(outcome.prompt), 80)}: {why}")
