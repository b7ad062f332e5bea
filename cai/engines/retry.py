"""Asks an engine again what it could not answer.

Only chance and the network can turn a failure into an answer: a drawn text gets another seed with every attempt, an
over-long prompt fails as quickly the second time as the first. Thinking without a response after it is no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from cai.contracts.engine import Choice, Completion, Engine, Question, Request
from cai.storage.rows import Failure, stable_seed

Asked = TypeVar("Asked", Request, Question)


def generate_all(
    engine: Engine, requests: Sequence[Request], retries: int, *, whole: bool = False
) -> dict[str, Completion | Failure]:
    """The completion of every request by its id, or the last failure after 1 + `retries` attempts.

    With `whole` a text that was cut off is a failure.
    """
    results: dict[str, Completion | Failure] = {}
    for attempt in range(1 + retries):
        again = unanswered(requests, results)
        if not again:
            break
        if attempt:
            again = [replace(request, seed=stable_seed(request.seed, attempt)) for request in again]
        results.update((result.id, _answer(result, whole)) for result in engine.generate(again))
    return results


def _answer(result: Completion | Failure, whole: bool) -> Completion | Failure:
    if isinstance(result, Failure):
        return result
    if whole and result.finish_reason == "length":
        return Failure(result.id, f"it was cut off after {result.n_tokens} tokens, before it came to an end")
    if result.text or not result.reasoning:
        return result
    return Failure(result.id, f"its reasoning took all {result.n_tokens} tokens and no response followed")


def choose_all(engine: Engine, questions: Sequence[Question], retries: int) -> dict[str, Choice | Failure]:
    """The choice for every question by its id, or the last failure after 1 + `retries` attempts."""
    results: dict[str, Choice | Failure] = {}
    for _ in range(1 + retries):
        again = unanswered(questions, results)
        if not again:
            break
        results.update((result.id, result) for result in engine.choose(again))
    return results


def unanswered(
    asked: Sequence[Asked], results: dict[str, Completion | Failure] | dict[str, Choice | Failure]
) -> list[Asked]:
    """What of `asked` has no result yet or failed, in order."""
    return [one for one in asked if isinstance(results.get(one.id, Failure(one.id, "")), Failure)]
