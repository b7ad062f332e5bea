"""What every engine must do, as a list of cases that any engine can be put through.

A test module makes a `Subject` of an open engine and parametrises over `CASES`:

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
    def test_engine_keeps_the_contract(subject: Subject, case: Case) -> None:
        case(subject)

The engine is held to a plain forward pass of transformers over the same weights in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    def log_probs(self, prompt: Sequence[int], drawn: Sequence[int] = ()) -> torch.Tensor:
        """(1 + drawn, vocabulary): the distribution behind the prompt and behind each drawn token."""
        logits = self.lm(torch.tensor([[*prompt, *drawn]])).logits[0, len(prompt) - 1 :]
        return logits.float().log_softmax(-1)

    def greedy(self, prompt: list[int], limit: int) -> tuple[list[int], str]:
        """(ids, text) of the likeliest token each time, padding apart."""
        chat, drawn = self.chat, list[int]()
        while len(drawn) < limit and not (drawn and drawn[-1] in chat.end_ids):
            scores = self.log_probs(prompt, drawn)[-1].clone()
            scores[chat.pad_id] = -torch.inf
            drawn.append(int(scores.argmax()))
            if any(stop in chat.decode(drawn) for stop in chat.stop):
                break
        return drawn, chat.text(drawn, stop=chat.stop).text


@dataclass(frozen=True)
class Subject:
    """An open engine, and what it is held to. `tolerance` is in nats: 1e-4 in float32, some tenths in bfloat16.

    `sent`: the paths and bodies that its server was sent, where a test holds the server and the engine the tokenizer.
    """

    engine: Engine
    reference: Reference
    tolerance: float = 1e-4
    sent: Sequence[tuple[str, dict[str, Any]]] | None = None


Case = Callable[[Subject], None]


def asked(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def completions(subject: Subject, requests: Sequence[Request]) -> dict[str, Completion]:
    """By id; each request answered once."""
    results = list(subject.engine.generate(requests))
    assert sorted(result.id for result in results) == sorted(request.id for request in requests)
    assert not [result for result in results if isinstance(result, Failure)]
    return {result.id: result for result in results if isinstance(result, Completion)}


def _greedy(subject: Subject, texts: Sequence[str]) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=0)
    done = completions(subject, [Request(text, asked(text), 0, sampling) for text in texts])
    for text in texts:
        prompt = subject.reference.chat.prompt_ids(asked(text))
        ids, expected = subject.reference.greedy(prompt, 8)
        found = done[text]
        if subject.tolerance <= 1e-4 or not found.token_ids:
            assert found.text == expected
            assert found.token_ids in ([], ids)
        else:  # a near tie may fall to either side where numbers are rounded more coarsely
            scores = subject.reference.log_probs(prompt, found.token_ids)[:-1]
            chosen = scores.gather(1, torch.tensor(found.token_ids)[:, None])[:, 0]
            assert (scores.max(dim=-1).values - chosen).max() <= subject.tolerance
        if found.prompt_ids:
            assert found.prompt_ids == prompt


def greedy_text_is_that_of_the_plain_forward_pass(subject: Subject) -> None:
    _greedy(subject, TEXTS)


def text_of_any_script_reaches_the_model_as_it_is(subject: Subject) -> None:
    _greedy(subject, SCRIPTS)


def text_that_spells_control_tokens_stays_text(subject: Subject) -> None:
    chat = subject.reference.chat
    control = chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn)
    sampling = Sampling(max_new_tokens=4, temperature=0)
    (done,) = completions(subject, [Request("x", asked(f"{control} say it {control}"), 0, sampling)]).values()
    prompt = done.prompt_ids
    if not prompt:
        if subject.sent is None:
            pytest.skip("nothing tells here what the model was given")
        prompt = chat.tokenizer.apply_chat_template(subject.sent[-1][1]["messages"], tokenize=True)["input_ids"]
    plain = chat.prompt_ids(asked("say it"))
    assert prompt.count(chat.end_of_turn) == plain.count(chat.end_of_turn)


def log_probabilities_are_the_models_own(subject: Subject) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=0.7, top_p=0.9)
    made = completions(subject, [Request(text, asked(text), 1, sampling) for text in TEXTS])
    assert all(done.n_tokens > 0 for done in made.values())
    if not any(done.log_probs for done in made.values()):
        pytest.skip("the engine is not told the log-probabilities of what was drawn")
    for text, done in made.items():
        prompt = done.prompt_ids or subject.reference.chat.prompt_ids(asked(text))
        rows = subject.reference.log_probs(prompt, done.token_ids)
        theirs = rows[:-1].gather(1, torch.tensor(done.token_ids)[:, None])[:, 0].tolist()
        assert done.log_probs == pytest.approx(theirs, abs=subject.tolerance)


def options_have_the_log_probabilities_of_a_plain_forward_pass(subject: Subject) -> None:
    chat, questions, expected = subject.reference.chat, [], {}
    for text in TEXTS:
        prompt, options, ids = likely_options(subject.reference, text)
        questions.append(Question(text, asked(text), options))
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
    prompt, _ = reference.chat.prompt_ids(asked(text), thinking=False), None
    words = [reference.chat.decode([int(number)]) for number in reference.log_probs(prompt)[-1].topk(20).indices]
    words = [word for word in words if word.isascii() and word.isalnum()]
    for n, second in enumerate(words):
        for first in words[:n]:
            try:
                prompt, ids = reference.chat.question(asked(text), (first, second))
            except BadInput:
                continue
            return prompt, (first, second), ids
    raise AssertionError(f"no two options among the likeliest next tokens behind {text!r}: {words}")


def a_stop_string_ends_a_response_and_is_not_part_of_it(subject: Subject) -> None:
    messages = asked("Hi")
    (whole,) = completions(subject, [Request("x", messages, 3, Sampling(24, 0))]).values()
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    (cut,) = completions(subject, [Request("x", messages, 3, Sampling(24, 0, stop=(stop,)))]).values()
    assert cut.text == whole.text.partition(stop)[0].strip()
    assert cut.finish_reason == "stop"
    assert cut.n_tokens < whole.n_tokens


def a_text_that_is_cut_off_says_so(subject: Subject) -> None:
    (done,) = completions(subject, [Request("x", asked("Hi"), 0, Sampling(2, 0))]).values()
    assert done.finish_reason == "length"
    assert done.n_tokens == 2


def a_seed_alone_decides_a_text(subject: Subject) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.0)
    requests = [Request(f"{seed}/{time}", asked("Hi"), seed, sampling) for time in range(2) for seed in range(4)]
    done = completions(subject, requests)
    assert all(done[f"{seed}/0"].text == done[f"{seed}/1"].text for seed in range(4))
    assert len({done[f"{seed}/0"].text for seed in range(4)}) > 1


def two_hundred_requests_at_once_are_each_answered_once(subject: Subject) -> None:
    sampling = Sampling(max_new_tokens=2, temperature=0)
    requests = [Request(f"{n}", asked(TEXTS[n % len(TEXTS)]), n, sampling) for n in range(200)]
    done = completions(subject, requests)
    for n, text in enumerate(TEXTS if subject.tolerance <= 1e-4 else []):  # else a near tie turns with the batch
        assert len({done[f"{m}"].text for m in range(n, 200, len(TEXTS))}) == 1, text


def what_cannot_be_answered_is_a_failure_beside_the_answers(subject: Subject) -> None:
    limit = subject.reference.chat.context_length
    assert limit is not None
    long, short = asked("word " * limit), asked("Hi")
    sampling = Sampling(max_new_tokens=2, temperature=0)
    made = {each.id: each for each in subject.engine.generate([Request("long", long, 0, sampling),
                                                               Request("short", short, 0, sampling)])}  # fmt: skip
    assert isinstance(made["short"], Completion)
    assert isinstance(made["long"], Failure)
    assert str(limit) in made["long"].reason


CASES: list[Case] = [
    greedy_text_is_that_of_the_plain_forward_pass,
    text_of_any_script_reaches_the_model_as_it_is,
    text_that_spells_control_tokens_stays_text,
    log_probabilities_are_the_models_own,
    options_have_the_log_probabilities_of_a_plain_forward_pass,
    a_stop_string_ends_a_response_and_is_not_part_of_it,
    a_text_that_is_cut_off_says_so,
    a_seed_alone_decides_a_text,
    two_hundred_requests_at_once_are_each_answered_once,
    what_cannot_be_answered_is_a_failure_beside_the_answers,
]
