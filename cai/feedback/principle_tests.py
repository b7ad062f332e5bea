"""Unit tests for principles: whether a judge agrees with the author's examples.

Every example of a constitution is put to the judge under its own principle, in both orders. It passes where the mean
log-odds of both orders are on the side of the response that the author calls better. An even judge passes nothing, and
an example without an answer does not pass. A principle without an example is listed like the others, without figures.

Left out: whether the principle is a good one, and how it goes together with the others (that takes votes of a run).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NotRequired, TypedDict

import numpy as np

from cai.constitution import Constitution, Example, Principle
from cai.contracts.engine import Engine
from cai.feedback.votes import ORDERS, ResponsePair, judge_pairs
from cai.maths.calibration import calibration_error
from cai.maths.chance import AgainstChance, against_chance, can_beat_chance, n_to_beat_chance
from cai.maths.statistics import rate, worst_case
from cai.maths.vote_aggregation import mean_over_orders, sigmoid
from cai.storage.rows import Failure
from cai.templates import TemplateSet
from cai.text.errors import BadInput, did_you_mean
from cai.text.formatting import printable, shorten, wrapped
from cai.text.left_out import causes_text, count_causes
from cai.text.progress import Progress
from cai.text.tables import aligned_lines


class RateBounds(TypedDict):
    """[lowest, highest] rates that are possible if the failed examples had an answer."""

    accuracy: list[float]
    flip_rate: list[float]


class ExampleFigures(TypedDict):
    """A judge on examples; `interval` is the accuracy's 95 %, clustered by prompt."""

    accuracy: float | None
    """Share of examples that pass; one without an answer does not pass. None without an example."""
    interval: list[float]
    against_chance: AgainstChance
    n: int
    failed: int
    """Examples without an answer."""
    failures: dict[str, int]
    """Why they have none, with the number of examples."""
    flip_rate: float | None
    """Share of answered examples whose verdict changes with the order."""
    confidence: float | None
    """Mean probability of the preferred response."""
    bounds: RateBounds
    failing: NotRequired[list[dict[str, Any]]]
    """Examples of one principle that do not pass."""


class ConstitutionFigures(ExampleFigures):
    """The same over all examples, and by principle."""

    principles: dict[str, ExampleFigures]


@dataclass(frozen=True)
class Outcome:
    """One example under its principle: the judge's log-odds (nats) for the better response, in both orders."""

    principle: str
    number: int
    """Number of the example in its principle, from 1."""
    prompt: str
    log_odds: tuple[float, float] | None
    """With the better response shown first, and second; None where the judge gave no answer."""
    failure: Failure | None = None
    """Why there is no answer."""

    @property
    def name(self) -> str:
        """`principle/number`."""
        return f"{self.principle}/{self.number}"

    @property
    def reason(self) -> str:
        """Why there is no answer, in words."""
        return self.failure.reason if self.failure else ""

    @property
    def mean_log_odds(self) -> float | None:
        """Mean log-odds of both orders; None where there is no answer."""
        return None if self.log_odds is None else mean_over_orders(*self.log_odds)

    @property
    def is_passed(self) -> bool:
        return self.mean_log_odds is not None and self.mean_log_odds > 0

    @property
    def is_flipped(self) -> bool:
        """Whether the verdict changes with the order."""
        return self.log_odds is not None and self.log_odds[0] * self.log_odds[1] < 0

    @property
    def p_better(self) -> float:
        """Probability of the better response by the mean log-odds; 0 without an answer."""
        return 0.0 if self.log_odds is None else float(sigmoid(np.array(self.mean_log_odds)))

    def as_json(self) -> dict[str, Any]:
        """The example's name, prompt and verdict."""
        return {
            "name": self.name,
            "prompt": self.prompt,
            "p_better": None if self.log_odds is None else self.p_better,
            "reason": self.reason,
        }


def with_examples_of(constitution: Constitution, source: Constitution) -> Constitution:
    """The constitution with the examples of `source` instead of its own.

    Raises BadInput for a principle of `source` that the constitution does not have.
    """
    ids = [principle.id for principle in constitution.principles]
    for principle in source.principles:
        if principle.id not in ids:
            expected = f"expected one of {constitution.path}{did_you_mean(principle.id, ids)}"
            raise BadInput(printable(f"{principle.location}: found the principle {principle.id!r}, {expected}"))
    examples_by_id = {principle.id: principle.examples for principle in source.principles}
    principles = tuple(
        replace(principle, examples=examples_by_id.get(principle.id, ())) for principle in constitution.principles
    )
    return replace(constitution, principles=principles)


def run_examples(
    constitution: Constitution, engine: Engine, templates: TemplateSet, retries: int = 1, *,
    progress: Progress | None = None,
) -> list[Outcome]:  # fmt: skip
    """Puts every example to the judge, in the document's order. Raises BadInput where there is none."""
    examples = list(examples_of(constitution))
    if not examples:
        raise BadInput(printable(f"{constitution.path}: none of its principles has an example to test"))
    if progress:
        progress.start(total=len(examples), unit="examples")
    on_choice = None if progress is None else lambda _: progress.advance(1 / len(ORDERS))
    judged = judge_pairs(
        engine, templates, [(pair, principle) for principle, _, _, pair in examples], retries, on_choice
    )
    outcomes = []
    for (principle, number, example, _), (votes, failures) in zip(examples, judged, strict=True):
        by_order = {vote["order"]: vote["log_odds"] for vote in votes}
        log_odds = (by_order["ab"], by_order["ba"]) if votes else None
        failure = failures[0] if failures else None
        outcomes.append(Outcome(principle.id, number, example.prompt, log_odds, failure))
    return outcomes


def examples_of(constitution: Constitution) -> Iterator[tuple[Principle, int, Example, ResponsePair]]:
    """(principle, number in it from 1, example, the example as a pair whose `a` is the better one)."""
    for principle in constitution.principles:
        for number, example in enumerate(principle.examples, 1):
            pair = ResponsePair(f"{principle.id}/{number}", example.conversation, example.better, example.worse)
            yield principle, number, example, pair


def example_figures(constitution: Constitution, outcomes: Sequence[Outcome]) -> ConstitutionFigures:
    """Accuracy, flip rate and confidence, over all examples and by principle, those without an example too."""
    outcomes_by_principle: dict[str, list[Outcome]] = {principle.id: [] for principle in constitution.principles}
    for outcome in outcomes:
        outcomes_by_principle[outcome.principle].append(outcome)
    principles: dict[str, ExampleFigures] = {}
    for id, of_principle in outcomes_by_principle.items():
        failing = [outcome.as_json() for outcome in of_principle if not outcome.is_passed]
        principles[id] = {**_measure_outcomes(of_principle), "failing": failing}
    return {**_measure_outcomes(outcomes), "principles": principles}


def example_calibration_error(outcomes: Sequence[Outcome]) -> float | None:
    """Expected calibration error over the examples that have an answer; None without any."""
    log_odds = np.array([outcome.mean_log_odds for outcome in outcomes if outcome.log_odds is not None], dtype=float)
    return calibration_error(log_odds, np.ones(len(log_odds))) if len(log_odds) else None


def _measure_outcomes(outcomes: Sequence[Outcome]) -> ExampleFigures:
    accuracy = rate([float(outcome.is_passed) for outcome in outcomes], [outcome.prompt for outcome in outcomes])
    answered = [outcome for outcome in outcomes if outcome.log_odds is not None]
    n_failed = len(outcomes) - len(answered)
    n_flipped = sum(outcome.is_flipped for outcome in answered)
    n_passed = sum(outcome.is_passed for outcome in answered)
    confidences = [max(outcome.p_better, 1 - outcome.p_better) for outcome in answered]
    return {
        "accuracy": accuracy.value,
        "interval": list(accuracy.interval),
        "against_chance": against_chance(accuracy.interval),
        "n": len(outcomes),
        "failed": n_failed,
        "failures": count_causes(outcome.failure for outcome in outcomes if outcome.failure is not None),
        "flip_rate": n_flipped / len(answered) if answered else None,
        "confidence": sum(confidences) / len(answered) if answered else None,
        "bounds": {
            "accuracy": list(worst_case(n_passed, len(answered), n_failed)),
            "flip_rate": list(worst_case(n_flipped, len(answered), n_failed)),
        },
    }


MAX_ID = 30
"""Characters of a principle's id in a table that fits a terminal."""


def example_lines(figures: ConstitutionFigures, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The figures as a table, what they say of the judge, then every example that fails."""
    rows: list[tuple[str, ExampleFigures]] = [*figures["principles"].items(), ("all", figures)]
    cells = [["", "passed", "no answer", "accuracy, 95 % interval", "flips", "confidence"]]
    for name, row in rows:
        if row["accuracy"] is None:
            cells.append([shorten(name, MAX_ID), "", "", "no example", "", ""])
            continue
        accuracy, (low, high) = row["accuracy"], row["interval"]
        flips, confidence = (
            "-" if value is None else f"{100 * value:.0f} %" for value in (row["flip_rate"], row["confidence"])
        )
        passed = f"{round(accuracy * row['n'])}/{row['n']}"
        interval = f"{100 * accuracy:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
        cells.append([shorten(name, MAX_ID), passed, str(row["failed"]), interval, flips, confidence])
    yield from aligned_lines(cells, "<>>>>>")
    yield ""
    yield from wrapped(
        "flips: verdicts that change with the order of the two responses; confidence: mean probability of the response "
        "that the judge prefers; no answer: examples that count as not passed"
    )
    yield f"over all examples the judge is {figures['against_chance']}"
    unclear = [
        id
        for id, row in figures["principles"].items()
        if row["n"] and row["against_chance"] == "not distinguishable from chance"
    ]
    prompts = {id: [outcome.prompt for outcome in outcomes if outcome.principle == id] for id in unclear}
    enough = [id for id in unclear if can_beat_chance(len(prompts[id]), prompts[id])]
    too_few = [id for id in unclear if id not in enough]
    if enough:
        yield from wrapped(f"not distinguishable from chance by its own examples alone: {', '.join(enough)}", "  ")
    if too_few:
        n = n_to_beat_chance()
        yield from wrapped(
            f"too few examples to tell by these alone, {n} or more about different prompts would: {', '.join(too_few)}",
            "  ",
        )
    if figures["failures"]:
        causes = causes_text(figures["failures"])
        yield from wrapped(f"no answer to {figures['failed']} of {figures['n']} examples: {causes}", "  ")
    yield ""
    for outcome in outcomes:
        if not outcome.is_passed:
            reason = (
                outcome.failure.cause
                if outcome.failure
                else f"the better response has probability {outcome.p_better:.2f}"
            )
            yield from wrapped(f"failing {outcome.name}: {shorten(repr(outcome.prompt), 80)}: {reason}", "  ")
