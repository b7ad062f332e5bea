"""The server engine where servers fail, return less than it needs, or return what must not be shown."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import small_server
import tiny_models
from engine_contract import Reference, completions_by_id, conversation, likely_options
from small_server import Behaviour, ServedModel, Server, serving, when
from tiny_models import Tiny

from cai.contracts.engine import Choice, Completion, Question, Request, Sampling
from cai.contracts.model import Model
from cai.contracts.profile import Server as Settings
from cai.engines import server_connection
from cai.engines.server import Capabilities, ServerEngine
from cai.engines.server_answers import Generated, NextTokens, read_options, read_text
from cai.models.reference import resolve
from cai.storage.rows import Failure
from cai.text.errors import BadInput, StageFailed

KEY = "sk-not-to-be-seen-0123456789"
GREEDY = Sampling(max_new_tokens=3, temperature=0)
REQUESTS = [Request(f"{n}", conversation("Hi" * n), n, GREEDY) for n in range(1, 9)]


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Model:
    return tiny("llama")


@pytest.fixture(scope="module")
def served_model(model: Model) -> ServedModel:
    return ServedModel(model)


@pytest.fixture
def server(served_model: ServedModel) -> Iterator[Server]:
    with serving(served_model) as server:
        yield server


@pytest.fixture
def start(model, served_model) -> Callable[..., AbstractContextManager[tuple[Server, ServerEngine]]]:
    """`start(behaviour, **settings)` is a server that behaves so, and an engine with these `server:` settings."""

    @contextmanager
    def start_(behaviour: Behaviour | None = None, model: Model = model, **settings: object):
        with serving(served_model, behaviour) as server, opened(server, model, **settings) as engine:
            yield server, engine

    return start_


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_connection, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(server_connection, "LONGEST_WAIT", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def opened(server: Server, model: Model, **settings: object) -> ServerEngine:
    names = {model.name: "tiny"}
    return ServerEngine(model, Settings.model_validate({"url": server.url, "names": names, **settings}))


def always(number: int) -> bool:
    return True


def model_known_by_name() -> Model:
    return resolve("served:tiny", folder=Path())


PASSING_FAULTS = {
    "429": small_server.too_many(until=12), "500": small_server.broken(until=12),
    "truncated": small_server.truncated(until=12), "reset": small_server.reset(until=12),
    "slow": small_server.slow(until=2, seconds=3.0),
}  # fmt: skip


@pytest.mark.parametrize("fault", PASSING_FAULTS.values(), ids=PASSING_FAULTS)
def test_what_passes_is_waited_for_and_nothing_is_lost(start, fault) -> None:
    with start(Behaviour(fault=fault), timeout=2, retries=20) as (server, engine):
        completions_by_id(engine.generate(REQUESTS), REQUESTS)
        assert server.n_requests > len(REQUESTS)


@pytest.mark.parametrize(("fault", "reason"), [
    (small_server.too_many(until=99), "answered 429: slow down, 3 times in a row"),
    (small_server.too_many(until=99, after="7200"), "it asks to wait 7200 seconds"),
    (small_server.broken(until=99), "answered 500: it broke, 3 times in a row"),
    (small_server.truncated(until=99), "3 times in a row"),
    (small_server.slow(until=99, seconds=0.4), "gave no answer within 0.2 seconds, 3 times in a row"),
    (small_server.reset(until=99), "cannot be reached"),
])  # fmt: skip
def test_what_stays_broken_is_a_failure_that_says_how(start, fault, reason) -> None:
    with start(Behaviour(fault=fault), timeout=0.2, retries=2) as (server, engine):
        _ = engine.capabilities
        for result in engine.generate(REQUESTS[:2]):
            assert reason in result.reason
            assert server.url in result.reason


def test_a_server_that_vanishes_and_comes_back_loses_nothing(model, served_model, monkeypatch) -> None:
    monkeypatch.setattr(server_connection, "LONGEST_WAIT", 0.2)
    gone = threading.Event()

    def vanish(number: int, server: Server, handler: small_server.Handler) -> bool:
        if number > 3:
            gone.set()
            small_server.hang_up(handler)
        return number > 3

    with serving(served_model, Behaviour(fault=vanish)) as server:
        engine = opened(server, model, retries=20, concurrency=2)
        results = engine.generate(REQUESTS)
        received = [next(results)]
        assert gone.wait(20)
        port = int(server.url.split(":")[2].split("/")[0])
    with engine, serving(served_model, port=port) as back:
        received += results
        assert back.n_requests >= len(REQUESTS) - 3
    completions_by_id(received, REQUESTS)


def test_waits_double_from_the_first_and_are_as_long_as_the_server_asks(model, served_model, monkeypatch) -> None:
    waits: list[float] = []

    async def pause(seconds: float) -> None:
        waits.extend([seconds] if seconds > 0 else [])

    monkeypatch.setattr(server_connection, "pause", pause)
    monkeypatch.setattr(server_connection, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(server_connection, "LONGEST_WAIT", 4.0)
    with serving(served_model, Behaviour(fault=small_server.broken(until=5))) as server:
        with opened(server, model) as engine:
            assert len(list(engine.generate(REQUESTS[:1]))) == 1
        assert [low <= wait <= 2 * low for low, wait in zip([0.5, 1, 2, 2, 2], waits, strict=True)] == [True] * 5
        waits.clear()
        server.n_requests = 0
        server.behaviour.fault = small_server.too_many(until=1, after="600")
        with opened(server, model, concurrency=1) as engine:
            assert len(list(engine.generate(REQUESTS[:2]))) == 2
        assert [wait > 500 for wait in waits] == [True] * 3  # before the same request, and before each from then on


@pytest.mark.parametrize(("header", "seconds"), [(None, 0), ("7", 7), ("1.5", 1.5), ("soon", 0), ("-3", 0), ("nan", 0)])
def test_retry_after_is_read_in_seconds(header, seconds) -> None:
    assert server_connection._retry_after_seconds(header) == seconds


def test_retry_after_is_read_as_a_date(monkeypatch) -> None:
    monkeypatch.setattr(server_connection.time, "time", lambda: 1445412450.0)
    assert server_connection._retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 1445412480 - 1445412450


def test_no_more_requests_are_under_way_than_allowed(server, model) -> None:
    with opened(server, model, concurrency=3) as engine:
        assert len(list(engine.generate(REQUESTS * 4))) == 32
    assert 2 <= server.max_concurrent <= 3


def test_the_processes_of_a_stage_share_the_requests_under_way(server, model, monkeypatch) -> None:
    for ranks, limit in {"4": 2, "16": 1}.items():
        monkeypatch.setenv("WORLD_SIZE", ranks)
        with opened(server, model, concurrency=8) as engine:
            assert len(list(engine.generate(REQUESTS))) == 8
        assert server.max_concurrent <= limit
        server.max_concurrent = 0


def test_results_come_while_others_are_still_under_way_and_leaving_cancels_these(model, served_model) -> None:
    release = threading.Event()

    def hold(number: int, server: Server, handler: small_server.Handler) -> bool:
        if number > 1:
            release.wait(20)
        return False

    with serving(served_model, Behaviour(fault=hold)) as server:
        with opened(server, model) as engine:
            results = engine.generate(REQUESTS)
            assert isinstance(next(results), Completion)
            results.close()
        release.set()


def test_ctrl_c_ends_the_iteration_and_leaves_the_engine_usable(start) -> None:
    release = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # test processes may ignore it

    def hold(number: int, server: Server, handler: small_server.Handler) -> bool:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        if number <= 8:
            release.wait(20)
        return False

    try:
        with start(Behaviour(fault=hold)) as (_, engine):
            with pytest.raises(KeyboardInterrupt):
                list(engine.generate(REQUESTS))
            release.set()
            completions_by_id(engine.generate(REQUESTS), REQUESTS)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_server_that_is_not_there_is_one_sentence(model) -> None:
    message = r"server http://127.0.0.1:9/v1 cannot be reached: .*is it running, and is `server.url`"
    engine = ServerEngine(model, Settings(url="http://127.0.0.1:9/v1"))
    with engine, pytest.raises(BadInput, match=message):
        list(engine.generate(REQUESTS))


def test_a_model_that_is_not_served_is_refused_with_the_nearest_that_is(served_model) -> None:
    with (
        serving(served_model, Behaviour(names=("llama-3.3-70b", "other\x1b[31m"))) as server,
        ServerEngine(resolve("served:llama-3-70b", folder=Path()), Settings(url=server.url)) as engine,
        pytest.raises(BadInput, match=r"has no model 'llama-3-70b', only .*; did you mean 'llama-3.3-70b'?") as refused,
    ):
        list(engine.generate(REQUESTS))
    assert "\x1b" not in str(refused.value)
    assert not server.requests


def test_the_key_is_sent_and_never_shown(start, monkeypatch, caplog) -> None:
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)

    def echo(number: int, server: Server, handler: small_server.Handler) -> bool:
        handler.error(500 if number % 2 else 400, f"\x1b[2JAuthorization: {handler.headers['Authorization']}\n" * 40)
        return True

    with start(Behaviour(key=KEY, fault=echo), api_key_env="MY_KEY", retries=1) as (_, engine):
        failures = list(engine.generate(REQUESTS))
        assert all(isinstance(failure, Failure) for failure in failures)
        texts = [failure.reason for failure in failures] + [repr(engine), repr(vars(engine)), repr(engine._connection)]
        texts += [str(engine.server), caplog.text]
        assert not [text for text in texts if KEY in text]
        assert all("[key]" in failure.reason and "\n" not in failure.reason and "\x1b" not in failure.reason
                   and len(failure.reason) < 350 for failure in failures)  # fmt: skip


def test_the_key_is_not_shown_where_a_server_puts_it_into_names_and_reasons(start, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    cut_off = when(always, lambda handler: handler.send(200, {"choices": [{"text": "", "finish_reason": KEY}]}))
    with start(Behaviour(fault=cut_off)) as (server, engine):
        assert [failure.reason for failure in engine.generate(REQUESTS[:1])] == [f"server {server.url} ended it: [key]"]
    behaviour = Behaviour(names=(f"model-{KEY}",))
    with start(behaviour) as (_, engine), pytest.raises(BadInput, match=r"only model-\[key\]"):
        list(engine.generate(REQUESTS))


@pytest.mark.parametrize("key", [None, KEY])
def test_a_refused_key_ends_it_all_in_a_sentence_without_the_key(start, monkeypatch, key) -> None:
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with start(Behaviour(key="another")) as (_, engine), pytest.raises(BadInput, match="refuses") as refused:
        list(engine.generate(REQUESTS))
    assert ("$OPENAI_API_KEY" if key else "without a key ($OPENAI_API_KEY is unset)") in str(refused.value)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(("number", "error", "message"), [
    (3, (401, "revoked"), "answered 401: revoked"),  # a key that is refused in the middle
    (1, (402, "insufficient balance"), "no credit left for us: it answered 402: insufficient balance"),
])  # fmt: skip
def test_what_no_request_can_survive_ends_it_all(start, number, error, message) -> None:
    fault = when(lambda n: n >= number, lambda handler: handler.error(*error))
    with start(Behaviour(fault=fault)) as (_, engine), pytest.raises(BadInput, match=message):
        list(engine.generate(REQUESTS))


def test_a_403_is_a_refused_key_at_first_and_a_refused_request_later(model, served_model, monkeypatch) -> None:
    flagged = when(lambda number: number == 2, lambda handler: handler.error(403, "the input was flagged"))
    with serving(served_model, Behaviour(fault=flagged)) as server:
        with opened(server, model) as engine:
            results = list(engine.generate(REQUESTS))
        monkeypatch.setattr(small_server.Handler, "do_GET", lambda handler: handler.error(403, "who are you?"))
        with opened(server, model) as engine, pytest.raises(BadInput, match=r"refuses .*: it answered 403: who are"):
            list(engine.generate(REQUESTS))
    (failure,) = [result for result in results if isinstance(result, Failure)]
    assert failure.reason == f"server {server.url} answered 403: the input was flagged"
    assert len(results) == len(REQUESTS)


@pytest.mark.parametrize("fault", [small_server.broken(until=999), small_server.reset(until=999)])
def test_a_server_that_is_gone_for_good_ends_the_stage(start, fault) -> None:
    with (
        start(Behaviour(fault=fault), concurrency=2, retries=1) as (server, engine),
        pytest.raises(StageFailed, match=r"has not answered 8 requests in a row .* run the same command again"),
    ):
        list(engine.generate(REQUESTS * 4))
    assert server.n_requests < 2 * len(REQUESTS) + 4


def test_requests_that_fail_between_answers_do_not_end_the_stage(start) -> None:
    often = when(lambda number: number % 8 > 0, lambda handler: handler.error(500, "it broke"))
    with start(Behaviour(fault=often), concurrency=1, retries=0) as (_, engine):
        results = list(engine.generate(REQUESTS * 4))
    assert sum(isinstance(result, Failure) for result in results) == 28


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_probabilities_that_are_no_numbers_are_no_answer(start, value) -> None:
    log_probs = {"tokens": ["A"], "token_logprobs": [-0.1], "top_logprobs": [{"A": -0.1, "B": value}]}
    answer = {"choices": [{"text": "A", "finish_reason": "stop", "logprobs": log_probs}]}
    with start(Behaviour(fault=when(always, lambda handler: handler.send(200, answer))), retries=0) as (server, engine):
        (failure,) = engine.choose([Question("x", conversation("A or B?"))])
    assert failure == Failure("x", f"server {server.url} gave an answer that cannot be read", "transient")


def test_what_both_names_of_the_limit_were_refused_for_is_said(start) -> None:
    with (
        start(Behaviour(limit_field="max_output"), model=model_known_by_name()) as (_, engine),
        pytest.raises(BadInput, match=r"cannot be asked: .*; with `max_completion_tokens`: .*answered 400: no `max_c"),
    ):
        list(engine.generate(REQUESTS))


@pytest.mark.parametrize("key", ["sk-ü", "sk-a\nb"])
def test_a_key_that_no_header_takes_is_refused_unseen(model, server, monkeypatch, key) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with opened(server, model) as engine, pytest.raises(BadInput, match="characters that no header takes") as refused:
        list(engine.generate(REQUESTS))
    assert "sk-" not in str(refused.value)


@pytest.mark.filterwarnings("ignore:server .* takes no token ids")
def test_what_the_server_can_do_is_found_out(start) -> None:
    for behaviour, expected in {
        (): Capabilities("/completions", "max_tokens", True, True, True, 20),
        (("takes_extensions", False),): Capabilities("/completions", "max_tokens", False, False, False, 20),
        (("list_length", 5),): Capabilities("/completions", "max_tokens", True, True, True, 5),
        (("list_length", 0),): Capabilities("/completions", "max_tokens", True, True, False, 0),
        (("takes_ids", False),): Capabilities("/chat/completions", "max_tokens", True, True, False, 20),
    }.items():
        with start(Behaviour(**dict(behaviour))) as (_, engine):
            assert engine.capabilities == expected


def test_a_recipes_own_chat_template_is_not_given_up_silently(start, tiny) -> None:
    model = tiny("llama", chat_template=tiny_models.PLAIN)
    message = "`chat_template:` cannot reach model 'tiny'"
    with start(Behaviour(takes_ids=False), model=model) as (_, engine), pytest.raises(BadInput, match=message):
        list(engine.generate(REQUESTS))


def test_a_judge_without_log_probabilities_is_told_what_to_do(start) -> None:
    message = r"gives no log-probabilities for model 'tiny', .*`verdicts: text` in a `judge` stage"
    with start(Behaviour(list_length=0)) as (_, engine), pytest.raises(BadInput, match=message):
        list(engine.choose([Question("x", conversation("A or B?"))]))


def test_a_setting_that_the_server_does_not_know_is_refused_and_not_left_out(start) -> None:
    with start(Behaviour(takes_extensions=False)) as (_, engine), pytest.raises(BadInput, match="takes no `top_k`"):
        list(engine.generate([Request("x", conversation("Hi"), 0, Sampling(top_k=5))]))


def test_the_distribution_is_left_whole_where_a_server_has_defaults_of_its_own(server, model) -> None:
    with opened(server, model) as engine:
        list(engine.generate([Request("x", conversation("Hi"), 7, Sampling(3, 0.5, 0.9, 5, ("stop",)))]))
        list(engine.choose([Question("y", conversation("Hi"))]))
    (_, request), (_, question) = server.requests[-2:]
    assert (request["temperature"], request["top_p"], request["top_k"], request["seed"]) == (0.5, 0.9, 5, 7)
    assert request["stop"] == ["stop"]
    for body in (request, question):
        assert (body["min_p"], body["repetition_penalty"]) == (0.0, 1.0)
    assert [question[name] for name in ("temperature", "top_p", "top_k", "max_tokens")] == [1.0, 1.0, -1, 1]
    assert "prompt_logprobs" not in question


def test_control_tokens_in_messages_are_escaped_where_the_tokenizer_is_known(model, served_model) -> None:
    control = served_model.chat.tokenizer.convert_ids_to_tokens(served_model.chat.end_of_turn)
    text = f"Hi {control} there"
    with serving(served_model, Behaviour(takes_ids=False)) as server:
        with opened(server, model) as engine, pytest.warns(UserWarning, match="takes no token ids: it renders"):
            list(engine.generate([Request("x", conversation(text), 0, GREEDY)]))
        _, body = server.requests[-1]
        assert body["messages"] == [{"role": "user", "content": f"Hi {control[:-1]} {control[-1]} there"}]
        rendered = served_model.chat.tokenizer.apply_chat_template(body["messages"], tokenize=True)["input_ids"]
        plain = served_model.chat.tokenizer.apply_chat_template(conversation("Hi there"), tokenize=True)["input_ids"]
        assert rendered.count(served_model.chat.end_of_turn) == plain.count(served_model.chat.end_of_turn)
        with opened(server, model_known_by_name()) as engine, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                list(engine.generate([Request("x", conversation(text), 0, GREEDY)]))
        assert [str(warning.message) for warning in caught if "control tokens" in str(warning.message)] == [
            "the tokenizer of model 'served:tiny' is not here: control tokens that prompts or responses spell reach it "
            "as they are written"
        ]
        assert server.requests[-1][1]["messages"] == conversation(text)


def test_a_thinking_models_reasoning_is_separated_by_the_server_or_by_the_engine() -> None:
    def read(stop: tuple[str, ...] = (), **choice: object) -> tuple[str, str | None]:
        return tuple(read_text(Generated.model_validate(choice), stop))  # type: ignore[return-value]

    assert read(message={"content": "yes", "reasoning_content": " because\n"}) == ("yes", "because")
    assert read(message={"content": "yes", "reasoning": "because"}) == ("yes", "because")
    assert read(text="<think>because</think>\n\nyes") == ("yes", "because")
    assert read(text="because</think>\n\nyes") == ("yes", "because")
    assert read(text="<think>because") == ("", "because")
    assert read(text=" yes STOP no", stop=("STOP",)) == ("yes", None)


def test_options_outside_the_list_are_told_exactly_where_the_server_knows_them_by_id(model, served_model) -> None:
    reference = Reference(model)
    prompt = reference.chat.prompt_ids(conversation("Hi"))
    log_probs = reference.log_probs(prompt)[-1]
    _, options = reference.chat.question(conversation("Hi"), ("Y", "Z"))
    assert not set(options) & set(log_probs.topk(20).indices.tolist())
    for takes_option_ids in (True, False):
        behaviour = Behaviour(takes_option_ids=takes_option_ids)
        with serving(served_model, behaviour) as server, opened(server, model) as engine:
            (answer,) = engine.choose([Question("x", conversation("Hi"), ("Y", "Z"))])
        if takes_option_ids:
            assert answer.log_probs == pytest.approx(log_probs[options].tolist(), abs=1e-4)
        else:
            reason = "none of the options 'Y', 'Z' is among the 21 next tokens that the server lists"
            assert answer == Failure("x", reason, "no_option")


def read(listed: list[tuple[str, float]], sampled: str = "A") -> Choice | Failure:
    return read_options(Question("x", conversation("?")), NextTokens(listed, sampled), ["A".__eq__, "B".__eq__])


def test_an_option_outside_the_list_is_bounded_by_it_and_by_what_it_leaves_over() -> None:
    answer = read([("A", math.log(0.9)), ("C", math.log(0.05)), ("D", math.log(0.004))])
    assert answer.log_probs == pytest.approx((math.log(0.9), math.log(0.004)))
    assert answer.option_probability == pytest.approx(0.9)
    answer = read([("A", math.log(0.97)), ("C", math.log(0.025))])
    assert math.exp(answer.log_probs[1]) == pytest.approx(0.005)


def test_a_sampled_token_from_below_the_list_bounds_nothing() -> None:
    answer = read([("A", math.log(0.5)), ("C", math.log(0.2)), ("Z", math.log(1e-6))], sampled="Z")
    assert answer.reason == "option 'B' is not among the 3 next tokens that the server lists, which leave it up to 0.2"


def test_the_same_option_written_in_several_ways_is_counted_as_one() -> None:
    tokens = NextTokens([("A", math.log(0.5)), (" A", math.log(0.25)), ("B", math.log(0.25))], "A")
    tests = [lambda token: token.strip() == "A", lambda token: token.strip() == "B"]
    answer = read_options(Question("x", conversation("?")), tokens, tests)
    assert answer.log_probs == pytest.approx((math.log(0.75), math.log(0.25)))
    assert answer.option_probability == pytest.approx(1.0)


@pytest.mark.parametrize("family", ["mistral", "no_system", "thinking", "gpt_neox"])
def test_every_family_of_templates_is_asked_as_on_this_machine(tiny, family) -> None:
    model = tiny(family)
    served_model, reference = ServedModel(model), Reference(model)
    messages = [{"role": "system", "content": "Be brief."}, *conversation("What is the capital of France?")]
    prompt = reference.chat.prompt_ids(messages)
    ids, text = reference.greedy(prompt, 6)
    with serving(served_model) as server, opened(server, model) as engine:
        (completion,) = engine.generate([Request("x", messages, 0, Sampling(6, 0))])
    assert isinstance(completion, Completion)
    assert (completion.prompt_ids, completion.token_ids, completion.text) == (prompt, ids, text)
    _, options, option_ids = likely_options(reference, "Hi")
    with serving(served_model) as server, opened(server, model) as engine:
        (answer,) = engine.choose([Question("x", conversation("Hi"), options)])
    question, _ = reference.chat.question(conversation("Hi"), options)
    assert answer.log_probs == pytest.approx(reference.log_probs(question)[-1][option_ids].tolist(), abs=1e-4)
