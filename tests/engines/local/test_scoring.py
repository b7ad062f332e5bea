"""Questions scored as prefix trees get the answers of one question a row, within the token budget."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_contract import conversation
from local_engines import assert_same_choices, judge_questions, with_and_without_shared_prefixes
from tiny_models import Tiny

from cai.attention.prefill import prefill
from cai.attention.shared_prefixes import Prefixes
from cai.contracts.engine import Question
from cai.engines.local import scoring
from cai.engines.local.scoring import PromptAndOptions
from cai.models.loading import load_causal_lm

CONVERSATION = [5] * 300
RESPONSES = [[*CONVERSATION, 6 + n % 7, 9 + n // 7, *[4] * (8 + n % 3)] for n in range(40)]
TURNS = [[token for turn in range(last + 1) for token in [6 + turn] * 60] for last in range(8)]


@pytest.mark.usefixtures("pads_sizes")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "thinking", "lora"])
def test_answers_are_those_of_one_question_a_row(tiny: Tiny, family: str) -> None:
    engine, row_by_row = with_and_without_shared_prefixes(tiny(family), token_budget=2048)
    questions = judge_questions(4)
    assert_same_choices(engine.choose(questions), row_by_row.choose(questions))
    assert engine._shares_prefixes


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_long_branches_get_the_answers_that_they_would_get_alone(tiny: Tiny, family: str) -> None:
    shared, endings = "how deep is the sea? " * 20, [" and why?", " tell me more about the sea, please" * 12]
    texts = [f"{n % 2} {shared}{n}{ending}" for n in range(4) for ending in endings]
    questions = [Question(text, conversation(text)) for text in texts]
    engine, row_by_row = with_and_without_shared_prefixes(tiny(family), token_budget=4096)
    assert_same_choices(engine.choose(questions), row_by_row.choose(questions))


@pytest.mark.parametrize(("prompts", "budget", "max_passes"), [
    ([[*response, 20 + n, *[3] * 9] for response in RESPONSES for n in range(3)], 2048, 41),
    # If all turns were held, each would hold the conversation again.
    ([[*CONVERSATION, *turn] for turn in TURNS], 1500, 12),
    ([[*CONVERSATION, 20 + n, *[3] * 9] for n in range(40)], 256, 41),  # less than one question needs
], ids=["a conversation with many responses", "a question after every turn", "too small a budget"])  # fmt: skip
def test_prefixes_that_are_held_at_once_stay_within_the_budget(
    prompts: list[list[int]], budget: int, max_passes: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[int, int] = {}
    n_held: list[int] = []

    def counting_prefill(*arguments: Any) -> tuple[torch.Tensor, Callable[[], Prefixes]]:
        logits, build_prefixes = prefill(*arguments)
        n_held.append(sum(held.values()))

        def build_counted() -> Prefixes:
            prefixes = build_prefixes()
            held[id(prefixes)] = prefixes.mask.numel()
            weakref.finalize(prefixes, held.pop, id(prefixes))
            return prefixes

        return logits, build_counted

    monkeypatch.setattr(scoring, "prefill", counting_prefill)
    lm = load_causal_lm(tiny("llama"))
    scores = dict(scoring.score(lm, [PromptAndOptions(prompt, [1, 2]) for prompt in prompts], budget))
    assert 300 <= max(n_held) <= max(budget, 300)
    assert len(n_held) <= max_passes
    assert not held
    for index in (0, len(prompts) - 1):
        with torch.inference_mode():
            log_probs = lm(input_ids=torch.tensor([prompts[index]])).logits[0, -1].log_softmax(dim=-1)
        assert scores[index] == pytest.approx(log_probs[[1, 2]].tolist(), abs=1e-4)
    assert len(scores) == len(prompts)
