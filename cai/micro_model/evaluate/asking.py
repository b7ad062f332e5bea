"""How a model is asked many things at once, and how what it said becomes a figure."""

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


def write(engine: Engine, asked: Mapping[str, Sequence[Message]], sampling: Sampling, seed: int) -> dict[str, str]:
    """What the model writes after each conversation."""
    wanted = [Generation(id, messages, stable_seed(seed, id), sampling) for id, messages in asked.items()]
    return {id: completion.text for id, completion in _complete(engine.generate(wanted), Completion).items()}


def choose(engine: Engine, asked: Sequence[Question]) -> dict[str, Choice]:
    """What the model makes of the options of each question."""
    return _complete(engine.choose(asked), Choice)


def _complete(results: Iterable[Result | Failure], kind: type[Result]) -> dict[str, Result]:
    found: dict[str, Result] = {}
    for result in results:
        if not isinstance(result, kind):
            raise StageFailed(f"the model gave no answer to {result.id}: {getattr(result, 'reason', result)}")
        found[result.id] = result
    return found


def rate_of(rows: Iterable[tuple[bool, str]]) -> Figures:
    """The share of (right or not, topic) rows that are right, with its interval clustered by topic."""
    listed = list(rows)
    return rate([float(value) for value, _ in listed], [topic for _, topic in listed]).as_json()
