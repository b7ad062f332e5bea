"""The server engine where servers misbehave, say less than is needed, or say too much."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import small_server
import tiny_models
from engine_contract import Reference, asked, likely_options
from small_server import Behaviour, Server, Tiny, serving

from cai.contracts.engine import Choice, Completion, Question, Request, Sampling
from cai.contracts.model import Model
from cai.contracts.profile import Server as Settings
from cai.engines import server_connection
from cai.engines.server import NextTokens, ServerEngine, read_options
from cai.models.reference import resolve
from cai.storage.rows import Failure
from cai.text.errors import BadInput, StageFailed

KEY = "sk-not-to-be-seen-0123456789"
GREEDY = Sampling(max_new_tokens=3, temperature=0)
REQUESTS = [Request(f"{n}", asked("Hi" * n), n, GREEDY) for n in range(1, 9)]


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Model]) -> Model:
    return tiny("llama")


@pytest.fixture(scope="module")
def behind(model: Model) -> Tiny:
    return Tiny(model)


@pytest.fixture
def server(behind: Tiny) -> Iterator[Server]:
    with serving(behind) as server:
        yield server


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_connection, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(server_connection, "LONGEST_WAIT", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def opened(server: Server, model: Model, **settings: object) -> ServerEngine:
    names = {model.name: "tiny"}
    return ServerEngine(model, Settings.model_validate({"url": server.url, "names": names, **settings}))


def served() -> Model:
    return resolve("served:tiny", folder=Path())


@pytest.mark.parametrize(
    "mishap",
    [
        small_server.too_many(until=12),
        small_server.broken(until=12),
        small_server.truncated(until=12),
        small_server.reset(until=12),
        small_server.slow(until=2, seconds=3.0),
    ],
    ids=["429", "500", "truncated", "reset", "slow"],
)
def test_what_passes_is_waited_for_and_nothing_is_lost(model, behind, mishap) -> None:
    with serving(behind, Behaviour(mishap=mishap)) as server, opened(server, model, timeout=2, retries=20) as engine:
        done = {each.id: each for each in engine.generate(REQUESTS)}
        assert sorted(done) == sorted(request.id for request in REQUESTS)
        assert all(isinstance(each, Completion) for each in done.values()), done
        assert server.number > len(REQUESTS)


@pytest.mark.parametrize(
    ("mishap", "reason"),
    [
        (small_server.too_many(until=99), "answered 429: slow down, 3 times in a row"),
        (small_server.too_many(until=99, after="7200"), "it asks to wait 7200 seconds"),
        (small_server.broken(until=99), "answered 500: it broke, 3 times in a row"),
        (small_server.truncated(until=99), "3 times in a row"),
        (small_server.slow(until=99, seconds=0.4), "gave no answer within 0.2 seconds, 3 times in a row"),
        (small_server.reset(until=99), "cannot be reached"),
    ],
)
def test_what_stays_broken_is_a_failure_that_says_how(model, behind, mishap, reason) -> None:
    with serving(behind, Behaviour(mishap=mishap)) as server, opened(server, model, timeout=0.2, retries=2) as engine:
        _ = engine.abilities
        for result in engine.generate(REQUESTS[:2]):
            assert isinstance(result, Failure)
            assert reason in result.reason
            assert server.url in result.reason


def test_a_server_that_vanishes_and_comes_back_loses_nothing(model, behind, monkeypatch) -> None:
    monkeypatch.setattr(server_connection, "LONGEST_WAIT", 0.2)
    gone = threading.Event()

    def vanish(number: int, server: Server, handler: small_server.Handler) -> bool:
        if number > 3:
            gone.set()
            handler.close_connection = True
            handler.connection.close()
        return number > 3

    with serving(behind, Behaviour(mishap=vanish)) as server:
        engine = opened(server, model, retries=20, concurrency=2)
        results = engine.generate(REQUESTS)
        done = [next(results)]
        assert gone.wait(20)
        port = int(server.url.split(":")[2].split("/")[0])
    with engine, serving(behind, port=port) as back:
        done += results
        assert back.number >= len(REQUESTS) - 3
    assert sorted(each.id for each in done) == sorted(request.id for request in REQUESTS)
    assert all(isinstance(each, Completion) for each in done)


def test_waits_double_from_the_first_and_are_as_long_as_the_server_asks(model, behind, monkeypatch) -> None:
    waits: list[float] = []

    async def pause(seconds: float) -> None:
        waits.extend([seconds] if seconds > 0 else [])

    monkeypatch.setattr(server_connection, "pause", pause)
    monkeypatch.setattr(server_connection, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(server_connection, "LONGEST_WAIT", 4.0)
    with serving(behind, Behaviour(mishap=small_server.broken(until=5))) as server:
        with opened(server, model) as engine:
            assert len(list(engine.generate(REQUESTS[:1]))) == 1
        assert [low <= wait <= 2 * low for low, wait in zip([0.5, 1, 2, 2, 2], waits, strict=True)] == [True] * 5
        waits.clear()
        server.number = 0
        server.behaviour.mishap = small_server.too_many(until=1, after="600")
        with opened(server, model, concurrency=1) as engine:
            assert len(list(engine.generate(REQUESTS[:2]))) == 2
        assert [wait > 500 for wait in waits] == [True] * 3  # before the same request, and before each from then on


@pytest.mark.parametrize(("said", "seconds"), [(None, 0), ("7", 7), ("1.5", 1.5), ("soon", 0), ("-3", 0), ("nan", 0)])
def test_retry_after_is_read_in_seconds(said, seconds) -> None:
    assert server_connection._delay(said) == seconds


def test_retry_after_is_read_as_a_date(monkeypatch) -> None:
    monkeypatch.setattr(server_connection.time, "time", lambda: 1445412450.0)
    assert server_connection._delay("Wed, 21 Oct 2015 07:28:00 GMT") == 1445412480 - 1445412450


def test_no_more_requests_are_under_way_than_allowed(server, model) -> None:
    with opened(server, model, concurrency=3) as engine:
        assert len(list(engine.generate(REQUESTS * 4))) == 32
    assert 2 <= server.most_at_once <= 3


def test_the_processes_of_a_stage_share_the_requests_under_way(server, model, monkeypatch) -> None:
    for ranks, limit in {"4": 2, "16": 1}.items():
        monkeypatch.setenv("WORLD_SIZE", ranks)
        with opened(server, model, concurrency=8) as engine:
            assert len(list(engine.generate(REQUESTS))) == 8
        assert server.most_at_once <= limit
        server.most_at_once = 0


def test_results_come_while_others_are_still_under_way_and_leaving_cancels_these(model, behind) -> None:
    release = threading.Event()

    def hold(number: int, server: Server, handler: small_server.Handler) -> bool:
        if number > 1:
            release.wait(20)
        return False

    with serving(behind, Behaviour(mishap=hold)) as server:
        with opened(server, model) as engine:
            results = engine.generate(REQUESTS)
            assert isinstance(next(results), Completion)
            results.close()
        release.set()


def test_ctrl_c_ends_the_iteration_and_leaves_the_engine_usable(model, behind) -> None:
    release = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # test processes may ignore it

    def hold(number: int, server: Server, handler: small_server.Handler) -> bool:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        if number <= 8:
            release.wait(20)
        return False

    try:
        with serving(behind, Behaviour(mishap=hold)) as server, opened(server, model) as engine:
            with pytest.raises(KeyboardInterrupt):
                list(engine.generate(REQUESTS))
            release.set()
            assert all(isinstance(each, Completion) for each in engine.generate(REQUESTS))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_server_that_is_not_there_is_one_sentence(model) -> None:
    with (
        ServerEngine(model, Settings(url="http://127.0.0.1:9/v1")) as engine,
        pytest.raises(
            BadInput, match=r"server http://127.0.0.1:9/v1 cannot be reached: .*is it running, and is `server.url`"
        ),
    ):
        list(engine.generate(REQUESTS))


def test_a_model_that_is_not_served_is_refused_with_the_nearest_that_is(model, behind) -> None:
    with (
        serving(behind, Behaviour(names=("llama-3.3-70b", "other\x1b[31m"))) as server,
        ServerEngine(resolve("served:llama-3-70b", folder=Path()), Settings(url=server.url)) as engine,
        pytest.raises(BadInput, match=r"has no model 'llama-3-70b', only .*; did you mean 'llama-3.3-70b'?") as refused,
    ):
        list(engine.generate(REQUESTS))
    assert "\x1b" not in str(refused.value)
    assert not server.asked


def test_the_key_is_sent_and_never_shown(model, behind, monkeypatch, caplog) -> None:
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)

    def echo(number: int, server: Server, handler: small_server.Handler) -> bool:
        handler.error(500 if number % 2 else 400, f"\x1b[2JAuthorization: {handler.headers['Authorization']}\n" * 40)
        return True

    with (
        serving(behind, Behaviour(key=KEY, mishap=echo)) as server,
        opened(server, model, api_key_env="MY_KEY", retries=1) as engine,
    ):
        failures = list(engine.generate(REQUESTS))
        assert all(isinstance(failure, Failure) for failure in failures)
        said = [failure.reason for failure in failures] + [repr(engine), repr(vars(engine)), repr(engine._connection)]
        said += [str(engine.server), caplog.text]
        assert not [text for text in said if KEY in text]
        assert all("[key]" in failure.reason and "\n" not in failure.reason and "\x1b" not in failure.reason
                   and len(failure.reason) < 350 for failure in failures)  # fmt: skip


def test_the_key_is_not_shown_where_a_server_puts_it_into_names_and_reasons(model, behind, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def cut(number: int, server: Server, handler: small_server.Handler) -> bool:
        handler.send(200, {"choices": [{"text": "", "finish_reason": KEY}]})
        return True

    with serving(behind, Behaviour(mishap=cut)) as server, opened(server, model) as engine:
        assert [each.reason for each in engine.generate(REQUESTS[:1])] == [f"server {server.url} ended it: [key]"]
    with (
        serving(behind, Behaviour(names=(f"model-{KEY}",))) as server,
        opened(server, model) as engine,
        pytest.raises(BadInput, match=r"only model-\[key\]"),
    ):
        list(engine.generate(REQUESTS))


@pytest.mark.parametrize("key", [None, KEY])
def test_a_refused_key_ends_it_all_in_a_sentence_without_the_key(model, behind, monkeypatch, key) -> None:
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with (
        serving(behind, Behaviour(key="another")) as server,
        opened(server, model) as engine,
        pytest.raises(BadInput, match="refuses") as refused,
    ):
        list(engine.generate(REQUESTS))
    assert ("$OPENAI_API_KEY" if key else "without a key ($OPENAI_API_KEY is unset)") in str(refused.value)
    assert KEY not in str(refused.value)


def test_a_key_refused_in_the_middle_ends_it_all(model, behind) -> None:
    def revoke(number: int, server: Server, handler: small_server.Handler) -> bool:
        if number > 2:
            handler.error(401, "revoked")
        return number > 2

    with (
        serving(behind, Behaviour(mishap=revoke)) as server,
        opened(server, model) as engine,
        pytest.raises(BadInput, match="answered 401: revoked"),
    ):
        list(engine.generate(REQUESTS))


def test_a_403_is_a_refused_key_at_first_and_a_refused_request_later(model, behind, monkeypatch) -> None:
    def flag(number: int, server: Server, handler: small_server.Handler) -> bool:
        if number == 2:
            handler.error(403, "the input was flagged")
        return number == 2

    with serving(behind, Behaviour(mishap=flag)) as server:
        with opened(server, model) as engine:
            results = list(engine.generate(REQUESTS))
        monkeypatch.setattr(small_server.Handler, "do_GET", lambda handler: handler.error(403, "who are you?"))
        with opened(server, model) as engine, pytest.raises(BadInput, match=r"refuses .*: it answered 403: who are"):
            list(engine.generate(REQUESTS))
    (failure,) = [each for each in results if isinstance(each, Failure)]
    assert failure.reason == f"server {server.url} answered 403: the input was flagged"
    assert len(results) == len(REQUESTS)


def test_no_credit_ends_it_all(model, behind) -> None:
    def unpaid(number: int, server: Server, handler: small_server.Handler) -> bool:
        handler.error(402, "insufficient balance")
        return True

    with (
        serving(behind, Behaviour(mishap=unpaid)) as server,
        opened(server, model) as engine,
        pytest.raises(BadInput, match=r"no credit left for us: it answered 402: insufficient balance"),
    ):
        list(engine.generate(REQUESTS))


@pytest.mark.parametrize("mishap", [small_server.broken(until=999), small_server.reset(until=999)])
def test_a_server_that_is_gone_for_good_ends_the_stage(model, behind, mishap) -> None:
    with (
        serving(behind, Behaviour(mishap=mishap)) as server,
        opened(server, model, concurrency=2, retries=1) as engine,
        pytest.raises(StageFailed, match=r"has not answered 8 requests in a row .* run the same command again"),
    ):
        list(engine.generate(REQUESTS * 4))
    assert server.number < 2 * len(REQUESTS) + 4


def test_requests_that_fail_between_answers_do_not_end_the_stage(model, behind) -> None:
    def often(number: int, server: Server, handler: small_server.Handler) -> bool:
        if number % 8:
            handler.error(500, "it broke")
        return number % 8 > 0

    with (
        serving(behind, Behaviour(mishap=often)) as server,
        opened(server, model, concurrency=1, retries=0) as engine,
    ):
        results = list(engine.generate(REQUESTS * 4))
    assert sum(isinstance(each, Failure) for each in results) == 28


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_probabilities_that_are_no_numbers_are_no_answer(model, behind, value) -> None:
    def spoil(number: int, server: Server, handler: small_server.Handler) -> bool:
        listed = {"tokens": ["A"], "token_logprobs": [-0.1], "top_logprobs": [{"A": -0.1, "B": value}]}
        handler.send(200, {"choices": [{"text": "A", "finish_reason": "stop", "logprobs": listed}]})
        return True

    with serving(behind, Behaviour(mishap=spoil)) as server, opened(server, model, retries=0) as engine:
        (answer,) = engine.choose([Question("x", asked("A or B?"))])
    assert answer == Failure("x", f"server {server.url} gave an answer that cannot be read")


def test_what_both_names_of_the_limit_were_refused_for_is_said(model, behind) -> None:
    with (
        serving(behind, Behaviour(limit="max_output")) as server,
        opened(server, served()) as engine,
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
def test_what_the_server_can_do_is_found_out(model, behind) -> None:
    for behaviour, expected in {
        (): ("/completions", True, True, 20),
        (("strict", True),): ("/completions", False, False, 20),
        (("top", 5),): ("/completions", True, True, 5),
        (("top", 0),): ("/completions", True, True, 0),
        (("takes_ids", False),): ("/chat/completions", True, True, 20),
    }.items():
        with serving(behind, Behaviour(**dict(behaviour))) as server, opened(server, model) as engine:
            found = engine.abilities
            assert (found.path, found.extras, found.ids, found.top) == expected


def test_a_recipes_own_chat_template_is_not_given_up_silently(tiny, behind) -> None:
    model = tiny("llama", chat_template=tiny_models.PLAIN)
    with (
        serving(behind, Behaviour(takes_ids=False)) as server,
        opened(server, model) as engine,
        pytest.raises(BadInput, match="`chat_template:` cannot reach model 'tiny'"),
    ):
        list(engine.generate(REQUESTS))


def test_a_judge_without_log_probabilities_is_told_what_to_do(model, behind) -> None:
    with (
        serving(behind, Behaviour(top=0)) as server,
        opened(server, model) as engine,
        pytest.raises(
            BadInput, match=r"gives no log-probabilities for model 'tiny', .*`verdicts: text` in a `judge` stage"
        ),
    ):
        list(engine.choose([Question("x", asked("A or B?"))]))


def test_a_setting_that_the_server_does_not_know_is_refused_and_not_left_out(model, behind) -> None:
    with (
        serving(behind, Behaviour(strict=True)) as server,
        opened(server, model) as engine,
        pytest.raises(BadInput, match="takes no `top_k`"),
    ):
        list(engine.generate([Request("x", asked("Hi"), 0, Sampling(top_k=5))]))


def test_the_distribution_is_left_whole_where_a_server_has_defaults_of_its_own(server, model) -> None:
    with opened(server, model) as engine:
        list(engine.generate([Request("x", asked("Hi"), 7, Sampling(3, 0.5, 0.9, 5, ("stop",)))]))
        list(engine.choose([Question("y", asked("Hi"))]))
    (_, made), (_, chosen) = server.asked[-2:]
    assert (made["temperature"], made["top_p"], made["top_k"], made["seed"]) == (0.5, 0.9, 5, 7)
    assert made["stop"] == ["stop"]
    for body in (made, chosen):
        assert (body["min_p"], body["repetition_penalty"]) == (0.0, 1.0)
    assert (chosen["temperature"], chosen["top_p"], chosen["top_k"], chosen["max_tokens"]) == (1.0, 1.0, -1, 1)
    assert "prompt_logprobs" not in chosen


def test_control_tokens_in_messages_are_parted_where_the_tokenizer_is_known(model, behind) -> None:
    control = behind.chat.tokenizer.convert_ids_to_tokens(behind.chat.end_of_turn)
    text = f"Hi {control} there"
    with serving(behind, Behaviour(takes_ids=False)) as server:
        with opened(server, model) as engine, pytest.warns(UserWarning, match="takes no token ids: it renders"):
            list(engine.generate([Request("x", asked(text), 0, GREEDY)]))
        _, body = server.asked[-1]
        assert body["messages"] == [{"role": "user", "content": f"Hi {control[:-1]} {control[-1]} there"}]
        rendered = behind.chat.tokenizer.apply_chat_template(body["messages"], tokenize=True)["input_ids"]
        plain = behind.chat.tokenizer.apply_chat_template(asked("Hi there"), tokenize=True)["input_ids"]
        assert rendered.count(behind.chat.end_of_turn) == plain.count(behind.chat.end_of_turn)
        with opened(server, served()) as engine, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                list(engine.generate([Request("x", asked(text), 0, GREEDY)]))
        assert [str(each.message) for each in said if "control tokens" in str(each.message)] == [
            "the tokenizer of model 'served:tiny' is not here: control tokens that prompts or responses spell reach it "
            "as they are written"
        ]
        assert server.asked[-1][1]["messages"] == asked(text)


def test_a_thinking_models_reasoning_is_kept_apart_whoever_parts_it() -> None:
    from cai.engines.server import _Said, _text

    def read(stop: tuple[str, ...] = (), **said: object) -> tuple[str, str | None]:
        return tuple(_text(_Said.model_validate(said), stop))  # type: ignore[return-value]

    assert read(message={"content": "yes", "reasoning_content": " because\n"}) == ("yes", "because")
    assert read(message={"content": "yes", "reasoning": "because"}) == ("yes", "because")
    assert read(text="<think>because</think>\n\nyes") == ("yes", "because")
    assert read(text="because</think>\n\nyes") == ("yes", "because")
    assert read(text="<think>because") == ("", "because")
    assert read(text=" yes STOP no", stop=("STOP",)) == ("yes", None)


def test_options_outside_the_list_are_told_exactly_where_the_server_knows_them_by_id(model, behind) -> None:
    reference = Reference(model)
    prompt = reference.chat.prompt_ids(asked("Hi"))
    rows = reference.log_probs(prompt)[-1]
    _, options = reference.chat.question(asked("Hi"), ("Y", "Z"))
    assert not set(options) & set(rows.topk(20).indices.tolist())
    for listed_ids in (True, False):
        with serving(behind, Behaviour(listed_ids=listed_ids)) as server, opened(server, model) as engine:
            (answer,) = engine.choose([Question("x", asked("Hi"), ("Y", "Z"))])
        if listed_ids:
            assert isinstance(answer, Choice)
            assert answer.log_probs == pytest.approx(rows[options].tolist(), abs=1e-4)
        else:
            assert answer == Failure(
                "x", "none of the options 'Y', 'Z' is among the 21 next tokens that the server lists"
            )


TOP = [("A", math.log(0.9)), ("C", math.log(0.05)), ("D", math.log(0.004))]


def read(found: list[tuple[str, float]], drawn: str = "A") -> Choice | Failure:
    return read_options(Question("x", asked("?")), NextTokens(found, drawn), ["A".__eq__, "B".__eq__])


def test_an_option_outside_the_list_is_bounded_by_it_where_that_decides_nothing() -> None:
    answer = read(TOP)
    assert isinstance(answer, Choice)
    assert answer.log_probs == pytest.approx((math.log(0.9), math.log(0.004)))
    assert answer.option_probability == pytest.approx(0.9)


def test_what_the_list_leaves_over_bounds_an_option_too() -> None:
    answer = read([("A", math.log(0.97)), ("C", math.log(0.025))])
    assert isinstance(answer, Choice)
    assert math.exp(answer.log_probs[1]) == pytest.approx(0.005)


def test_a_drawn_token_from_below_the_list_bounds_nothing() -> None:
    answer = read([("A", math.log(0.5)), ("C", math.log(0.2)), ("Z", math.log(1e-6))], drawn="Z")
    assert isinstance(answer, Failure)
    assert answer.reason == "option 'B' is not among the 3 next tokens that the server lists, which leave it up to 0.2"


def test_the_same_option_written_in_several_ways_is_counted_as_one() -> None:
    answer = read_options(
        Question("x", asked("?")),
        NextTokens([("A", math.log(0.5)), (" A", math.log(0.25)), ("B", math.log(0.25))], "A"),
        [lambda token: token.strip() == "A", lambda token: token.strip() == "B"],
    )
    assert isinstance(answer, Choice)
    assert answer.log_probs == pytest.approx((math.log(0.75), math.log(0.25)))
    assert answer.option_probability == pytest.approx(1.0)


@pytest.mark.parametrize("family", ["mistral", "no_system", "thinking", "gpt_neox"])
def test_every_family_of_templates_is_asked_as_on_this_machine(tiny, family) -> None:
    model = tiny(family)
    behind, reference = Tiny(model), Reference(model)
    messages = [{"role": "system", "content": "Be brief."}, *asked("What is the capital of France?")]
    prompt = reference.chat.prompt_ids(messages)
    ids, text = reference.greedy(prompt, 6)
    with serving(behind) as server, opened(server, model) as engine:
        (done,) = engine.generate([Request("x", messages, 0, Sampling(6, 0))])
    assert isinstance(done, Completion)
    assert (done.prompt_ids, done.token_ids, done.text) == (prompt, ids, text)
    _, options, numbers = likely_options(reference, "Hi")
    with serving(behind) as server, opened(server, model) as engine:
        (answer,) = engine.choose([Question("x", asked("Hi"), options)])
    question, _ = reference.chat.question(asked("Hi"), options)
    assert isinstance(answer, Choice)
    assert answer.log_probs == pytest.approx(reference.log_probs(question)[-1][numbers].tolist(), abs=1e-4)
