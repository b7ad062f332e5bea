"""Critique and revision: what a model wrote is used, left alone or counted, and never mistaken for a revision."""

from __future__ import annotations

from collections import Counter

import pytest
from feedback_stages import PRINCIPLES, Script, run_stage, sample
from training_stages import Steps

from cai.storage.rows import Failure
from cai.text.errors import BadInput, StageFailed

LOCK = sample("How do I pick a lock?", "Force it open.", "red_team", "topic:locks")
NOON = sample("Is it noon?", "Yes, it is.", "helpful")


def is_critique(request) -> bool:
    return "<critique>" not in request.messages[0]["content"]


def critic(revisions, critiques=None) -> Script:
    """Writes the critiques and revisions given, round by round."""
    counts: Counter[str] = Counter()

    def write(request):
        kind = "critique" if is_critique(request) else "revision"
        counts[kind] += 1
        texts = revisions if kind == "revision" else critiques or ["The response could be better."] * 99
        written = texts[counts[kind] - 1]
        return Failure(request.id, "no room") if written is None else written

    return Script(writes=write)


def revise(folder, script, rows=(LOCK,), **config):
    return run_stage("revise", folder, {"responses": list(rows)}, script=script, **config)


@pytest.mark.parametrize(
    ("written", "outcome", "response"),
    [
        ("Call a locksmith.", "revised", "Call a locksmith."),
        ("Here is the revised response:\n\nCall a locksmith.", "preamble-stripped", "Call a locksmith."),
        ("force it  OPEN.", "unchanged", "Force it open."),
        ("Here is the revised response: Force it open.", "unchanged", "Force it open."),
        ("The response does not need revision.", "unchanged", "Force it open."),
        ("I can't rewrite this response.", "refused", "Force it open."),
        ("", "refused", "Force it open."),
        ("I'm sorry, I can't help with picking locks.", "revised", "I'm sorry, I can't help with picking locks."),
    ],
)
def test_each_outcome_is_recorded_and_only_revisions_are_used(tmp_path, written, outcome, response):
    result = revise(tmp_path, critic([written]))
    (row,) = result.rows
    assert row["rounds"][0]["outcome"] == outcome
    assert row["response"] == response
    assert row["original"] == "Force it open."
    assert row["model"] == ("writer" if response == row["original"] else "scripted")
    outcomes = result.figures["revisions"]["revise"]["outcomes"]
    assert outcomes == {"refused_by_reviser" if outcome == "refused" else outcome: 1}


def test_a_refusing_critic_ends_the_round_and_is_counted_apart(tmp_path):
    script = critic(["Call a locksmith."], ["I can't critique this.", "It helps a thief."])
    result = revise(tmp_path, script, rounds=2)
    (row,) = result.rows
    assert [(round_["outcome"], round_["critique"], round_["revision"]) for round_ in row["rounds"]] == [
        ("refused", "I can't critique this.", ""),
        ("revised", "It helps a thief.", "Call a locksmith."),
    ]
    assert len(script.requests) == 3, "nobody is asked to revise by a critique that there is none of"
    assert result.figures["revisions"]["revise"]["outcomes"] == {"refused_by_critic": 1, "revised": 1}


def test_a_round_starts_from_the_last_usable_revision(tmp_path):
    script = critic(["First.", "I cannot revise this response.", "Third."])
    (row,) = revise(tmp_path, script, rounds=3).rows
    assert [round_["outcome"] for round_ in row["rounds"]] == ["revised", "refused", "revised"]
    critique_texts = [request.messages[0]["content"] for request in script.requests if is_critique(request)]
    assert "Force it open." in critique_texts[0]
    assert "First." in critique_texts[1]
    assert "First." in critique_texts[2]
    assert row["response"] == "Third."


def test_principles_are_drawn_without_repetition_among_those_that_apply(tmp_path):
    rows = [sample(f"Question {n}?", "An answer.", "red_team" if n % 2 else "helpful") for n in range(40)]
    result = revise(tmp_path, Script(writes=lambda r: f"text {r.seed}"), rows, rounds=2)
    principles_by_row = [[round_["principle"] for round_ in row["rounds"]] for row in result.rows]
    assert all(len(set(ids)) == 2 for ids in principles_by_row)
    for row, ids in zip(result.rows, principles_by_row, strict=True):
        assert "safe" not in ids or "red_team" in row["tags"]
    assert {id for ids in principles_by_row for id in ids} == {"calm", "short", "safe"}
    five_rounds = revise(tmp_path / "more", Script(writes=lambda r: f"text {r.seed}"), rows[:1], rounds=5)
    assert Counter(round_["principle"] for round_ in five_rounds.rows[0]["rounds"]).most_common()[-1][1] >= 2


def test_only_selects_by_tag_and_says_what_it_left_out(tmp_path):
    result = revise(tmp_path, Script(), [LOCK, NOON], only="red_team")
    assert [row["prompt_id"] for row in result.rows] == [LOCK["prompt_id"]]
    assert result.figures["revisions"]["revise"]["not_selected"] == 1
    with pytest.raises(BadInput, match=r"redteam.*did you mean 'red_team'"):
        revise(tmp_path / "typo", Script(), [LOCK, NOON], only="redteam")


def test_principles_can_be_chosen_by_id_or_tag(tmp_path):
    document = PRINCIPLES
    for id in ("calm", "short"):
        document = document.replace(f"id: {id},", f"id: {id}, tags: [style],")

    def run(name, principles):
        rows = [sample(f"Question {n}?", "An answer.", "red_team") for n in range(12)]
        result = revise(tmp_path / name, Script(), rows, principles=principles, document=document)
        return {round_["principle"] for row in result.rows for round_ in row["rounds"]}

    assert run("by-id", "safe") == {"safe"}
    assert run("by-tag", ["style"]) == {"calm", "short"}
    with pytest.raises(BadInput, match=r"'stile'.*did you mean 'style'"):
        run("typo", ["stile"])


def test_responses_that_no_principle_is_for_are_counted(tmp_path):
    safe = "name: safe\nprinciples:\n  - {id: safe, text: No crime., applies_to: [red_team]}\n"
    result = revise(tmp_path, Script(), [LOCK, NOON], document=safe)
    assert result.figures["revisions"]["revise"]["without_principle"] == 1
    assert len(result.rows) == 1
    with pytest.raises(StageFailed, match="no principle applies"):
        revise(tmp_path / "none", Script(), [NOON], document=safe)


def test_a_failed_request_fails_its_response_and_no_other(tmp_path):
    def write(request):
        text = request.messages[0]["content"]
        return Failure(request.id, "no room") if "noon" in text and not is_critique(request) else "Better."

    script = Script(writes=write)
    result = revise(tmp_path, script, [LOCK, NOON], rounds=2, retries=2)
    assert [row["prompt_id"] for row in result.rows] == [LOCK["prompt_id"]]
    (failure,) = result.failures
    assert failure["id"] == NOON["id"]
    assert "round 1, revise" in failure["reason"]
    assert "no room" in failure["reason"]
    attempts = [r for r in script.requests if "noon" in r.messages[0]["content"] and not is_critique(r)]
    assert len({request.seed for request in attempts}) == len(attempts) == 3


def test_weights_change_nothing_that_is_asked(tmp_path):
    def run(name, document):
        script = Script(writes=lambda request: f"text {request.seed}")
        return revise(tmp_path / name, script, [LOCK, NOON], rounds=2, document=document).bytes

    assert run("one", PRINCIPLES) == run("other", PRINCIPLES.replace("weight: 2.0", "weight: 0"))


def test_the_result_does_not_depend_on_batches(tmp_path):
    rows = [sample(f"Question {n}?", "An answer.", "red_team") for n in range(9)]

    def run(size):
        script = Script(writes=lambda request: f"text {request.seed}")
        return revise(tmp_path / str(size), script, rows, rounds=2, journal_batch=size).bytes

    assert run(1) == run(4) == run(64)


def test_progress_advances_with_each_critique_and_revision(tmp_path):
    progress, counts = Steps(), []

    def write(request):
        counts.append(progress.n_finished)
        return f"text {request.seed}"

    rows = [sample(f"Question {n}?", "An answer.", "red_team") for n in range(3)]
    revise(tmp_path, Script(writes=write), rows, rounds=2, progress=progress)
    assert counts == [number / 4 for number in range(12)]
    assert progress.n_finished == progress.total == 3
