"""Engines `local` on a CPU in float32, with or without shared prefixes, and the comparison of their answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from engine_contract import conversation

from cai.contracts.engine import Choice, Question
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.engines.local.local_engine import LocalEngine
from cai.storage.rows import Failure


def local_engine(model: Model, *, shares_prefixes: bool | None = None, **settings: Any) -> LocalEngine:
    """An engine with these profile settings. `shares_prefixes` overrides what a trial of the model would tell."""
    engine = LocalEngine(model, Profile.model_validate({"device": "cpu", "dtype": "float32", **settings}))
    if shares_prefixes is not None:
        engine.__dict__["_shares_prefixes"] = shares_prefixes
    return engine


def with_and_without_shared_prefixes(model: Model, **settings: Any) -> tuple[LocalEngine, LocalEngine]:
    """An engine that shares prefixes if the model can, and one that computes each row whole."""
    return local_engine(model, **settings), local_engine(model, shares_prefixes=False, **settings)


def make_end_of_turn_likely(engine: LocalEngine) -> None:
    """Raises the logit of the end of turn, so that responses have a few tokens each."""
    head = engine.lm.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    head.bias.data[engine.chat.end_of_turn] = 6.0


def assert_same_choices(ours: Iterable[Choice | Failure], theirs: Iterable[Choice | Failure]) -> None:
    """Both have a choice for the same questions, with the same log-probabilities up to rounding in float32."""
    both = [sorted(results, key=lambda result: result.id) for results in (ours, theirs)]
    assert [result.id for result in both[0]] == [result.id for result in both[1]]
    for choice, expected in zip(*both, strict=True):
        assert choice.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
        assert choice.option_probability == pytest.approx(expected.option_probability, abs=1e-4)


def judge_questions(n_responses: int) -> list[Question]:
    """Questions about pairs of responses in both orders, the principle last; the first question comes twice."""
    principles = ["harmless", "honest and true", "kind", "useful to whoever asks", "brief"]
    responses = [f"I say {n}, and then {n * 7} more words about the sea" for n in range(n_responses)]
    text = "Human: how deep is the sea?\nA: {}\nB: {}\nWhich is more {}?"
    compared = [(*pair, name) for pair in itertools.permutations(responses, 2) for name in principles]
    questions = [Question("|".join(words), conversation(text.format(*words))) for words in compared]
    return [*questions, Question("again", questions[0].messages)]
