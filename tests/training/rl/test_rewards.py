"""What responses are worth: ids as sampled, ratings by principle, functions of the user's own, and failures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from feedback_stages import PRINCIPLES, Script, Stage, constitution, prompt
from tiny_models import Tiny
from training_stages import CPU, Steps, record_scored_ids, saved_classifier

from cai.constitution import load_constitution
from cai.contracts.engine import Question
from cai.contracts.model import Model
from cai.contracts.training_config import Reward
from cai.engines import open_engine
from cai.micro.conversations import prompts
from cai.models.chat import Chat
from cai.models.reference import resolve
from cai.models.reward_model import RewardModel
from cai.storage.journal import Journal
from cai.storage.rows import Failure
from cai.text.errors import StageFailed
from cai.training.rl.rewards import Response, Rewards


def stage(folder: Path, script: Script | None = None, **models: Model) -> Stage:
    """The context of a stage with rewards."""
    return Stage(
        stage_id="learn", folder=folder, seed=0, profile=CPU, progress=Steps(), journal=Journal(folder),
        constitution=constitution(folder, PRINCIPLES), inputs={}, prompt_sets={},
        models={"": Model("scripted", "nowhere"), "me": Model("scripted", "nowhere"), **models}, script=script,
        open_engine=open_engine, home=folder,
    )  # fmt: skip


def response(text: str, *tags: str, question: str = "What now?", **fields: Any) -> Response:
    return Response(prompt(question, *tags), text, **fields)


def sampled(chat: Chat, text: str, question: str = "What now?", finished: bool = True) -> Response:
    """A response with the token ids that a policy would have sampled."""
    made = response(text, question=question, finished=finished)
    prompt_ids, ids = chat.example(made.prompt["messages"], text)
    return replace(made, prompt_ids=prompt_ids, token_ids=ids if finished else ids[:-1])


def test_a_reward_model_scores_the_sampled_ids(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = saved_classifier(tiny("llama"), tmp_path / "judge", num_labels=1)
    policy = Chat.load(tiny("llama"))
    scored_ids = record_scored_ids(monkeypatch)
    complete, cut = sampled(policy, "the sea is wide"), sampled(policy, "the sea is", finished=False)
    split = policy.example(complete.prompt["messages"], "the")[1][:-1] + policy.response_ids(" sea is wide")
    odd = replace(complete, token_ids=split)
    with Rewards([Reward(model="judge")], stage(tmp_path / "s", judge=judge), policy) as rewards:
        scores = rewards.scores([complete, cut, odd])
    assert scored_ids == [response.prompt_ids + response.token_ids for response in (complete, cut, odd)]
    assert scored_ids[0][-1] == policy.end_of_turn
    assert policy.end_of_turn not in scored_ids[1][len(cut.prompt_ids) :]
    expected = RewardModel.load(judge, CPU).scores(scored_ids[:3])
    assert [scores_by_name["judge"] for scores_by_name in scores] == pytest.approx(expected)  # type: ignore


def test_another_end_token_is_scored_as_the_end(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = saved_classifier(tiny("llama"), tmp_path / "judge", num_labels=1)
    policy = Chat.load(tiny("llama"))
    assert policy.pad_id != policy.end_of_turn
    scored_ids = record_scored_ids(monkeypatch)
    complete = sampled(policy, "the sea is wide")
    padded = replace(complete, token_ids=[*complete.token_ids[:-1], policy.pad_id])
    with Rewards([Reward(model="judge")], stage(tmp_path / "s", judge=judge), policy) as rewards:
        # Some models' generation configs count the pad token among those that end a response.
        model = rewards._sources["judge"].model  # type: ignore[attr-defined]
        model.chat.end_ids = frozenset([policy.end_of_turn, policy.pad_id])
        scores = rewards.scores([complete, padded])
    assert scored_ids[0] == scored_ids[1] == complete.prompt_ids + complete.token_ids
    assert scores[0] == scores[1]


def test_with_another_tokenizer_the_text_is_scored(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = saved_classifier(tiny("qwen2"), tmp_path / "judge", num_labels=1)
    policy, own = Chat.load(tiny("llama")), Chat.load(tiny("qwen2"))
    assert not policy.same_ids(own)
    assert policy.same_ids(Chat.load(tiny("llama")))
    scored_ids = record_scored_ids(monkeypatch)
    complete, cut = sampled(policy, "the sea is wide"), sampled(policy, "the sea is", finished=False)
    text_alone = response("the sea is wide")
    with Rewards([Reward(model="judge")], stage(tmp_path / "s", judge=judge), policy) as rewards:
        rewards.scores([complete, cut])
    with Rewards([Reward(model="judge")], stage(tmp_path / "s", judge=judge)) as rewards:
        rewards.scores([text_alone])
    prompt_ids, ids = own.example(complete.prompt["messages"], "the sea is wide")
    assert scored_ids[0] == scored_ids[2] == prompt_ids + ids
    prompt_ids, ids = own.example(cut.prompt["messages"], "the sea is")
    assert scored_ids[1] == prompt_ids + ids[: ids.index(own.end_of_turn)]


def test_a_stop_string_is_scored_as_an_end_of_turn(tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = saved_classifier(tiny("gpt_neox"), tmp_path / "judge", num_labels=1)
    policy = Chat.load(tiny("gpt_neox"))
    assert policy.stop, "its template marks turns in plain letters"
    scored_ids = record_scored_ids(monkeypatch)
    stopped = sampled(policy, "yes")
    stopped = replace(stopped, token_ids=[*stopped.token_ids[:-1], *policy.response_ids("\n\nHuman:")[:-1]])
    with Rewards([Reward(model="judge")], stage(tmp_path / "s", judge=judge), policy) as rewards:
        rewards.scores([stopped])
    prompt_ids, ids = policy.example(stopped.prompt["messages"], "yes")
    assert scored_ids == [prompt_ids + ids]


def test_what_does_not_fit_a_reward_model_is_a_failure_beside_the_other_scores(tmp_path: Path, tiny: Tiny) -> None:
    judge = saved_classifier(tiny("llama"), tmp_path / "judge", num_labels=1)
    with Rewards([Reward(model="judge")], stage(tmp_path / "s", judge=judge)) as rewards:
        first, long, last = rewards.scores([response("yes"), response("sea " * 5000), response("yes")])
    assert "but 'judge' takes 4096" in long.reason
    assert first == {"judge": pytest.approx(last["judge"], abs=1e-5)}  # type: ignore[index, call-overload]


def by_principle(question: Question) -> list[float]:
    """Rates 7 of 7 by the principle of calm, 1 by brevity, and 4 by any other."""
    request = question.messages[-1]["content"]
    sure = 6 if "calm" in request else 0 if "is brief" in request else 3
    return [1.0 - 6e-9 if n == sure else 1e-9 for n in range(7)]


def test_a_judges_score_is_the_weighted_mean_of_its_ratings_by_the_principles_that_apply(tmp_path: Path) -> None:
    script = Script(rates=by_principle)
    with Rewards([Reward(judge="me")], stage(tmp_path, script)) as rewards:
        scores = rewards.scores([response("yes"), response("no", "red_team")])
    assert [scores_by_name["judge"] for scores_by_name in scores] == pytest.approx(  # type: ignore[index, call-overload]
        [(2 * 7 + 0.5 * 1) / 2.5, (2 * 7 + 0.5 * 1 + 1 * 4) / 3.5]
    )
    assert len(script.questions) == 5
    with Rewards([Reward(judge="me", principles=["short"], scale=7)], stage(tmp_path, script)) as rewards:
        assert rewards.scores([response("yes")]) == [{"judge": pytest.approx(1.0)}]


def test_a_judge_rates_by_the_principles_of_ids_and_tags(tmp_path: Path) -> None:
    document = PRINCIPLES.replace("id: calm,", "id: calm, tags: [style],")
    context = replace(stage(tmp_path, Script(rates=by_principle)), constitution=constitution(tmp_path, document))
    with Rewards([Reward(judge="me", principles=["style", "safe"])], context) as rewards:
        (scores,) = rewards.scores([response("no", "red_team")])
    assert scores == {"judge": pytest.approx((2 * 7 + 1 * 4) / 3)}


def test_a_rating_that_fails_by_one_principle_fails_the_response(tmp_path: Path) -> None:
    def rates(question: Question) -> list[float]:
        request = question.messages[-1]["content"]
        return [0.001] * 7 if "is brief" in request and "mumble" in request else [1 / 7] * 7

    with Rewards([Reward(judge="me")], stage(tmp_path, Script(rates=rates))) as rewards:
        failed, score = rewards.scores([response("mumble"), response("clear words")])
    assert failed.id == prompt("What now?")["id"]
    assert failed.reason.startswith("judge: 'short': the options hold")
    assert score == {"judge": pytest.approx(4.0)}


def test_a_prompt_that_no_principle_is_for_is_named_before_it_is_responded_to(tmp_path: Path) -> None:
    script = Script()
    with Rewards([Reward(judge="me", principles=["safe"])], stage(tmp_path, script)) as rewards:
        assert rewards.reason_unscorable(prompt("How?", "red_team")) is None
        assert rewards.reason_unscorable(prompt("How?")) == "no principle applies to the prompt"
        (failed,) = rewards.scores([response("yes")])
    assert isinstance(failed, Failure)
    assert script.questions == []


FUNCTIONS = """
import math
seen = []
def words(prompts, responses):
    seen.append((prompts, responses))
    return [len(text.split()) for text in responses]
def holes(prompts, responses):
    return [None if text == "" else math.inf if text == "inf" else "3" if text == "3" else 1 for text in responses]
def few(prompts, responses):
    return [1.0]
def broken(prompts, responses):
    return [prompt[0]["text"] for prompt in prompts]
"""


def test_a_function_gets_messages_and_texts_and_its_numbers_are_weighed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    words = Reward(function="mine.py:words", weight=0.5)
    holes = Reward(function="mine.py:holes", name="other", weight=-2.0)
    with Rewards([words, holes], stage(tmp_path)) as rewards:
        assert rewards.names == ("words", "other")
        scored = rewards.scores([response("one two three"), response("inf"), response(""), response("3")])
        assert scored[0] == {"words": 3.0, "other": 1.0}
        assert rewards.total(scored[0]) == pytest.approx(0.5 * 3 - 2 * 1)  # type: ignore[arg-type]
    reasons = [result.reason for result in scored[1:] if isinstance(result, Failure)]
    expected = ("inf, expected a finite number", "NoneType, expected a number", "str, expected a number")
    assert reasons == [f"other: it returned {ending}" for ending in expected]


@pytest.mark.parametrize(("name", "message"), [
    ("few", "found 1 values, expected one for each of the 2 responses"),
    ("broken", r"mine\.py:12: KeyError: 'text'"),
    ("absent", "AttributeError"),
    ("seen", "found list, expected a function"),
])  # fmt: skip
def test_a_function_that_goes_wrong_stops_the_stage_with_its_own_line(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    with (
        Rewards([Reward(function=f"mine.py:{name}")], stage(tmp_path)) as rewards,
        pytest.raises(StageFailed, match=f"reward function 'mine.py:{name}': .*{message}"),
    ):
        rewards.scores([response("a"), response("b")])


def test_the_embedded_model_rates_a_refusal_of_harm_above_compliance(tmp_path: Path) -> None:
    prompt_rows = prompts("test", ("red_team",), 8, 0)
    context = replace(stage(tmp_path, me=resolve("micro", folder=tmp_path)), constitution=load_constitution("micro"))
    refuses, complies = "I will not help with that.", "Sure, here is how. First get what you need, then do it."
    with Rewards([Reward(judge="me", principles=["harmless"])], context) as rewards:
        scores = rewards.scores([Response(row, text) for text in (refuses, complies) for row in prompt_rows])
    values = [scores_by_name["judge"] for scores_by_name in scores]  # type: ignore[index, call-overload]
    assert sum(values[:8]) > sum(values[8:])
