"""Judging after reasons and by ratings: what is asked, what the votes are, and what becomes of half an answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from feedback_stages import Script, run_stage, sample
from hypothesis import given
from hypothesis import strategies as st

from cai.contracts.engine import Completion
from cai.feedback.methods import expected_score, log_odds_of_mean_probability
from cai.models.reference import resolve
from cai.stages.judge import Config
from cai.text.errors import StageFailed

PAIR = [sample("Is it noon?", text, "helpful") for text in ("It is noon.", "No idea.")]
ODDS = {"good": 2.0, "bad": -1.0, "fine": 0.5}


def judge(folder, script, rows=PAIR, **config):
    return run_stage("judge", folder, {"candidates": rows}, script=script, **config)


def reasons(question) -> str:
    return question.messages[-2]["content"]


def sampled_rationale(request) -> str:
    """Another rationale with every seed."""
    return list(ODDS)[request.seed % 3]


def test_a_reasoned_vote_is_the_mean_probability_over_the_rationales_and_keeps_them(tmp_path):
    script = Script(writes=sampled_rationale, prefers=lambda question: (ODDS[reasons(question)], 0.9))
    result = judge(tmp_path, script, method="reasoned", rationales=5)
    assert len(script.requests) == len(script.questions) == 2 * 2 * 5
    (row,) = result.rows
    assert row["method"] == "reasoned"
    for vote in row["votes"]:
        sign = 1 if vote["order"] == "ab" else -1
        assert len(vote["rationales"]) == 5
        assert all(
            rationale["log_odds"] == pytest.approx(sign * ODDS[rationale["text"]]) for rationale in vote["rationales"]
        )
        p = np.mean([1 / (1 + math.exp(-rationale["log_odds"])) for rationale in vote["rationales"]])
        assert vote["log_odds"] == pytest.approx(math.log(p / (1 - p)))
        assert vote["option_probability"] == pytest.approx(0.9)
    assert len({rationale["text"] for vote in row["votes"] for rationale in vote["rationales"]}) == 3


def test_the_verdict_is_asked_after_the_reasons_in_one_conversation(tmp_path):
    script = Script(writes=lambda request: "because")
    judge(tmp_path, script, method="reasoned")
    question = script.questions[0]
    assert [message["role"] for message in question.messages][-3:] == ["user", "assistant", "user"]
    assert question.messages[-2]["content"] == "because"
    assert question.messages[:-2] in [request.messages for request in script.requests]


def test_a_thinking_judge_reasons_by_its_own_thinking(tmp_path):
    def thinking(request):
        return Completion(request.id, "I say A.", [1, 2], [-1.0] * 2, "stop", [0], reasoning="my own rationales")

    script = Script(writes=thinking)
    result = judge(tmp_path, script, method="reasoned")
    assert {reasons(question) for question in script.questions} == {"my own rationales"}
    assert result.rows[0]["votes"][0]["rationales"][0]["text"] == "my own rationales"


def test_reasons_that_reach_no_end_are_asked_for_again_and_then_a_failure(tmp_path):
    seeds = set()

    def cut_off(request):
        seeds.add(request.seed)
        return Completion(request.id, "and so on", [1, 2, 3], [-1.0] * 3, "length", [0])

    with pytest.raises(StageFailed, match="cut off after 3 tokens"):
        judge(tmp_path, Script(writes=cut_off), method="reasoned", retries=2)
    assert len(seeds) == 2 * 2 * 3, "each attempt has a seed of its own"


def test_a_rationale_without_a_verdict_leaves_the_vote_to_the_others(tmp_path):
    script = Script(
        writes=sampled_rationale,
        prefers=lambda question: (ODDS[reasons(question)], 0.01 if reasons(question) == "bad" else 1),
    )
    result = judge(tmp_path, script, method="reasoned", rationales=6, retries=0)
    texts = {rationale["text"] for vote in result.rows[0]["votes"] for rationale in vote["rationales"]}
    assert texts == {"good", "fine"}


def test_a_rationale_without_a_verdict_is_sampled_again_and_a_refusal_is_called_one(tmp_path):
    def refuses(request):
        return "I'm sorry, but I cannot help with that."

    script = Script(writes=refuses, prefers=lambda question: (0.0, 0.01))
    with pytest.raises(StageFailed, match="the judge refused, and the options hold"):
        judge(tmp_path, script, method="reasoned", retries=2)
    assert len({request.seed for request in script.requests}) == 2 * 2 * 3


def test_a_rating_votes_by_the_difference_of_expected_scores(tmp_path):
    rating_by_text = {"It is noon.": 6, "No idea.": 2}

    def rates(question):
        (text,) = (text for text in rating_by_text if text in question.messages[-1]["content"])
        return [0.7 if n == rating_by_text[text] else 0.05 for n in range(1, 8)]

    script = Script(rates=rates)
    result = judge(tmp_path, script, method="rating")
    assert {question.options for question in script.questions} == {tuple("1234567")}
    assert len(script.questions) == 2 * 2, "each response once a principle: there are no orders"
    (row,) = result.rows
    for vote in row["votes"]:
        expected = [sum(n * (0.7 if n == rating_by_text[row[s]["text"]] else 0.05) for n in range(1, 8)) for s in "ab"]
        assert vote["scores"] == pytest.approx(expected)
        assert vote["log_odds"] == pytest.approx(expected[0] - expected[1])
    assert {vote["order"] for vote in row["votes"]} == {"ab", "ba"}
    assert result.figures["votes"]["judge"]["flip_rate"] is None, "what has no order cannot turn with it"


def test_a_rating_that_the_scale_holds_too_little_of_is_a_failure(tmp_path):
    with pytest.raises(StageFailed, match=r"hold 0\.07 of the probability"):
        judge(tmp_path, Script(rates=lambda question: [0.01] * 7), method="rating")


@pytest.mark.parametrize("method", ["pairwise", "reasoned", "rating"])
def test_what_principles_say_to_the_judge_is_part_of_the_plan(method):
    config = Config.model_validate({"id": "votes", "kind": "judge", "from": ["x"], "method": method})
    template_names = {"pairwise": ("compare",), "reasoned": ("reason", "verdict"), "rating": ("rate",)}
    assert config.template_names() == template_names[method]
    assert config.principle_fields() == (("critique",) if method == "rating" else ("compare",))


@pytest.mark.parametrize(("key", "value", "method"), [("rationales", 2, "reasoned"), ("scale", 10, "rating")])
def test_settings_of_another_method_are_refused(key, value, method):
    with pytest.raises(ValueError, match=f"expected it with `method: {method}` alone"):
        Config.model_validate({"id": "votes", "kind": "judge", "from": ["x"], key: value})


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=6))
def test_the_mean_probability_turns_with_its_side_and_lies_between_the_extremes(odds):
    mean = log_odds_of_mean_probability(odds)
    assert log_odds_of_mean_probability([-x for x in odds]) == pytest.approx(-mean, abs=1e-9)
    assert min(odds) - 1e-9 <= mean <= max(odds) + 1e-9
    assert log_odds_of_mean_probability([800.0, 800.0]) == pytest.approx(800), "no overflow"


def test_the_expected_score_of_a_certain_rating_is_that_rating():
    assert expected_score([-1000.0, 0.0, -1000.0]) == pytest.approx(2)
    assert expected_score(np.log([0.1, 0.1]).tolist()) == pytest.approx(1.5), "what the scale does not hold is left out"


def test_verdicts_from_text_are_the_counts_of_sampled_answers_with_half_a_count_added(tmp_path):
    script = Script(writes=lambda request: ["A", "(A).", "B", "I would say A", "**A**", "neither"][number(request)])
    result = judge(tmp_path, script, verdicts="text", draws=6)
    assert not script.questions
    assert len(script.requests) == 2 * 2 * 6
    assert len({request.seed for request in script.requests}) == len(script.requests)
    (row,) = result.rows
    assert "method" not in row
    for vote in row["votes"]:
        sign = 1 if vote["order"] == "ab" else -1
        assert vote["log_odds"] == pytest.approx(sign * math.log(3.5 / 1.5))
        assert vote["option_probability"] == pytest.approx(4 / 6)


def number(request) -> int:
    """Number of the answer among those to its question."""
    return int(request.id.rpartition("/")[2])


def test_where_no_sampled_answer_is_an_option_the_vote_is_a_failure(tmp_path):
    script = Script(writes=lambda request: "Both are\x07 good." if "calm" in request.id else "B")
    result = judge(tmp_path, script, verdicts="text", draws=3)
    assert {vote["principle"] for vote in result.rows[0]["votes"]} == {"short"}
    assert "none of 3 sampled answers is an option; first 'Both are" in result.failures[0]["reason"]


def test_counts_of_sampled_answers_come_to_what_log_probabilities_say(tmp_path):
    """On the embedded model, over all votes; 40 samples each tell a probability to about 0.08."""
    rows = [sample("Is the moon made of cheese?", text, number=n) for n, text in
            enumerate(["No, it is made of rock.", "You are an idiot. Go away."])]  # fmt: skip
    micro = resolve("micro", folder=tmp_path)
    exact, counted = (
        run_stage("judge", tmp_path / name, {"candidates": rows}, model=micro, **config).rows[0]["votes"]
        for name, config in (("exact", {}), ("counted", {"verdicts": "text", "draws": 40}))
    )
    for exact_vote, counted_vote in zip(exact, counted, strict=True):
        p, share = (1 / (1 + math.exp(-vote["log_odds"])) for vote in (exact_vote, counted_vote))
        assert share == pytest.approx(p, abs=0.25)
        assert counted_vote["option_probability"] == pytest.approx(exact_vote["option_probability"], abs=0.25)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"verdicts": "text", "method": "rating"}, "found `verdicts: text` with `method: rating`"),
        ({"draws": 3}, "found `draws` without `verdicts: text`"),
    ],
)
def test_settings_of_sampled_verdicts_are_refused_where_they_would_do_nothing(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Config(id="votes", **{"from": ["candidates"]}, **settings)
