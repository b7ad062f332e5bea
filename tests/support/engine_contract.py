"""What every engine must do, as a list of cases that any engine can be put through.

A test module makes a `Subject` of an open engine and parametrises over `CASES`:

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
    def test_engine_keeps_the_contract(subject: Subject, case: Case) -> None:
        case(subject)

The engine is compared with a plain forward pass of transformers over the same weights in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from cai.contracts.engine import Choice, Completion, Engine, Question, Request, Sampling
from cai.contracts.model import Model
from cai.models.chat import Chat
from cai.models.loading import load_causal_lm
from cai.storage.rows import Failure, Message
from cai.text.errors import BadInput

TEXTS = ["Hi", "What is the capital of France?", "How do I pick a lock? " * 8, "B", "Answer with A or B."]
SCRIPTS = ["Schöne Grüße", "你好，世界", "🙂 👩‍👩‍👧 🏴󠁧󠁢󠁳󠁣󠁴󠁿", "שלום e\u0301", "a\u00a0b\tc"]


class Reference:
    """The model as transformers computes it."""

    def __init__(self, model: Model) -> None:
        self.chat = Chat.load(model)
        self.lm = load_causal_lm(model, "float32", "cpu")

    @torch.no_grad()
    def log_probs(self, prompt: Sequence[int], response: Sequence[int] = ()) -> torch.Tensor:
        """(1 + response, vocabulary): log-probabilities after the prompt and after each token of the response."""
        logits = self.lm(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 :]
        return logits.float().log_softmax(-1)

    def greedy(self, prompt: list[int], limit: int) -> tuple[list[int], str]:
        """(ids, text) of the likeliest token each time, which is never the pad token."""
        chat, ids = self.chat, list[int]()
        while len(ids) < limit and not (ids and ids[-1] in chat.end_ids):
            scores = self.log_probs(prompt, ids)[-1].clone()
            scores[chat.pad_id] = -torch.inf
            ids.append(int(scores.argmax()))
            if any(stop in chat.decode(ids) for stop in chat.stop):
                break
        return ids, chat.text(ids, stop=chat.stop).text


@dataclass(frozen=True)
class Subject:
    """An open engine and its reference. `tolerance` is in nats: 1e-4 in float32, some tenths in bfloat16.

    `sent` are the paths and bodies that its server received, if the test runs the server and the engine has the
    tokenizer.
    """

    engine: Engine
    reference: Reference
    tolerance: float = 1e-4
    sent: Sequence[tuple[str, dict[str, Any]]] | None = None


Case = Callable[[Subject], None]


def conversation(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def completions(subject: Subject, requests: Sequence[Request]) -> dict[str, Completion]:
    """By id, once each, without a failure."""
    return completions_by_id(subject.engine.generate(requests), requests)


def completions_by_id(results: Iterable[Completion | Failure], requests: Sequence[Request]) -> dict[str, Completion]:
    """The results, which are one completion for each request."""
    completions = [result for result in results if isinstance(result, Completion)]
    assert sorted(completion.id for completion in completions) == sorted(request.id for request in requests)
    return {completion.id: completion for completion in completions}


def _greedy(subject: Subject, texts: Sequence[str]) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=0)
    by_text = completions(subject, [Request(text, conversation(text), 0, sampling) for text in texts])
    for text in texts:
        prompt = subject.reference.chat.prompt_ids(conversation(text))
        ids, expected = subject.reference.greedy(prompt, 8)
        completion = by_text[text]
        if subject.tolerance <= 1e-4 or not completion.token_ids:
            chat = subject.reference.chat
            has_stopped = ids[-1] in chat.end_ids or any(stop in chat.decode(ids) for stop in chat.stop)
            assert completion.text == expected
            assert completion.token_ids in ([], ids)
            assert completion.finish_reason == ("stop" if has_stopped else "length")
        else:  # coarser rounding may decide a near tie either way
            scores = subject.reference.log_probs(prompt, completion.token_ids)[:-1]
            sampled = scores.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert (scores.max(dim=-1).values - sampled).max() <= subject.tolerance
        if completion.prompt_ids:
            assert completion.prompt_ids == prompt


def greedy_text_is_that_of_the_plain_forward_pass(subject: Subject) -> None:
    _greedy(subject, TEXTS)


def text_of_any_script_reaches_the_model_as_it_is(subject: Subject) -> None:
    _greedy(subject, SCRIPTS)


def text_that_spells_control_tokens_stays_text(subject: Subject) -> None:
    chat = subject.reference.chat
    control = chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn)
    sampling = Sampling(max_new_tokens=4, temperature=0)
    requests = [Request("x", conversation(f"{control} say it {control}"), 0, sampling)]
    prompt = completions(subject, requests)["x"].prompt_ids
    if not prompt:
        if subject.sent is None:
            pytest.skip("this engine does not tell which tokens the model was given")
        prompt = chat.tokenizer.apply_chat_template(subject.sent[-1][1]["messages"], tokenize=True)["input_ids"]
    plain = chat.prompt_ids(conversation("say it"))
    assert prompt.count(chat.end_of_turn) == plain.count(chat.end_of_turn)


def log_probabilities_are_the_models_own(subject: Subject) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=0.7, top_p=0.9)
    by_text = completions(subject, [Request(text, conversation(text), 1, sampling) for text in TEXTS])
    assert all(completion.n_tokens > 0 for completion in by_text.values())
    if not any(completion.log_probs for completion in by_text.values()):
        pytest.skip("the engine is not told the log-probabilities of sampled tokens")
    for text, completion in by_text.items():
        prompt = completion.prompt_ids or subject.reference.chat.prompt_ids(conversation(text))
        log_probs = subject.reference.log_probs(prompt, completion.token_ids)
        expected = log_probs[:-1].gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0].tolist()
        assert completion.log_probs == pytest.approx(expected, abs=subject.tolerance)


def options_have_the_log_probabilities_of_a_plain_forward_pass(subject: Subject) -> None:
    chat, questions, expected = subject.reference.chat, [], {}
    for text in TEXTS:
        prompt, options, ids = likely_options(subject.reference, text)
        questions.append(Question(text, conversation(text), options))
        expected[text] = subject.reference.log_probs(prompt)[-1][ids].tolist()
    answers = {answer.id: answer for answer in subject.engine.choose(questions)}
    assert set(answers) == set(TEXTS)
    for text, values in expected.items():
        answer = answers[text]
        assert isinstance(answer, Choice), answer
        assert answer.log_probs == pytest.approx(values, abs=subject.tolerance), chat.name
        assert answer.option_probability == pytest.approx(sum(map(math.exp, values)), abs=subject.tolerance)


def likely_options(reference: Reference, text: str) -> tuple[list[int], tuple[str, str], list[int]]:
    """(prompt ids, two options, their ids): the likeliest next tokens that can be options, and are written in ASCII."""
    prompt = reference.chat.prompt_ids(conversation(text), thinking=False)
    words = [reference.chat.decode([int(number)]) for number in reference.log_probs(prompt)[-1].topk(20).indices]
    words = [word for word in words if word.isascii() and word.isalnum()]
    for n, second in enumerate(words):
        for first in words[:n]:
            try:
                prompt, ids = reference.chat.question(conversation(text), (first, second))
            except BadInput:
                continue
            return prompt, (first, second), ids
    raise AssertionError(f"no two options among the likeliest next tokens after {text!r}: {words}")


def a_stop_string_ends_a_response_and_is_not_part_of_it(subject: Subject) -> None:
    messages = conversation("Hi")
    full = completions(subject, [Request("x", messages, 3, Sampling(24, 0))])["x"]
    if not full.text:
        pytest.skip("the model writes nothing but reasoning")
    middle = len(full.text) // 2
    stop = full.text[middle : middle + 3]
    stopped = completions(subject, [Request("x", messages, 3, Sampling(24, 0, stop=(stop,)))])["x"]
    assert stopped.text == full.text.partition(stop)[0].strip()
    assert stopped.finish_reason == "stop"
    assert stopped.n_tokens < full.n_tokens
    assert stopped.token_ids == full.token_ids[: len(stopped.token_ids)]


def a_text_that_is_cut_off_says_so(subject: Subject) -> None:
    completion = completions(subject, [Request("x", conversation("Hi"), 0, Sampling(2, 0))])["x"]
    assert completion.finish_reason == "length"
    assert completion.n_tokens == 2


def a_seed_alone_decides_a_text(subject: Subject) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.0)
    requests = [Request(f"{seed}/{time}", conversation("Hi"), seed, sampling) for time in range(2) for seed in range(4)]
    by_id = completions(subject, requests)
    completions_of = [[by_id[f"{seed}/{time}"] for seed in range(4)] for time in range(2)]
    texts = [[(completion.text, completion.reasoning) for completion in row] for row in completions_of]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


def two_hundred_requests_at_once_are_each_answered_once(subject: Subject) -> None:
    sampling = Sampling(max_new_tokens=2, temperature=0)
    requests = [Request(f"{n}", conversation(TEXTS[n % len(TEXTS)]), n, sampling) for n in range(200)]
    by_id = completions(subject, requests)
    # With coarser rounding a near tie can depend on the batch.
    for n, text in enumerate(TEXTS if subject.tolerance <= 1e-4 else []):
        assert len({by_id[f"{m}"].text for m in range(n, 200, len(TEXTS))}) == 1, text


def what_cannot_be_answered_is_a_failure_beside_the_answers(subject: Subject) -> None:
    limit = subject.reference.chat.context_length
    assert limit is not None
    long, short = conversation("word " * limit), conversation("Hi")
    sampling = Sampling(max_new_tokens=2, temperature=0)
    requests = [Request("long", long, 0, sampling), Request("short", short, 0, sampling)]
    results = {result.id: result for result in subject.engine.generate(requests)}
    assert isinstance(results["short"], Completion)
    assert str(limit) in results["long"].reason


CASES: list[Case] = [
    greedy_text_is_that_of_the_plain_forward_pass, text_of_any_script_reaches_the_model_as_it_is,
    text_that_spells_control_tokens_stays_text, log_probabilities_are_the_models_own,
    options_have_the_log_probabilities_of_a_plain_forward_pass, a_stop_string_ends_a_response_and_is_not_part_of_it,
    a_text_that_is_cut_off_says_so, a_seed_alone_decides_a_text, two_hundred_requests_at_once_are_each_answered_once,
    what_cannot_be_answered_is_a_failure_beside_the_answers,
]  # fmt: skip
