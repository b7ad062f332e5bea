"""The ways to put a pair of responses to a judge, principle by principle. Each gives votes and keeps what they rest on.

`pairwise`: the log-odds of the two options, with either response shown first (Lee et al. 2023, arXiv 2309.00267).
`reasoned`: reasons are sampled first, several times, and the options are read after each. The probability that the
first is better is the mean over the reasons: each is one way to come to a verdict, and what is wanted is the verdict's
probability over all of them. A thinking model's reasons are its own thinking.
`rating`: each response alone, on a scale from 1; its score is the expectation over the scale's tokens (direct RLAIF,
section 2.2.2 of the same paper), and the vote is the difference of two scores, in points, not nats. There is no order
to average over: the vote stands in both.

`pairwise` can do without log-probabilities, which not every server gives: `verdicts: text` draws short answers instead
and counts those that name an option, with half a count added to each, so that a few draws never make a certainty.

Left out: who is asked about what (stages choose), and what votes amount to (`cai.feedback.labels`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from cai.constitution import Principle
from cai.contracts.engine import Choice, Completion, Engine, Question, Request, Sampling
from cai.engines.retry import choose_all, generate_all
from cai.feedback.votes import (
    ORDERS,
    ResponsePair,
    question_id,
    to_questions,
    to_votes,
    together,
    with_enough_probability,
)
from cai.maths.behaviours import declines
from cai.storage.rows import Failure, Message, PrincipleVote, Rationale, stable_seed
from cai.templates import OPTIONS, TemplateSet
from cai.text.formatting import shorten

Method = Literal["pairwise", "reasoned", "rating"]
Verdicts = Literal["log-probabilities", "text"]
TEMPLATE_NAMES: Mapping[Method, tuple[str, ...]] = {
    "pairwise": ("compare",),
    "reasoned": ("reason", "verdict"),
    "rating": ("rate",),
}
"""Templates that a judge is asked with."""
PRINCIPLE_FIELDS: Mapping[Method, tuple[str, ...]] = {
    "pairwise": ("compare",),
    "reasoned": ("compare",),
    "rating": ("critique",),
}
"""What principles say to it."""

ANSWER = Sampling(max_new_tokens=8, temperature=1.0)
"""How an answer is drawn that is read as text: an option, and what little stands around it."""
AROUND = " \t\n.:*_`'\"()[]"
"""What may stand around an option in a drawn answer."""

Asked = Mapping[str, Sequence[Principle]]
"""The principles that each pair is judged by, by the pair's id."""
Order = Literal["ab", "ba"]
Case = tuple[ResponsePair, Order, Principle]
Judged = dict[str, tuple[list[PrincipleVote], list[Failure]]]
"""By the pair's id: its votes, and what failed; votes of a principle in both orders or in none."""


@dataclass(frozen=True)
class Judge:
    """Whom pairs are put to, and how."""

    engine: Engine
    templates: TemplateSet
    method: Method
    min_option_probability: float
    retries: int
    seed: int = 0
    rationales: int = 1
    scale: int = 7
    draws: int | None = None
    """Answers drawn for each question of `pairwise`; None reads log-probabilities."""
    sampling: Sampling = field(default_factory=Sampling)

    def votes(self, pairs: Sequence[ResponsePair], asked: Asked) -> Judged:
        """What the judge says of every pair."""
        return {"pairwise": self._pairwise, "reasoned": self._reasoned, "rating": self._rating}[self.method](
            pairs, asked
        )

    def _pairwise(self, pairs: Sequence[ResponsePair], asked: Asked) -> Judged:
        questions = [each for pair in pairs for each in to_questions(pair, asked[pair.id], self.templates)]
        if self.draws is None:
            answers = choose_all(self.engine, questions, self.retries)
        else:
            answers = self._drawn(questions, self.draws)
        return {pair.id: to_votes(pair, asked[pair.id], answers, self.min_option_probability) for pair in pairs}

    def _drawn(self, questions: Sequence[Question], draws: int) -> dict[str, Choice | Failure]:
        """The answer to every question by its id, counted over drawn texts."""
        requests = [
            Request(f"{question.id}/{k}", question.messages, stable_seed(self.seed, question.id, k), ANSWER)
            for question in questions
            for k in range(draws)
        ]
        drawn = generate_all(self.engine, requests, self.retries)
        return {
            question.id: counted(question, [drawn[f"{question.id}/{k}"] for k in range(draws)])
            for question in questions
        }

    def _reasoned(self, pairs: Sequence[ResponsePair], asked: Asked) -> Judged:
        cases = {f"{question_id(*case)}/{k}": case for case in _cases(pairs, asked) for k in range(self.rationales)}
        rationales: dict[str, Choice | Failure] = {}
        texts: dict[str, str] = {}
        for attempt in range(1 + self.retries):
            again = [id for id in cases if not isinstance(rationales.get(id), Choice)]
            if not again:
                break
            rationales |= self._think({id: cases[id] for id in again}, attempt, texts)
        found: Judged = {}
        for pair in pairs:
            by_principle = [
                [self._mean_vote(pair, order, principle, rationales, texts) for order in ORDERS]
                for principle in asked[pair.id]
            ]
            found[pair.id] = together(pair, by_principle)
        return found

    def _think(self, cases: Mapping[str, Case], attempt: int, texts: dict[str, str]) -> dict[str, Choice | Failure]:
        """One attempt at reasons and at the verdict after each. `texts` learns the reasons.

        Reasons that were cut off have come to no conclusion, and after a refusal there is no verdict: failures both.
        """
        requests = []
        for id, case in cases.items():
            seed = stable_seed(self.seed, id)
            seed = stable_seed(seed, attempt) if attempt else seed
            requests.append(Request(id, self._ask("reason", *case), seed, self.sampling))
        reasons = generate_all(self.engine, requests, retries=0, whole=True)
        texts |= {id: _reasoning(given) for id, given in reasons.items() if isinstance(given, Completion)}
        questions = [
            Question(id, self._ask("verdict", *case, reasoning=texts[id]), OPTIONS)
            for id, case in cases.items()
            if isinstance(reasons[id], Completion)
        ]
        answers = choose_all(self.engine, questions, retries=0)
        found: dict[str, Choice | Failure] = {}
        for id, reason in reasons.items():
            if isinstance(reason, Failure):
                found[id] = reason
                continue
            verdict = found[id] = with_enough_probability(answers[id], self.min_option_probability)
            if isinstance(verdict, Failure) and isinstance(answers[id], Choice) and declines(texts[id]):
                found[id] = Failure(id, f"the judge refused, and {verdict.reason}")
        return found

    def _mean_vote(
        self,
        pair: ResponsePair,
        order: Order,
        principle: Principle,
        rationales: Mapping[str, Choice | Failure],
        texts: Mapping[str, str],
    ) -> PrincipleVote | Failure:
        """Over the reasons that led to a verdict; a failure where none did."""
        ids = [f"{question_id(pair, order, principle)}/{k}" for k in range(self.rationales)]
        verdicts = {id: verdict for id in ids if isinstance(verdict := rationales[id], Choice)}
        if not verdicts:
            first = rationales[ids[0]]
            assert isinstance(first, Failure)
            return Failure(first.id, f"pair {pair.id}, {principle.id!r}, order {order}: {first.reason}")
        kept: list[Rationale] = []
        for id, verdict in verdicts.items():
            first_better = verdict.log_probs[0] - verdict.log_probs[1]
            kept.append({"text": texts[id], "log_odds": first_better if order == "ab" else -first_better})
        return PrincipleVote(
            principle=principle.id,
            order=order,
            log_odds=mean_probability([each["log_odds"] for each in kept]),
            option_probability=float(np.mean([verdict.option_probability for verdict in verdicts.values()])),
            rationales=kept,
        )

    def _rating(self, pairs: Sequence[ResponsePair], asked: Asked) -> Judged:
        cases = {
            f"{pair.id}/{side}/{principle.id}": Rated(pair.messages, text, principle)
            for pair in pairs
            for side, text in (("a", pair.a), ("b", pair.b))
            for principle in asked[pair.id]
        }
        ratings = rate(self.engine, self.templates, cases, self.scale, self.min_option_probability, self.retries)
        found: Judged = {}
        for pair in pairs:
            by_principle = []
            for principle in asked[pair.id]:
                vote = _difference(pair, principle, ratings)
                by_principle.append([vote if isinstance(vote, Failure) else {**vote, "order": o} for o in ORDERS])
            found[pair.id] = together(pair, by_principle)  # type: ignore[arg-type]
        return found

    def _ask(self, name: str, pair: ResponsePair, order: str, principle: Principle, **more: str) -> list[Message]:
        first, second = ({"a": pair.a, "b": pair.b}[side] for side in order)
        return self.templates.ask(
            name, messages=pair.messages, first=first, second=second, request=principle.compare, **more
        )


class Rated(NamedTuple):
    """One response to be rated by one principle."""

    messages: Sequence[Message]
    response: str
    principle: Principle


class Rating(NamedTuple):
    """The expectation over a scale from 1, and the probability that the judge put on the scale's numbers."""

    score: float
    option_probability: float


def rate(
    engine: Engine,
    templates: TemplateSet,
    cases: Mapping[str, Rated],
    scale: int,
    min_option_probability: float,
    retries: int,
) -> dict[str, Rating | Failure]:
    """The rating of every case by its id: the mean of 1 to `scale` under the judge's next token.

    Numbers that hold less than `min_option_probability` of the probability between them are no rating.
    """
    options = tuple(str(number) for number in range(1, scale + 1))
    questions = [
        Question(
            id,
            templates.ask(
                "rate",
                messages=case.messages,
                response=case.response,
                request=case.principle.critique,
                scale=scale,
            ),
            options,
        )
        for id, case in cases.items()
    ]
    found: dict[str, Rating | Failure] = {}
    for id, given in choose_all(engine, questions, retries).items():
        answer = with_enough_probability(given, min_option_probability)
        found[id] = (
            answer
            if isinstance(answer, Failure)
            else Rating(expected_score(answer.log_probs), answer.option_probability)
        )
    return found


def _difference(
    pair: ResponsePair, principle: Principle, ratings: Mapping[str, Rating | Failure]
) -> PrincipleVote | Failure:
    """The vote of two ratings; a failure where one of them is."""
    both = []
    for side in ("a", "b"):
        rating = ratings[f"{pair.id}/{side}/{principle.id}"]
        if isinstance(rating, Failure):
            return Failure(rating.id, f"pair {pair.id}, {principle.id!r}, response {side}: {rating.reason}")
        both.append(rating)
    first, second = both
    return PrincipleVote(
        principle=principle.id,
        order="ab",
        log_odds=first.score - second.score,
        option_probability=min(first.option_probability, second.option_probability),
        scores=[first.score, second.score],
    )


def counted(question: Question, answers: Sequence[Completion | Failure]) -> Choice | Failure:
    """The options' log-probabilities by how many answers are each: log((n + 1/2) / (N + options / 2)).

    An answer is an option if nothing else stands in it but marks around; `option_probability` is the
    share of answers that are one.
    """
    texts = [answer.text.strip(AROUND) for answer in answers if isinstance(answer, Completion)]
    counts = [texts.count(option) for option in question.options]
    if not any(counts):
        failed = next((answer.reason for answer in answers if isinstance(answer, Failure)), None)
        said = failed if not texts else f"first {shorten(texts[0], 40)!r}"
        return Failure(question.id, f"none of {len(answers)} drawn answers is an option; {said}")
    whole = sum(counts) + len(counts) / 2
    log_probs = tuple(math.log((count + 0.5) / whole) for count in counts)
    return Choice(question.id, log_probs, sum(counts) / len(answers))


def mean_probability(log_odds: Sequence[float]) -> float:
    """The log-odds of the mean probability: log(mean s(x) / mean s(-x)), s the logistic function, without overflow."""
    x = np.asarray(log_odds, dtype=float)
    better, worse = (-np.logaddexp(0.0, sign * x) for sign in (-1.0, 1.0))
    return float(np.logaddexp.reduce(better) - np.logaddexp.reduce(worse))


def expected_score(log_probs: Sequence[float]) -> float:
    """Mean of 1, 2, ... under the options' probabilities, their sum taken as 1."""
    p = np.exp(np.asarray(log_probs) - np.logaddexp.reduce(log_probs))
    return float(p @ np.arange(1, len(p) + 1))


def _reasoning(completion: Completion) -> str:
    return completion.text if completion.reasoning is None else completion.reasoning


def _cases(pairs: Sequence[ResponsePair], asked: Asked) -> Iterator[Case]:
    """What shares most of its prompt stands side by side."""
    for pair in pairs:
        for order in ORDERS:
            for principle in asked[pair.id]:
                yield pair, order, principle
