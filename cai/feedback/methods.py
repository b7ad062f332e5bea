"""The methods of asking a judge about a pair of responses, principle by principle.

`pairwise`: the log-odds of the two options, with either response shown first (Lee et al. 2023, arXiv 2309.00267).
`reasoned`: several rationales are sampled first, and the options are read after each. The probability that the first
response is better is the mean over the rationales. A thinking model's rationales are its own reasoning.
`rating`: each response alone, on a scale from 1; its score is the expectation over the scale's tokens (direct RLAIF,
section 2.2.2 of the same paper), and the vote is the difference of two scores, in points: how many of them are worth a
nat is `prefer`'s to say. Ratings have no order: the same vote is recorded for both.

`pairwise` also works with servers that give no log-probabilities: `verdicts: text` samples short answers and counts
those that name an option, with half a count added to each, so that a few samples never amount to certainty.

Left out: who is asked about what (stages choose), and how votes become labels (`cai.feedback.labelled_votes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from cai.constitution import Principle
from cai.contracts.engine import Choice, Completion, Engine, Question, Request, Sampling
from cai.contracts.stage_config import PrincipleField
from cai.engines.retry import choose_all, generate_all
from cai.feedback.votes import (
    ORDERS,
    Order,
    ResponsePair,
    complete_votes,
    failed_vote,
    log_odds_of_a,
    question_id,
    to_questions,
    to_votes,
    with_enough_probability,
    with_known_votes,
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
PRINCIPLE_FIELDS: Mapping[Method, tuple[PrincipleField, ...]] = {
    "pairwise": ("compare",),
    "reasoned": ("compare",),
    "rating": ("critique",),
}
"""Principle fields that a judge is asked with."""

ANSWER_SAMPLING = Sampling(max_new_tokens=8, temperature=1.0)
"""Sampling of an answer that is read as text: an option, and a few characters around it."""
RATIONALE_SHARE = 0.8
"""What sampling a rationale counts for in the progress of `reasoned`; the rest is reading the verdict after it."""
CHARACTERS_AROUND_OPTION = " \t\n.:*_`'\"()[]"

PrinciplesByPair = Mapping[str, Sequence[Principle]]
"""The principles that each pair is judged by, by the pair's id."""
KnownVotes = Mapping[str, Mapping[str, Sequence[PrincipleVote]]]
"""Votes in both orders that are there already, by the pair's id and the principle's."""
VotesByPair = dict[str, tuple[list[PrincipleVote], list[Failure]]]
"""Votes of `complete_votes` and failures, by the pair's id."""


class Comparison(NamedTuple):
    """One pair to be compared in one order by one principle."""

    pair: ResponsePair
    order: Order
    principle: Principle

    @property
    def id(self) -> str:
        return question_id(self.pair, self.order, self.principle)


@dataclass(frozen=True)
class Judge:
    """A judge's engine and templates, and the method it is asked by."""

    engine: Engine
    templates: TemplateSet
    method: Method
    min_option_probability: float
    retries: int
    seed: int = 0
    rationales: int = 1
    """Rationales sampled for each comparison of `reasoned`."""
    scale: int = 7
    """Highest rating of `rating`."""
    n_samples: int | None = None
    """Answers sampled for each question of `pairwise`; None reads log-probabilities."""
    sampling: Sampling = field(default_factory=Sampling)
    """Sampling of rationales."""
    on_answer: Callable[[float], None] | None = None
    """Called with each answer as it comes in: its share of the answers that its pair takes."""
    on_tokens: Callable[[int], None] | None = None
    """Called with numbers of tokens as they are sampled."""

    def votes(
        self, pairs: Sequence[ResponsePair], principles: PrinciplesByPair, known: KnownVotes | None = None
    ) -> VotesByPair:
        """Votes on every pair by its principles; `known` ones are taken as they are, and not asked for."""
        known_of = {pair.id: (known or {}).get(pair.id, {}) for pair in pairs}
        to_ask = {
            pair.id: [principle for principle in principles[pair.id] if principle.id not in known_of[pair.id]]
            for pair in pairs
        }
        methods = {"pairwise": self._pairwise, "reasoned": self._reasoned, "rating": self._rating}
        asked = methods[self.method]([pair for pair in pairs if to_ask[pair.id]], to_ask)
        return {pair.id: with_known_votes(pair, principles[pair.id], asked.get(pair.id, ([], [])), known_of[pair.id])
                for pair in pairs}  # fmt: skip

    def _pairwise(self, pairs: Sequence[ResponsePair], principles: PrinciplesByPair) -> VotesByPair:
        questions = [question for pair in pairs for question in to_questions(pair, principles[pair.id], self.templates)]
        if self.n_samples is None:
            on_choice = self._reporting(shares(pairs, principles))
            answers = choose_all(self.engine, questions, self.retries, on_choice=on_choice)
        else:
            answers = self._choose_by_sampling(questions, self.n_samples, shares(pairs, principles))
        return {pair.id: to_votes(pair, principles[pair.id], answers, self.min_option_probability) for pair in pairs}

    def _reporting(
        self, share_by_id: Mapping[str, float], factor: float = 1.0
    ) -> Callable[[Choice | Completion], None] | None:
        """What calls `on_answer` with an answer's share, `factor` times that of its id."""
        if (on_answer := self.on_answer) is None:
            return None
        return lambda answer: on_answer(factor * share_by_id[answer.id])

    def _choose_by_sampling(
        self, questions: Sequence[Question], n_samples: int, share_by_id: Mapping[str, float]
    ) -> dict[str, Choice | Failure]:
        """The answer to every question by its id, from counts of sampled texts."""
        requests = [
            Request(f"{question.id}/{k}", question.messages, stable_seed(self.seed, question.id, k), ANSWER_SAMPLING)
            for question in questions
            for k in range(n_samples)
        ]
        share_by_request = {
            f"{id}/{k}": share / n_samples for id, share in share_by_id.items() for k in range(n_samples)
        }
        completions = generate_all(
            self.engine,
            requests,
            self.retries,
            on_completion=self._reporting(share_by_request),
            on_tokens=self.on_tokens,
        )
        return {
            question.id: choice_from_texts(question, [completions[f"{question.id}/{k}"] for k in range(n_samples)])
            for question in questions
        }

    def _reasoned(self, pairs: Sequence[ResponsePair], principles: PrinciplesByPair) -> VotesByPair:
        comparisons = {
            f"{comparison.id}/{k}": comparison
            for comparison in _comparisons(pairs, principles)
            for k in range(self.rationales)
        }
        n_principles = {pair.id: len(principles[pair.id]) for pair in pairs}
        choices: dict[str, Choice | Failure] = {}
        rationales: dict[str, str] = {}
        for attempt in range(1 + self.retries):
            remaining = {id: case for id, case in comparisons.items() if not isinstance(choices.get(id), Choice)}
            if not remaining:
                break
            choices |= self._reason(remaining, attempt, rationales, n_principles)
        return {
            pair.id: complete_votes(
                [
                    [self._mean_vote(Comparison(pair, order, principle), choices, rationales) for order in ORDERS]
                    for principle in principles[pair.id]
                ],
            )
            for pair in pairs
        }

    def _reason(
        self,
        comparisons: Mapping[str, Comparison],
        attempt: int,
        rationales: dict[str, str],
        n_principles: Mapping[str, int],
    ) -> dict[str, Choice | Failure]:
        """One attempt at a rationale for each comparison and at the verdict after it; adds texts to `rationales`.

        A rationale that was cut off has no conclusion, and after a refusal there is no verdict: both are failures.
        """
        requests = []
        for id, comparison in comparisons.items():
            seed = stable_seed(self.seed, id)
            seed = stable_seed(seed, attempt) if attempt else seed
            requests.append(Request(id, self._messages("reason", comparison), seed, self.sampling))
        share_by_id = {
            id: 1 / (len(ORDERS) * n_principles[comparison.pair.id] * self.rationales)
            for id, comparison in comparisons.items()
        }
        completions = generate_all(
            self.engine,
            requests,
            retries=0,
            fail_if_cut_off=True,
            on_completion=self._reporting(share_by_id, RATIONALE_SHARE),
            on_tokens=self.on_tokens,
        )
        rationales |= {
            id: completion.text if completion.reasoning is None else completion.reasoning
            for id, completion in completions.items()
            if isinstance(completion, Completion)
        }
        questions = [
            Question(id, self._messages("verdict", comparison, reasoning=rationales[id]), OPTIONS)
            for id, comparison in comparisons.items()
            if isinstance(completions[id], Completion)
        ]
        on_choice = self._reporting(share_by_id, 1 - RATIONALE_SHARE)
        answers = choose_all(self.engine, questions, retries=0, on_choice=on_choice)
        choices: dict[str, Choice | Failure] = {}
        for id, completion in completions.items():
            if isinstance(completion, Failure):
                choices[id] = completion
                continue
            choice = with_enough_probability(answers[id], self.min_option_probability)
            if isinstance(choice, Failure) and isinstance(answers[id], Choice) and declines(rationales[id]):
                choice = replace(choice, reason=f"the judge refused, and {choice.reason}")
            choices[id] = choice
        return choices

    def _mean_vote(
        self, comparison: Comparison, choices: Mapping[str, Choice | Failure], rationales: Mapping[str, str]
    ) -> PrincipleVote | Failure:
        """The vote of a comparison over its rationales with a verdict; a failure where none has one."""
        pair, order, principle = comparison
        ids = [f"{comparison.id}/{k}" for k in range(self.rationales)]
        verdicts = {id: choice for id in ids if isinstance(choice := choices[id], Choice)}
        if not verdicts:
            failure = choices[ids[0]]
            assert isinstance(failure, Failure)
            return failed_vote(failure, pair, order, principle)
        with_verdict: list[Rationale] = [
            {"text": rationales[id], "log_odds": log_odds_of_a(verdict, order)} for id, verdict in verdicts.items()
        ]
        return PrincipleVote(
            principle=principle.id,
            order=order,
            log_odds=log_odds_of_mean_probability([rationale["log_odds"] for rationale in with_verdict]),
            option_probability=float(np.mean([verdict.option_probability for verdict in verdicts.values()])),
            rationales=with_verdict,
        )

    def _rating(self, pairs: Sequence[ResponsePair], principles: PrinciplesByPair) -> VotesByPair:
        rating_requests = {
            f"{pair.id}/{side}/{principle.id}": RatingRequest(pair.messages, response, principle)
            for pair in pairs
            for side, response in (("a", pair.a), ("b", pair.b))
            for principle in principles[pair.id]
        }
        share_by_id = {
            f"{pair.id}/{side}/{principle.id}": 1 / (2 * len(principles[pair.id]))
            for pair in pairs
            for side in "ab"
            for principle in principles[pair.id]
        }
        ratings = rate_responses(
            self.engine,
            self.templates,
            rating_requests,
            self.scale,
            self.min_option_probability,
            self.retries,
            on_choice=self._reporting(share_by_id),
        )
        return {
            pair.id: complete_votes([_rating_votes(pair, principle, ratings) for principle in principles[pair.id]])
            for pair in pairs
        }

    def _messages(self, template: str, comparison: Comparison, **variables: str) -> list[Message]:
        first, second = comparison.pair.in_order(comparison.order)
        return self.templates.render(
            template,
            messages=comparison.pair.messages,
            first=first,
            second=second,
            request=comparison.principle.compare,
            **variables,
        )


class RatingRequest(NamedTuple):
    """One response to be rated by one principle."""

    messages: Sequence[Message]
    response: str
    principle: Principle


class Rating(NamedTuple):
    """The expectation over a scale from 1, and the probability that the judge put on the scale's numbers."""

    score: float
    option_probability: float


def rate_responses(
    engine: Engine,
    templates: TemplateSet,
    rating_requests: Mapping[str, RatingRequest],
    scale: int,
    min_option_probability: float,
    retries: int,
    on_choice: Callable[[Choice], None] | None = None,
) -> dict[str, Rating | Failure]:
    """The rating of every request by its id: the mean of 1 to `scale` under the judge's next token.

    A rating fails where the numbers hold less than `min_option_probability` together. `on_choice` is called with each
    answer as it comes in.
    """
    options = tuple(str(number) for number in range(1, scale + 1))
    questions = [
        Question(
            id,
            templates.render(
                "rate",
                messages=request.messages,
                response=request.response,
                request=request.principle.critique,
                scale=scale,
            ),
            options,
        )
        for id, request in rating_requests.items()
    ]
    ratings: dict[str, Rating | Failure] = {}
    for id, answer in choose_all(engine, questions, retries, on_choice=on_choice).items():
        choice = with_enough_probability(answer, min_option_probability)
        ratings[id] = (
            choice
            if isinstance(choice, Failure)
            else Rating(expected_score(choice.log_probs), choice.option_probability)
        )
    return ratings


def shares(pairs: Sequence[ResponsePair], principles: PrinciplesByPair) -> dict[str, float]:
    """The share of each question, by its id, in the questions about its pair."""
    return {
        question_id(pair, order, principle): 1 / (len(ORDERS) * len(principles[pair.id]))
        for pair in pairs
        for order in ORDERS
        for principle in principles[pair.id]
    }


def _rating_votes(
    pair: ResponsePair, principle: Principle, ratings: Mapping[str, Rating | Failure]
) -> list[PrincipleVote | Failure]:
    """The difference of two ratings as the vote of both orders; a failure for each where a rating failed."""
    both_sides = []
    for side in ("a", "b"):
        rating = ratings[f"{pair.id}/{side}/{principle.id}"]
        if isinstance(rating, Failure):
            return [rating.at(f"pair {pair.id}, {principle.id!r}, response {side}") for _ in ORDERS]
        both_sides.append(rating)
    a, b = both_sides
    return [
        PrincipleVote(
            principle=principle.id,
            order=order,
            log_odds=a.score - b.score,
            option_probability=min(a.option_probability, b.option_probability),
            scores=[a.score, b.score],
        )
        for order in ORDERS
    ]


def choice_from_texts(question: Question, answers: Sequence[Completion | Failure]) -> Choice | Failure:
    """Log-probabilities of the options from counts of N answers: log((n + 1/2) / (N + options / 2)).

    N counts the answers that are an option, apart from `CHARACTERS_AROUND_OPTION`; their share of all answers is the
    `option_probability`.
    """
    texts = [answer.text.strip(CHARACTERS_AROUND_OPTION) for answer in answers if isinstance(answer, Completion)]
    counts = [texts.count(option) for option in question.options]
    if not any(counts):
        failure = next((answer for answer in answers if isinstance(answer, Failure)), None)
        place = f"none of {len(answers)} sampled answers is an option"
        if texts or failure is None:
            return Failure(question.id, f"{place}; first {shorten(texts[0], 40)!r}", "no_option")
        return Failure(question.id, f"{place}; {failure.reason}", failure.kind)
    denominator = sum(counts) + len(counts) / 2
    log_probs = tuple(math.log((count + 0.5) / denominator) for count in counts)
    return Choice(question.id, log_probs, sum(counts) / len(answers))


def log_odds_of_mean_probability(log_odds: Sequence[float]) -> float:
    """log(mean s(x) / mean s(-x)) of log-odds x, s the logistic function, without overflow."""
    x = np.asarray(log_odds, dtype=float)
    better, worse = (-np.logaddexp(0.0, sign * x) for sign in (-1.0, 1.0))
    return float(np.logaddexp.reduce(better) - np.logaddexp.reduce(worse))


def expected_score(log_probs: Sequence[float]) -> float:
    """Mean of 1, 2, ... under the options' probabilities, normalised to a sum of 1."""
    p = np.exp(np.asarray(log_probs) - np.logaddexp.reduce(log_probs))
    return float(p @ np.arange(1, len(p) + 1))


def _comparisons(pairs: Sequence[ResponsePair], principles: PrinciplesByPair) -> Iterator[Comparison]:
    """All comparisons in the order of their questions: neighbours share a long prefix."""
    for pair in pairs:
        for order in ORDERS:
            for principle in principles[pair.id]:
                yield Comparison(pair, order, principle)
