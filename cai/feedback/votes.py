"""Puts a pair of responses to a judge, principle by principle, in both orders: the questions and the resulting votes.

The judge's log-odds that *a* is better is the difference of the next-token log-probabilities of the two options (Lee et
al. 2023, arXiv 2309.00267). Left out: which pairs and principles are asked about (stages choose) and how votes become
labels (`cai.feedback.labelled_votes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from cai.constitution import Principle
from cai.contracts.engine import Choice, Engine, Question
from cai.engines.retry import choose_all
from cai.maths.vote_aggregation import mean_over_orders
from cai.storage.rows import Failure, Message, PrincipleVote
from cai.templates import OPTIONS, TemplateSet

Order = Literal["ab", "ba"]
ORDERS: tuple[Order, ...] = ("ab", "ba")
"""Which response is shown first."""
MIN_OPTION_PROBABILITY = 0.1
"""Default of the probability that the options must hold together."""


class ResponsePair(NamedTuple):
    """Two responses to one conversation. `id` is unique among the pairs of one call."""

    id: str
    messages: Sequence[Message]
    a: str
    b: str

    def in_order(self, order: str) -> tuple[str, str]:
        """The response that is shown first and the one that is shown second."""
        return (self.a, self.b) if order == "ab" else (self.b, self.a)


def is_empty(text: str) -> bool:
    """Whether a response has no visible character: only blanks and marks without a shape."""
    return not any(char.isprintable() and not char.isspace() for char in text)


def to_questions(pair: ResponsePair, principles: Sequence[Principle], templates: TemplateSet) -> Iterator[Question]:
    """The questions about a pair, order by order, then principle by principle: neighbours share a long prefix."""
    for order in ORDERS:
        first, second = pair.in_order(order)
        for principle in principles:
            yield Question(
                question_id(pair, order, principle), templates.compare(pair.messages, first, second, principle), OPTIONS
            )


def judge_pairs(
    engine: Engine, templates: TemplateSet, cases: Sequence[tuple[ResponsePair, Principle]], retries: int,
    on_choice: Callable[[Choice], None] | None = None,
) -> list[tuple[list[PrincipleVote], list[Failure]]]:  # fmt: skip
    """The votes of each pair by its principle, and what failed, with a `MIN_OPTION_PROBABILITY`.

    `on_choice` is called with each answer, two for each pair, as it comes in.
    """
    questions = [question for pair, principle in cases for question in to_questions(pair, [principle], templates)]
    answers = choose_all(engine, questions, retries, on_choice=on_choice)
    return [to_votes(pair, [principle], answers, MIN_OPTION_PROBABILITY) for pair, principle in cases]


def to_votes(
    pair: ResponsePair,
    principles: Sequence[Principle],
    answers: Mapping[str, Choice | Failure],
    min_option_probability: float,
) -> tuple[list[PrincipleVote], list[Failure]]:
    """The votes of `complete_votes` from the answers by question id.

    An answer whose options hold less than `min_option_probability` together is a failure.
    """
    votes_by_principle = [
        [_to_vote(pair, order, principle, answers, min_option_probability) for order in ORDERS]
        for principle in principles
    ]
    return complete_votes(votes_by_principle)


def complete_votes(
    votes_by_principle: Sequence[Sequence[PrincipleVote | Failure]],
) -> tuple[list[PrincipleVote], list[Failure]]:
    """The votes of principles that were answered in both orders, and all failures.

    A vote in one order alone would leak the judge's position bias.
    """
    votes: list[PrincipleVote] = []
    failures: list[Failure] = []
    for both_orders in votes_by_principle:
        failed = [vote for vote in both_orders if isinstance(vote, Failure)]
        failures += failed
        if not failed:
            votes += [vote for vote in both_orders if not isinstance(vote, Failure)]
    return votes, failures


def with_known_votes(
    pair: ResponsePair, principles: Sequence[Principle], asked: tuple[list[PrincipleVote], list[Failure]],
    known: Mapping[str, Sequence[PrincipleVote]],
) -> tuple[list[PrincipleVote], list[Failure]]:  # fmt: skip
    """Votes that were asked for and known ones in the order of the principles, and what failed; one failure of the pair
    if no principle has votes."""
    votes, failures = asked
    if known:
        by_principle = {**known}
        for principle in principles:
            if both_orders := [vote for vote in votes if vote["principle"] == principle.id]:
                by_principle[principle.id] = both_orders
        votes = [vote for principle in principles for vote in by_principle.get(principle.id, ())]
    if failures and not votes:
        place = f"no principle was answered in both orders; first of {len(failures)}"
        failures = [failures[0].at(place, pair.id)]
    return votes, failures


def _to_vote(
    pair: ResponsePair,
    order: Order,
    principle: Principle,
    answers: Mapping[str, Choice | Failure],
    min_option_probability: float,
) -> PrincipleVote | Failure:
    answer = with_enough_probability(answers[question_id(pair, order, principle)], min_option_probability)
    if isinstance(answer, Failure):
        return failed_vote(answer, pair, order, principle)
    return PrincipleVote(
        principle=principle.id,
        order=order,
        log_odds=log_odds_of_a(answer, order),
        option_probability=answer.option_probability,
    )


def failed_vote(failure: Failure, pair: ResponsePair, order: Order, principle: Principle) -> Failure:
    """The failure with the vote that it belongs to in its reason."""
    return failure.at(f"pair {pair.id}, {principle.id!r}, order {order}")


def log_odds_of_a(choice: Choice, order: Order) -> float:
    """Log-odds (nats) that *a* is better from the choice between the response shown first and the one shown second."""
    first_is_better = choice.log_probs[0] - choice.log_probs[1]
    return first_is_better if order == "ab" else -first_is_better


def mean_log_odds(votes: Sequence[PrincipleVote]) -> float | None:
    """Mean log-odds of one principle's votes in both orders; None without votes."""
    return mean_over_orders(votes[0]["log_odds"], votes[1]["log_odds"]) if votes else None


def with_enough_probability(answer: Choice | Failure, min_option_probability: float) -> Choice | Failure:
    """The answer; a failure if its options hold less than `min_option_probability` together, or no number."""
    if isinstance(answer, Choice) and not answer.option_probability >= min_option_probability:
        reason = f"the options hold {answer.option_probability:.3g} of the probability"
        return Failure(answer.id, f"{reason}, less than min_option_probability {min_option_probability:g}", "unclear")
    return answer


def question_id(pair: ResponsePair, order: str, principle: Principle) -> str:
    """Id of the question about a pair in one order by one principle."""
    return f"{pair.id}/{order}/{principle.id}"
