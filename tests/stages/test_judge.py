"""Judging: which pairs, both orders, what a position bias leaves behind, and what becomes of half an answer."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
from feedback_stages import PRINCIPLES, Script, run_stage, sample

from cai.contracts.engine import Choice
from cai.feedback.votes import with_enough_probability
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
    pairs_in_order = [question.id.rsplit("/", 1)[0] for question in script.questions[::-1]]
    assert pairs_in_order == sorted(pairs_in_order, key=pairs_in_order.index), (
        "each pair's order is asked about in one go"
    )
    assert len(set(pairs_in_order)) == 4


@pytest.mark.parametrize(("principles", "n_asked"), [("one", 1), (2, 2), (9, 3), ("all", 3)])
def test_as_many_principles_are_drawn_as_the_recipe_says(tmp_path, principles, n_asked):
    result = judge(tmp_path, LOCKS, principles=principles, pairs="all")
    asked_principles = [frozenset(vote["principle"] for vote in row["votes"]) for row in result.rows]
    assert {len(ids) for ids in asked_principles} == {n_asked}
    assert len(set(asked_principles)) > 1 or n_asked == 3


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


def people(folder, *pairs: tuple[str, str, str]) -> dict:
    """A file of (question, chosen, rejected), as a recipe names it."""
    rows = [
        {
            side: f"\n\nHuman: {question}\n\nAssistant: {text}"
            for side, text in (("chosen", chosen), ("rejected", rejected))
        }
        for question, chosen, rejected in pairs
    ]
    folder.mkdir(exist_ok=True)
    (folder / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "people.jsonl", "tags": ["red_team"]}


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


def test_a_judge_without_responses_and_pairs_is_refused():
    with pytest.raises(ValueError, match="neither `from:` nor `human:`"):
        Config.model_validate({"id": "votes"})
