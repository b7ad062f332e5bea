"""Retries of requests and questions that an engine could not answer.

A retry can succeed where the network or chance decides: a sampled text gets another seed with every attempt. An
over-long prompt fails again at once. Reasoning without a response after it is a failure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from cai.contracts.engine import Choice, Completion, CountsTokens, Engine, Question, Request
from cai.storage.rows import Failure, stable_seed

Item = TypeVar("Item", Request, Question)


def generate_all(
    engine: Engine, requests: Sequence[Request], retries: int, *, fail_if_cut_off: bool = False,
    on_completion: Callable[[Completion], None] | None = None, on_tokens: Callable[[int], None] | None = None,
) -> dict[str, Completion | Failure]:  # fmt: skip
    """The completion of every request by its id, or the last failure after 1 + `retries` attempts.

    With `fail_if_cut_off` a text that reached its token limit is a failure. `on_completion` is called with each
    completion as the engine yields it, `on_tokens` with numbers of sampled tokens: at each decode step where the engine
    tells of them, else with each completion.
    """
    results: dict[str, Completion | Failure] = {}
    for attempt in range(1 + retries):
        pending = _unanswered(requests, results)
        if not pending:
            break
        if attempt:
            pending = [replace(request, seed=stable_seed(request.seed, attempt)) for request in pending]
        with _counting_tokens(engine, on_tokens) as tells_at_each_step:
            for answer in engine.generate(pending):
                result = results[answer.id] = _check(answer, fail_if_cut_off)
                if on_tokens and not tells_at_each_step and isinstance(answer, Completion):
                    on_tokens(answer.n_tokens)
                if on_completion and isinstance(result, Completion):
                    on_completion(result)
    return results


@contextlib.contextmanager
def _counting_tokens(engine: object, on_tokens: Callable[[int], None] | None) -> Iterator[bool]:
    """Has the engine tell of tokens at each decode step within the block; yields whether it does."""
    if not isinstance(engine, CountsTokens):
        yield False
        return
    engine.on_tokens = on_tokens
    try:
        yield True
    finally:
        engine.on_tokens = None


def _check(result: Completion | Failure, fail_if_cut_off: bool) -> Completion | Failure:
    if isinstance(result, Failure):
        return result
    if fail_if_cut_off and result.finish_reason == "length":
        return Failure(result.id, f"it was cut off after {result.n_tokens} tokens, before it came to an end", "cut_off")
    if result.text or not result.reasoning:
        return result
    return Failure(result.id, f"its reasoning took all {result.n_tokens} tokens and no response followed", "cut_off")


def choose_all(
    engine: Engine, questions: Sequence[Question], retries: int, *,
    on_choice: Callable[[Choice], None] | None = None,
) -> dict[str, Choice | Failure]:  # fmt: skip
    """The choice for every question by its id, or the last failure after 1 + `retries` attempts.

    `on_choice` is called with each choice as the engine yields it.
    """
    results: dict[str, Choice | Failure] = {}
    for _ in range(1 + retries):
        pending = _unanswered(questions, results)
        if not pending:
            break
        for answer in engine.choose(pending):
            results[answer.id] = answer
            if on_choice and isinstance(answer, Choice):
                on_choice(answer)
    return results


def _unanswered(items: Sequence[Item], results: Mapping[str, object]) -> list[Item]:
    return [item for item in items if isinstance(results.get(item.id, Failure(item.id, "")), Failure)]
