"""Sends many requests or questions to a model at once, and makes rates of what came back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from cai.contracts.engine import Choice, Completion, Engine, Question, Sampling
from cai.contracts.engine import Request as Generation
from cai.maths.statistics import rate
from cai.storage.rows import Failure, Message, stable_seed
from cai.text.errors import StageFailed

Figures = dict[str, object]
Result = TypeVar("Result", Completion, Choice)


def generate_texts(
    engine: Engine, conversations: Mapping[str, Sequence[Message]], sampling: Sampling, seed: int
) -> dict[str, str]:
    """The model's response to each conversation, by id. Raises StageFailed if one fails."""
    requests = [Generation(id, messages, stable_seed(seed, id), sampling) for id, messages in conversations.items()]
    return {id: completion.text for id, completion in _by_id(engine.generate(requests), Completion).items()}


def choose_options(engine: Engine, questions: Sequence[Question]) -> dict[str, Choice]:
    """The model's choice for each question, by id. Raises StageFailed if one fails."""
    return _by_id(engine.choose(questions), Choice)


def _by_id(results: Iterable[Result | Failure], kind: type[Result]) -> dict[str, Result]:
    results_by_id: dict[str, Result] = {}
    for result in results:
        if not isinstance(result, kind):
            raise StageFailed(f"the model gave no answer to {result.id}: {getattr(result, 'reason', result)}")
        results_by_id[result.id] = result
    return results_by_id


def rate_of(rows: Iterable[tuple[bool, str]]) -> Figures:
    """Share of (is right, topic) rows that are right, with its interval clustered by topic."""
    values_and_topics = list(rows)
    rights, topics = [float(is_right) for is_right, _ in values_and_topics], [topic for _, topic in values_and_topics]
    return dict(rate(rights, topics).as_json())
