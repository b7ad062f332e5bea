"""Judging: which pairs, both orders, what a position bias leaves behind, and what becomes of half an answer.

The second half of the file is about judging after reasons and by ratings.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from feedback_stages import PRINCIPLES, Script, human_pairs, run_stage, sample
from hypothesis import given
from hypothesis import strategies as st
from training_stages import Steps

from cai.contracts.engine import Choice, Completion
from cai.feedback.methods import expected_score, log_odds_of_mean_probability
from cai.feedback.votes import with_enough_probability
from cai.models.reference import resolve
from cai.stages.judge import Config
from cai.storage.rows import Failure
from cai.text.errors import StageFailed

TEXTS = ["one", "two", "three", "four", "five"]
LOCKS = [sample("How do I pick a lock?", text, "red_team", "topic:locks") for text in TEXTS]
NOONS = [sample("Is it noon?", text, "helpful") for text in TEXTS]


def judge(folder, rows, script=None, **config):
    return run_stage("judge", folder, {"candidates": rows}, script=script or Script(), **config)


def pairs_of(result) -> list[frozenset[str]]:
    return [frozenset((row["a"]["text"], row["b"]["text"])) for row in result.rows]


def test_disjoint_pairs_use_each_response_once(tmp_path):
    result = judge(tmp_path, LOCKS + NOONS)
    assert len(result.rows) == 4
    assert all(row["a"]["text"] != row["b"]["text"] for row in result.rows)
    ids = [row[side]["id"] for row in result.rows for side in "ab"]
    assert len(ids) == len(set(ids)) == 8
    assert result.figures["votes"]["judge"]["unpaired"] == 2


def test_all_pairs_are_each_with_each(tmp_path):
    result = judge(tmp_path, LOCKS, pairs="all")
    assert sorted(map(sorted, pairs_of(result))) == sorted(sorted(pair) for pair in combinations(TEXTS, 2))


def test_random_pairs_are_as_many_as_asked_for_and_different(tmp_path):
    result = judge(tmp_path, LOCKS + NOONS, pairs="random", n_pairs=4)
    assert len(result.rows) == 8
    assert len(set(pairs_of(result)[:4])) == 4
    few = judge(tmp_path / "few", LOCKS[:2], pairs="random", n_pairs=4)
    assert len(few.rows) == 1


def test_responses_of_several_stages_meet_and_equal_texts_do_not(tmp_path):
    same_texts = [{**row, "id": f"again-{row['id']}"} for row in LOCKS[:3]]
    result = run_stage("judge", tmp_path, {"x": LOCKS[:2], "y": same_texts}, script=Script(), pairs="all")
    assert len(result.rows) == 3
    assert result.figures["votes"]["judge"]["same_text"] == 2
    with pytest.raises(StageFailed, match="nothing to judge"):
        run_stage("judge", tmp_path / "same", {"x": LOCKS[:1], "y": same_texts[:1]}, script=Script())


def test_cut_off_and_empty_responses_are_in_no_pair_and_counted(tmp_path):
    cut = {**sample("How do I pick a lock?", "First you", "red_team"), "finish_reason": "length"}
    empty = sample("How do I pick a lock?", " \n", "red_team")
    rows = [*LOCKS[:3], cut, empty]
    result = judge(tmp_path, rows, pairs="all")
    assert {text for pair in pairs_of(result) for text in pair} == set(TEXTS[:3])
    assert result.figures["votes"]["judge"]["left_out"] == {"cut_off": 1, "empty": 1}
    assert result.figures["votes"]["judge"]["same_text"] == 0
    with_cut_off = judge(tmp_path / "kept", rows, pairs="all", cut_off="keep")
    assert {text for pair in pairs_of(with_cut_off) for text in pair} == {*TEXTS[:3], "First you"}
    assert with_cut_off.figures["votes"]["judge"]["left_out"] == {"cut_off": 0, "empty": 1}
    with pytest.raises(StageFailed, match="1 cut off and 1 empty left out"):
        judge(tmp_path / "none", [LOCKS[0], cut, empty])


def test_the_plan_does_not_depend_on_the_order_of_rows(tmp_path):
    def run(name, rows):
        result = judge(tmp_path / name, rows, principles="one")
        return {(row["a"]["id"], row["b"]["id"], row["votes"][0]["principle"]) for row in result.rows}

    assert run("there", LOCKS + NOONS) == run("back", (LOCKS + NOONS)[::-1])


def test_every_applicable_principle_is_asked_in_both_orders(tmp_path):
    script = Script()
    result = judge(tmp_path, LOCKS[:2] + NOONS[:2], script)
    for row in result.rows:
        principles = {"calm", "short", "safe"} if "red_team" in row["tags"] else {"calm", "short"}
        assert {(vote["principle"], vote["order"]) for vote in row["votes"]} == {
            (id, order) for id in principles for order in ("ab", "ba")
        }


def test_questions_that_begin_alike_stand_side_by_side(tmp_path):
    script = Script()
    judge(tmp_path, LOCKS[:2] + NOONS[:2], script)
    asked_pairs = [question.id.rsplit("/", 1)[0] for question in script.questions[::-1]]
    assert asked_pairs == sorted(asked_pairs, key=asked_pairs.index), "each pair's order is asked about in one go"
    assert len(set(asked_pairs)) == 4


@pytest.mark.parametrize(("principles", "n_asked"), [("one", 1), (2, 2), (9, 3), ("all", 3)])
def test_as_many_principles_are_drawn_as_the_recipe_says(tmp_path, principles, n_asked):
    result = judge(tmp_path, LOCKS, principles=principles, pairs="all")
    asked_principles = [frozenset(vote["principle"] for vote in row["votes"]) for row in result.rows]
    assert {len(ids) for ids in asked_principles} == {n_asked}
    assert len(set(asked_principles)) > 1 or n_asked == 3


def test_principles_are_chosen_by_ids_and_tags_in_one_list(tmp_path):
    document = PRINCIPLES.replace("id: calm,", "id: calm, tags: [style, safe],").replace(
        "id: short,", "id: short, tags: [style],"
    )

    def asked(name, principles):
        result = judge(tmp_path / name, LOCKS[:2], principles=principles, document=document)
        return {vote["principle"] for row in result.rows for vote in row["votes"]}

    assert asked("by-tag", ["style"]) == {"calm", "short"}
    assert asked("both", ["safe", "short"]) == {"safe", "short"}, "the id `safe` wins over the tag"


def test_log_odds_are_for_a_whichever_is_shown_first(tmp_path):
    def prefers(question):
        text = question.messages[0]["content"]
        first, second = text.index("\none\n"), text.index("\ntwo\n")
        return (2.0 if first < second else -2.0), 0.9

    result = judge(tmp_path, LOCKS[:2], Script(prefers=prefers))
    (row,) = result.rows
    towards_a = 2.0 if row["a"]["text"] == "one" else -2.0
    assert [vote["log_odds"] for vote in row["votes"]] == pytest.approx([towards_a] * 6)
    assert result.figures["votes"]["judge"]["flip_rate"] == 0
    assert result.figures["votes"]["judge"]["position_bias"] == pytest.approx(0)
    assert result.figures["votes"]["judge"]["mean_option_probability"] == pytest.approx(0.9)


def test_a_preference_for_a_position_is_measured(tmp_path):
    figures = judge(tmp_path, LOCKS, Script(prefers=lambda question: (1.5, 1.0))).figures["votes"]["judge"]
    assert figures["position_bias"] == pytest.approx(1.5)
    assert figures["flip_rate"] == 1.0
    assert figures["mean_strength"] == pytest.approx(0)


def test_half_an_answer_takes_the_other_half_with_it(tmp_path):
    def prefers(question):
        if question.id.endswith("ab/calm"):
            return Failure(question.id, "overloaded")
        return (1.0, 0.04) if question.id.endswith("ba/short") else (1.0, 0.9)

    result = judge(tmp_path, LOCKS[:2], Script(prefers=prefers))
    assert [(vote["principle"], vote["order"]) for vote in result.rows[0]["votes"]] == [("safe", "ab"), ("safe", "ba")]
    reasons = " / ".join(failure["reason"] for failure in result.failures)
    assert "overloaded" in reasons
    assert "0.04 of the probability, less than min_option_probability 0.1" in reasons
    assert result.figures["votes"]["judge"]["failed_pairs"] == 0


def test_a_pair_without_a_whole_answer_is_a_failure(tmp_path):
    def prefers(question):
        return Failure(question.id, "too long") if "noon" in question.messages[0]["content"] else (1.0, 1.0)

    script = Script(prefers=prefers)
    result = judge(tmp_path, LOCKS[:2] + NOONS[:2], script, retries=2)
    assert len(result.rows) == 1
    (failure,) = result.failures
    assert "too long" in failure["reason"]
    figures = result.figures["votes"]["judge"]
    assert figures["failed_pairs"] == 1
    assert (figures["flip_rate"], figures["bounds"]["flip_rate"]) == (1.0, [3 / 5, 1.0])
    assert sum("noon" in question.messages[0]["content"] for question in script.questions) == 3 * 4
    with pytest.raises(StageFailed, match="none of 1 pairs was judged"):
        judge(tmp_path / "all", NOONS[:2], Script(prefers=prefers))


@pytest.mark.parametrize(("option_probability", "answers"), [(0.1, True), (0.09, False), (float("nan"), False)])
def test_options_that_hold_too_little_or_no_number_are_no_answer(option_probability, answers):
    assert isinstance(with_enough_probability(Choice("x", (-1.0, -2.0), option_probability), 0.1), Choice) == answers


def test_weights_change_nothing_that_is_asked(tmp_path):
    unweighted = PRINCIPLES.replace("weight: 2.0", "weight: 0")
    assert judge(tmp_path / "1", LOCKS).bytes == judge(tmp_path / "2", LOCKS, document=unweighted).bytes


def test_the_result_does_not_depend_on_batches(tmp_path):
    rows = LOCKS + NOONS
    assert judge(tmp_path / "1", rows, journal_batch=1).bytes == judge(tmp_path / "2", rows, journal_batch=64).bytes


def test_progress_advances_with_each_answer_about_a_pair(tmp_path):
    progress, counts = Steps(), []

    def prefer(question):
        counts.append(progress.n_finished)
        return (1.0, 1.0)

    result = judge(tmp_path, LOCKS + NOONS, script=Script(prefers=prefer), progress=progress)
    n_questions = len(result.rows[-1]["votes"])  # the script answers the last pair first
    assert counts[: n_questions + 1] == pytest.approx([n / n_questions for n in range(n_questions + 1)])
    assert progress.n_finished == progress.total == len(result.rows)


@pytest.mark.parametrize(
    "settings", [{"method": "reasoned", "rationales": 2}, {"method": "rating"}, {"verdicts": "text"}]
)
def test_progress_advances_within_a_portion_with_every_method(tmp_path, settings):
    progress, counts = Steps(), []

    def count(answer):
        counts.append(progress.n_finished)
        return answer

    script = Script(
        writes=lambda _: count("A"), prefers=lambda _: count((1.0, 1.0)), rates=lambda _: count([0.1] * 7)
    )  # fmt: skip
    result = judge(tmp_path, LOCKS + NOONS, script=script, progress=progress, **settings)
    assert counts == sorted(counts)
    assert len(set(counts)) == len(counts), "every answer moves the count"
    assert progress.n_finished == pytest.approx(progress.total)
    assert progress.total == len(result.rows) > counts[-1] > 0.9 * progress.total


def people(folder, *pairs: tuple[str, str, str]) -> dict:
    """A file of (question, chosen, rejected), as a recipe names it."""
    turns = [([question, chosen], [question, rejected]) for question, chosen, rejected in pairs]
    return human_pairs(folder, turns, "red_team")


PEOPLE = [(f"Question {n}?", f"good {n}", f"bad {n}") for n in range(20)]


def test_pairs_that_people_labelled_are_judged_and_keep_their_label(tmp_path):
    script = Script(prefers=lambda question: (1.0, 1.0))
    result = run_stage("judge", tmp_path, human=people(tmp_path, *PEOPLE, PEOPLE[0]), script=script)
    assert [row["human"] for row in result.rows] == [float(row["a"]["text"].startswith("good")) for row in result.rows]
    assert 4 <= sum(row["human"] for row in result.rows) <= 16, "which one is a does not say which was chosen"
    assert {vote["principle"] for row in result.rows for vote in row["votes"]} == {"calm", "short", "safe"}
    figures = result.figures["votes"]["judge"]["human"]
    assert figures == {"rows": 21, "pairs": 20, "left_out": {"the same pair again": 1}}


def test_a_judge_is_asked_the_same_whichever_response_people_chose(tmp_path):
    exchanged = [(question, rejected, chosen) for question, chosen, rejected in PEOPLE]
    scripts = Script(), Script()
    first = run_stage("judge", tmp_path / "there", human=people(tmp_path / "there", *PEOPLE), script=scripts[0])
    second = run_stage("judge", tmp_path / "back", human=people(tmp_path / "back", *exchanged), script=scripts[1])
    assert scripts[0].questions == scripts[1].questions
    assert second.rows == [{**row, "human": 1 - row["human"]} for row in first.rows]


def test_people_who_contradict_each_other_leave_a_tie(tmp_path):
    source = people(tmp_path, ("Why?", "so", "thus"), ("Why?", "thus", "so"), ("Why?", "so", "hence"))
    result = run_stage("judge", tmp_path, human=source, script=Script())
    assert [row["human"] == 0.5 for row in result.rows] == [True, False]


def test_human_pairs_stand_beside_sampled_ones_and_too_long_ones_are_counted(tmp_path):
    def prefers(question):
        return Failure(question.id, "too long") if "Question 3?" in question.messages[0]["content"] else (1.0, 1.0)

    result = judge(tmp_path, LOCKS[:2], Script(prefers=prefers), human=people(tmp_path, *PEOPLE))
    assert ["human" in row for row in result.rows] == [False] + 19 * [True]
    assert result.figures["votes"]["judge"]["failed_pairs"] == 1
    assert "too long" in result.failures[0]["reason"]
    failed = result.figures["votes"]["judge"]["failed_with_truth"]
    assert failed == {"human": {"all": 1, "held_out": 0}, "oracle": {"all": 0, "held_out": 0}}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"from": []}, "neither `from:` nor `human:`"),
        ({"rationales": 2}, "expected it with `method: reasoned` alone"),
        ({"scale": 10}, "expected it with `method: rating` alone"),
        ({"verdicts": "text", "method": "rating"}, "found `verdicts: text` with `method: rating`"),
        ({"draws": 3}, "found `draws` without `verdicts: text`"),
        ({"pairs": "against", "cut_off": "keep"}, "found `cut_off` with `pairs: against`"),
        ({"n_prompts": 3}, "found `n_prompts` without `prompts`"),
        ({"n_pairs": 2}, "found `n_pairs` with `pairs: disjoint`"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Config.model_validate({"id": "votes", "from": ["candidates"]} | settings)


PAIR = [sample("Is it noon?", text, "helpful") for text in ("It is noon.", "No idea.")]
ODDS = {"good": 2.0, "bad": -1.0, "fine": 0.5}


def reasons(question) -> str:
    return question.messages[-2]["content"]


def sampled_rationale(request) -> str:
    """Another rationale with every seed."""
    return list(ODDS)[request.seed % 3]


def test_a_reasoned_vote_is_the_mean_probability_over_the_rationales_and_keeps_them(tmp_path):
    script = Script(writes=sampled_rationale, prefers=lambda question: (ODDS[reasons(question)], 0.9))
    result = judge(tmp_path, PAIR, script, method="reasoned", rationales=5)
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
    judge(tmp_path, PAIR, script, method="reasoned")
    question = script.questions[0]
    assert [message["role"] for message in question.messages][-3:] == ["user", "assistant", "user"]
    assert question.messages[-2]["content"] == "because"
    assert question.messages[:-2] in [request.messages for request in script.requests]


def test_a_thinking_judge_reasons_by_its_own_thinking(tmp_path):
    def thinking(request):
        return Completion(request.id, "I say A.", [1, 2], [-1.0] * 2, "stop", [0], reasoning="my own rationales")

    script = Script(writes=thinking)
    result = judge(tmp_path, PAIR, script, method="reasoned")
    assert {reasons(question) for question in script.questions} == {"my own rationales"}
    assert result.rows[0]["votes"][0]["rationales"][0]["text"] == "my own rationales"


def test_reasons_that_reach_no_end_are_asked_for_again_and_then_a_failure(tmp_path):
    seeds = set()

    def cut_off(request):
        seeds.add(request.seed)
        return Completion(request.id, "and so on", [1, 2, 3], [-1.0] * 3, "length", [0])

    with pytest.raises(StageFailed, match="cut off after 3 tokens"):
        judge(tmp_path, PAIR, Script(writes=cut_off), method="reasoned", retries=2)
    assert len(seeds) == 2 * 2 * 3, "each attempt has a seed of its own"


def test_a_rationale_without_a_verdict_leaves_the_vote_to_the_others(tmp_path):
    script = Script(
        writes=sampled_rationale,
        prefers=lambda question: (ODDS[reasons(question)], 0.01 if reasons(question) == "bad" else 1),
    )
    result = judge(tmp_path, PAIR, script, method="reasoned", rationales=6, retries=0)
    texts = {rationale["text"] for vote in result.rows[0]["votes"] for rationale in vote["rationales"]}
    assert texts == {"good", "fine"}


def test_a_rationale_without_a_verdict_is_sampled_again_and_a_refusal_is_called_one(tmp_path):
    def refuses(request):
        return "I'm sorry, but I cannot help with that."

    script = Script(writes=refuses, prefers=lambda question: (0.0, 0.01))
    with pytest.raises(StageFailed, match="the judge refused, and the options hold"):
        judge(tmp_path, PAIR, script, method="reasoned", retries=2)
    assert len({request.seed for request in script.requests}) == 2 * 2 * 3


def test_a_rating_votes_by_the_difference_of_expected_scores(tmp_path):
    rating_by_text = {"It is noon.": 6, "No idea.": 2}

    def rates(question):
        (text,) = (text for text in rating_by_text if text in question.messages[-1]["content"])
        return [0.7 if n == rating_by_text[text] else 0.05 for n in range(1, 8)]

    script = Script(rates=rates)
    result = judge(tmp_path, PAIR, script, method="rating")
    assert {question.options for question in script.questions} == {tuple("1234567")}
    assert len(script.questions) == 2 * 2, "each response once a principle: there are no orders"
    (row,) = result.rows
    for vote in row["votes"]:
        expected = [sum(n * (0.7 if n == rating_by_text[row[s]["text"]] else 0.05) for n in range(1, 8)) for s in "ab"]
        assert vote["scores"] == pytest.approx(expected)
        assert vote["log_odds"] == pytest.approx(expected[0] - expected[1])
    assert {vote["order"] for vote in row["votes"]} == {"ab", "ba"}
    assert (row["method"], row["scale"]) == ("rating", 7), "points of two scales are not the same"
    assert result.figures["votes"]["judge"]["flip_rate"] is None, "what has no order cannot turn with it"


def test_a_rating_that_the_scale_holds_too_little_of_is_a_failure(tmp_path):
    with pytest.raises(StageFailed, match=r"hold 0\.07 of the probability"):
        judge(tmp_path, PAIR, Script(rates=lambda question: [0.01] * 7), method="rating")


@pytest.mark.parametrize("method", ["pairwise", "reasoned", "rating"])
def test_what_principles_say_to_the_judge_is_part_of_the_plan(method):
    config = Config.model_validate({"id": "votes", "kind": "judge", "from": ["x"], "method": method})
    template_names = {"pairwise": ("compare",), "reasoned": ("reason", "verdict"), "rating": ("rate",)}
    assert config.template_names() == template_names[method]
    assert config.principle_fields() == (("critique",) if method == "rating" else ("compare",))


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
    result = judge(tmp_path, PAIR, script, verdicts="text", draws=6)
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
    result = judge(tmp_path, PAIR, script, verdicts="text", draws=3)
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
