"""Principles without a vote: that they are listed, with what failed, and how principles are chosen by id and tag."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from feedback_stages import PRINCIPLES, Script, run_stage, sample, vote_row

from cai.cli import main
from cai.contracts.engine import Question
from cai.feedback.asked_votes import read_asked_votes
from cai.feedback.labelled_votes import LabelRule
from cai.storage import run_folder
from cai.storage.files import write_json
from cai.storage.journal import FAILURES, RECORDS
from cai.storage.rows import Failure, row_lines

RESPONSES = [sample(f"Question {n}?", text, number=k) for n in range(6) for k, text in enumerate(("one", "two"))]
SILENT = "the options hold 0.02 of the probability"
RECIPE = """name: run
model: micro
constitution: constitution.yaml
prompts: {questions: {source: micro, split: train, limit: 8}}
stages: [{id: responses, kind: sample, prompts: questions}]
"""


def fails_on_brevity(question: Question) -> tuple[float, float] | Failure:
    text = question.messages[-1]["content"]
    if "is brief" in text:
        return Failure(question.id, SILENT)
    return (1.0 if text.index("\none\n") < text.index("\ntwo\n") else -1.0), 1.0


def make_run(folder: Path, judge_folder: Path, facts: dict) -> str:
    """A run whose labels are made of the votes in `judge_folder`; the folder of runs."""
    run = folder / "runs" / "run"
    run.mkdir(parents=True)
    judge_folder.rename(run / "votes-1")
    write_json(run / "votes-1" / run_folder.STAGE, facts)
    ids = {
        vote["principle"]
        for line in (run / "votes-1" / RECORDS).read_text().splitlines()
        for vote in json.loads(line)["votes"]
    }
    prefer = run / "preferences-1"
    prefer.mkdir()
    LabelRule(dict.fromkeys(ids, 1.0)).write(prefer)
    write_json(prefer / run_folder.STAGE, {"kind": "prefer", "inputs": {"votes": {"folder": "votes-1"}}})
    run_folder.mark_done(prefer, run_folder.Outputs("digest", {}))
    run_folder.set_latest(run, "preferences", prefer)
    (folder / "recipe.yaml").write_text(RECIPE)
    tagged = PRINCIPLES.replace("id: calm,", "id: calm, tags: [manner],").replace(
        "id: safe,", "id: safe, tags: [harm],"
    )
    (folder / "constitution.yaml").write_text(tagged)
    write_json(run / run_folder.RUN, {"recipe": str(folder / "recipe.yaml"), "overrides": []})
    return str(folder / "runs")


def judged_run(folder: Path) -> str:
    result = run_stage("judge", folder, {"candidates": RESPONSES}, script=Script(prefers=fails_on_brevity))
    return make_run(folder, result.folder, {"figures": result.figures})


def explain(runs: str, *options: str) -> Result:
    return CliRunner().invoke(main, ["votes", "explain", "run", "--runs", runs, *options])


def test_a_principle_that_failed_on_every_vote_is_listed_with_its_failures(tmp_path: Path) -> None:
    runs = judged_run(tmp_path)
    lines = explain(runs).stdout.splitlines()
    assert f"short: no vote, 6 of 6 failed; {SILENT} (6)" in lines
    assert "safe: applies to no pair" in lines
    assert any(line.split() == ["short", "-", "0", "%", "0", "6", "-", "-"] for line in lines)
    principles = json.loads(explain(runs, "--json").stdout)["principles"]
    counts = {id: (figures["pairs"], figures["asked"], figures["failed"]) for id, figures in principles.items()}
    assert counts == {"calm": (6, 6, 0), "short": (0, 6, 6), "safe": (0, 0, 0)}


def test_a_pair_that_every_principle_failed_on_counts_for_each(tmp_path: Path) -> None:
    def fails_on_one_prompt(question: Question) -> tuple[float, float] | Failure:
        return Failure(question.id, SILENT) if "Question 3?" in str(question.messages) else (1.0, 1.0)

    result = run_stage("judge", tmp_path, {"candidates": RESPONSES}, script=Script(prefers=fails_on_one_prompt))
    assert result.figures["votes"]["judge"]["principles"] == {
        "calm": {"asked": 6, "failed": 1, "failures": {SILENT: 1}},
        "short": {"asked": 6, "failed": 1, "failures": {SILENT: 1}},
        "safe": {"asked": 0, "failed": 0, "failures": {}},
    }


def test_failures_of_an_earlier_version_are_counted_from_its_rows(tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / RECORDS).write_text("".join(row_lines([vote_row(0, {"calm": (1.0, 1.0)})])))
    failures = [
        {"id": f"pair-{n}/{order}/short", "reason": SILENT, "item": n} for n in (0, 1) for order in ("ab", "ba")
    ]
    failures.append({"id": "pair-2", "reason": SILENT, "item": 2})
    (folder / FAILURES).write_text("".join(row_lines(failures)))
    runs = make_run(
        tmp_path, folder, {"config": {"principles": "all"}, "parts": {"principles": ["calm", "short", "x"]}}
    )
    assert read_asked_votes([Path(runs) / "run" / "votes-1"]) == {
        "calm": {"asked": None, "failed": 0, "failures": {}},
        "short": {"asked": None, "failed": 2, "failures": {SILENT: 2}},
        "x": {"asked": None, "failed": 0, "failures": {}},
    }
    lines = explain(runs).stdout.splitlines()
    assert f"short: no vote, 2 failed; {SILENT} (2)" in lines
    assert "x: no vote" in lines
    assert f"pairs without any vote, beside these: 1; {SILENT} (1)" in lines


def test_principles_are_chosen_by_ids_and_tags_in_one_list(tmp_path: Path) -> None:
    runs = judged_run(tmp_path)
    result = explain(runs, "--principle", "manner", "--principle", "short", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert set(figures["principles"]) == set(figures["without"]) == {"calm", "short"}
    assert figures["labelled"] == 6, "labels are those of all principles"
    assert set(json.loads(explain(runs, "--principle", "harm", "--json").stdout)["principles"]) == {"safe"}


@pytest.mark.parametrize(("name", "nearest"), [("maner", "manner"), ("shrt", "short")])
def test_a_name_that_is_neither_an_id_nor_a_tag_is_refused(tmp_path: Path, name: str, nearest: str) -> None:
    runs = judged_run(tmp_path)
    result = explain(runs, "--principle", name)
    assert result.exit_code == 2
    expected = f"--principle: found '{name}', expected ids or tags of principles in 'run'; did you mean '{nearest}'?"
    assert expected in result.stderr
    (tmp_path / "recipe.yaml").unlink()
    result = explain(runs, "--principle", name)
    assert result.exit_code == 2
    assert "tags are unknown, since the recipe cannot be read" in result.stderr
    assert explain(runs, "--principle", "short").exit_code == 0, "ids need no recipe"
