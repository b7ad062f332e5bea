"""Unchanged items are taken over from earlier folders of a stage: a change, or a trial of one, costs its own work."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import toy_stages
from click.testing import CliRunner
from feedback_stages import Script
from recipe_runs import CPU, plan, run

from cai.cli import main
from cai.contracts.engine import Question, Request
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.feedback.explain import compare_votes, explain
from cai.feedback.labelled_votes import load_labelled_votes
from cai.run.try_wording import edit_of, trial_lines, try_wording
from cai.storage import run_folder
from cai.storage.rows import Failure, read_rows
from cai.text.errors import BadInput, StageFailed
from cai.text.progress import PlainDisplay

RECIPE = """name: whole
model: start
judge: judge
constitution: constitution.yaml
prompts:
  first: {source: first.jsonl}
stages:
  - {id: answers, kind: sample, prompts: first, n: 2}
  - {id: revised, kind: revise, from: answers}
  - {id: votes, kind: judge, from: answers, pairs: all}
  - {id: labels, kind: prefer, from: votes}
"""
KIND, HONEST = "The assistant is kind.", "The assistant is honest."


def digits(text: str) -> float:
    """A number from 0 to 1 that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def written(request: Request) -> str:
    return f"text {digits(json.dumps(request.messages) + str(request.seed)):.6f}"


def preferred(question: Question) -> tuple[float, float]:
    return 4 * digits(json.dumps(question.messages)) - 2, 0.9


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Answers for every model, by the words of a request alone."""
    script = Script(writes=written, prefers=preferred)

    def open_engine(model: Model, profile: Profile) -> Script:
        return script

    monkeypatch.setattr("cai.engines.open_engine", open_engine)
    return script


@pytest.fixture
def recipe(tmp_path: Path, model: Script) -> Path:
    """A recipe that has run, on a model that has forgotten it."""
    path = toy_stages.make_recipe(tmp_path, RECIPE)
    toy_stages.make_model(tmp_path / "judge", "judge")
    run(path)
    assert n_asked(model) == (4 * 2 + 8 * 2, 4 * 2 * 2)
    return path


def n_asked(model: Script) -> tuple[int, int]:
    """How many texts and how many verdicts were asked for, since the last call."""
    counts = len(model.requests), len(model.questions)
    model.requests.clear()
    model.questions.clear()
    return counts


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def rows_of(recipe: Path, runs: str = "runs") -> dict[str, list[object]]:
    folders = run_folder.latest(recipe.parent / runs)
    return {stage: read_rows(folder / "records.jsonl") for stage, folder in folders.items()}


def assert_as_undisturbed(recipe: Path, *overrides: str) -> None:
    """The rows, once every stage has run, are those of a whole new run in another folder."""
    run(recipe, *overrides)
    run(recipe, *overrides, runs="new")
    assert rows_of(recipe) == rows_of(recipe, "new")


def test_a_reworded_principle_costs_its_own_questions(recipe: Path, model: Script) -> None:
    edit(recipe.parent / "constitution.yaml", KIND, "The assistant is warm.")
    status, reason = plan(recipe)["votes"]
    assert (status, reason) == ("runs", "principle kind changed; what is unchanged is taken over")
    run(recipe, until="labels")
    texts, verdicts = n_asked(model)
    assert verdicts == 4 * 2, "one principle of two, in both orders"
    assert texts < 8 * 2, "the responses that the other principle revised are taken over"
    assert_as_undisturbed(recipe)


def test_the_wording_counts_and_not_the_name(recipe: Path, model: Script) -> None:
    edit(recipe.parent / "constitution.yaml", "id: kind", "id: friendly")
    run(recipe, until="votes")
    assert n_asked(model)[1] == 0
    edit(recipe.parent / "constitution.yaml", "id: friendly", "id: kind")
    edit(recipe.parent / "constitution.yaml", KIND, "The assistant is honest and calm.")
    run(recipe, until="votes")
    assert n_asked(model)[1] == 4 * 2
    assert_as_undisturbed(recipe)


def test_more_prompts_cost_their_own_items(recipe: Path, model: Script) -> None:
    with (recipe.parent / "first.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "whence?"}) + "\n")
    run(recipe)
    assert n_asked(model) == (2 + 2 * 2, 1 * 2 * 2)
    assert_as_undisturbed(recipe)


def test_more_responses_to_a_prompt_cost_themselves_and_their_pairs(recipe: Path, model: Script) -> None:
    run(recipe, "stages.answers.n=3", until="labels")
    n_texts, n_verdicts = n_asked(model)
    assert n_texts == 4 + 4 * 2
    assert 4 * 2 * 2 * 2 <= n_verdicts < 4 * 3 * 2 * 2, "a pair that was shuffled into another order is asked about"
    assert_as_undisturbed(recipe, "stages.answers.n=3")


def test_what_reaches_every_item_computes_all_of_them_again(recipe: Path, model: Script) -> None:
    run(recipe, "stages.answers.temperature=0.5", until="answers")
    assert n_asked(model)[0] == 4 * 2
    run(recipe, redo_from="votes", until="votes")
    assert n_asked(model)[1] == 4 * 2 * 2


def test_failed_votes_are_asked_for_again(recipe: Path, model: Script) -> None:
    edit(recipe.parent / "constitution.yaml", KIND, "The assistant is warm.")
    model.prefers = lambda question: (
        Failure(question.id, "busy", "transient") if "warm" in str(question.messages) else preferred(question)
    )
    run(recipe, "stages.votes.retries=0", until="votes")
    assert n_asked(model)[1] == 4 * 2
    rows = rows_of(recipe)["votes"]
    assert all({vote["principle"] for vote in row["votes"]} == {"honest"} for row in rows)  # type: ignore[index]
    model.prefers = preferred
    run(recipe, until="votes")
    assert n_asked(model)[1] == 4 * 2
    assert_as_undisturbed(recipe)


def test_a_stage_that_was_stopped_continues_with_the_folders_that_it_began_with(recipe: Path, model: Script) -> None:
    edit(recipe.parent / "constitution.yaml", KIND, "The assistant is warm.")

    def stop(question: Question) -> tuple[float, float]:
        if len(model.questions) > 4:
            raise StageFailed("stopped")
        return preferred(question)

    model.prefers = stop
    with pytest.raises(StageFailed, match="stopped"):
        run(recipe, "stages.votes.journal_batch=2", until="votes")
    model.prefers = preferred
    n_asked(model)
    assert plan(recipe, "stages.votes.journal_batch=2")["votes"][1] == "2 of 4 pairs are on disk"
    run(recipe, "stages.votes.journal_batch=2", until="votes")
    assert n_asked(model)[1] == 2 * 2, "the second half of the pairs, by the new wording alone"
    assert_as_undisturbed(recipe, "stages.votes.journal_batch=2")


def try_text(recipe: Path, text: str, principle: str = "kind") -> dict[str, Any]:
    edit_words = edit_of(None, principle, text, None)
    return try_wording("whole", recipe.parent, CPU, edit_words, PlainDisplay())


@pytest.fixture
def run_of(recipe: Path) -> Path:
    """The folder of the recipe's run, called by the run's name."""
    (recipe.parent / "runs").rename(recipe.parent / "whole")
    return recipe.parent / "whole"


def test_a_wording_is_tried_without_a_change_to_the_run(recipe: Path, run_of: Path, model: Script) -> None:
    before = {path: path.read_bytes() for path in run_of.rglob("*") if path.is_file() and path.name != ".lock"}
    figures = try_text(recipe, "The assistant is warm.")
    assert n_asked(model) == (0, 4 * 2)
    tried = run_of / "tried"
    after = {path: path.read_bytes() for path in run_of.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == {path: content for path, content in after.items() if not path.is_relative_to(tried)}
    assert try_text(recipe, "The assistant is warm.")["labels"] == figures["labels"]
    assert n_asked(model) == (0, 0), "the second time nothing is asked"

    edit(recipe.parent / "constitution.yaml", KIND, "The assistant is warm.")
    run(recipe, runs="whole", until="labels")
    assert n_asked(model)[1] == 0, "a run takes over what was tried"
    run(recipe, runs="new")
    assert rows_of(recipe, "whole")["votes"] == rows_of(recipe, "new")["votes"]
    whole_new = explain(load_labelled_votes("new", recipe.parent), 0)
    tried_shares = {id: shares[1] for id, shares in figures["share_of_say"].items()}
    assert tried_shares == {id: of["share_of_say"] for id, of in whole_new["principles"].items()}


def test_the_figures_of_a_trial_are_those_of_two_runs(recipe: Path, run_of: Path, model: Script) -> None:
    figures = try_text(recipe, "The assistant is warm.")
    edit(recipe.parent / "constitution.yaml", KIND, "The assistant is warm.")
    run(recipe, runs="new")
    old, new = (load_labelled_votes(name, recipe.parent) for name in ("whole", "new"))
    assert figures["votes"] == compare_votes(old, new)["principles"]
    assert figures["labels"]["turned"] == int((old.labels() * new.labels() < 0).sum())
    lines = "\n".join(trial_lines(figures))
    assert "before  Which response lives up better to this principle? The assistant is kind." in lines
    assert "after   Which response lives up better to this principle? The assistant is warm." in lines


def test_an_edited_document_is_tried_whole(recipe: Path, run_of: Path, model: Script) -> None:
    edited = recipe.parent / "edited.yaml"
    edited.write_text((recipe.parent / "constitution.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    edit(edited, HONEST, "The assistant says what is true.")
    edit(edited, "weight: 1.0", "weight: 0.0")
    figures = try_wording("whole", recipe.parent, CPU, edit_of(edited, None, None, None), PlainDisplay())
    assert n_asked(model) == (0, 4 * 2)
    assert figures["share_of_say"]["kind"][1] == 0, "weights are those of the edited document"
    assert list(figures["principles"]) == ["honest"]


def test_a_trial_says_how_the_words_get_into_the_run_and_what_that_computes(recipe: Path, run_of: Path) -> None:
    recipe.write_text(recipe.read_text().replace("from: answers, pairs: all", "from: [answers, revised], pairs: all"))
    run(recipe, runs="whole")
    figures = try_text(recipe, "The assistant is warm.")
    assert figures["computed_before_the_judge"] == ["revised"]
    lines = "\n".join(trial_lines(figures))
    place = f"'kind' ({recipe.parent / 'constitution.yaml'}:4:10)"
    assert f"To take the words over, write them into {place}.\n`cai run` then computes revised again" in lines
    by_request = try_wording(
        "whole", recipe.parent, CPU, edit_of(None, "kind", None, "Which response is warmer?"), PlainDisplay()
    )
    assert by_request["computed_before_the_judge"] == []
    assert "`cai run` then asks no question again." in trial_lines(by_request)


def test_edits_that_a_judge_never_sees_are_called_that(recipe: Path, run_of: Path) -> None:
    edited = recipe.parent / "edited.yaml"
    text = (recipe.parent / "constitution.yaml").read_text(encoding="utf-8")
    edited.write_text(text.replace("weight: 1.0", "weight: 0.5"), encoding="utf-8")
    with pytest.raises(BadInput, match="weights need no judge"):
        try_wording("whole", recipe.parent, CPU, edit_of(edited, None, None, None), PlainDisplay())
    asked = "compare: Which response lives up better to this principle? The assistant is kind."
    edited.write_text(text.replace(KIND, f"Be warm., {asked}"), encoding="utf-8")
    with pytest.raises(
        BadInput, match="`text` of 'kind' differs, but its `compare` is written out and is what is asked"
    ):
        try_wording("whole", recipe.parent, CPU, edit_of(edited, None, None, None), PlainDisplay())


def test_a_trial_of_nothing_new_or_of_an_outdated_run_is_refused(recipe: Path, run_of: Path, model: Script) -> None:
    with pytest.raises(BadInput, match="the judge is asked the same about every principle"):
        try_text(recipe, KIND)
    with pytest.raises(BadInput, match=r"no principle 'knd'; did you mean 'kind'\?"):
        try_text(recipe, "The assistant is warm.", "knd")
    edit(recipe.parent / "first.jsonl", "why?", "whither?")
    with pytest.raises(BadInput, match=r"labels of stage 'labels' are not those that its recipe makes; run `cai run "):
        try_text(recipe, "The assistant is warm.")


@pytest.mark.parametrize("options", [[], ["--principle", "kind"], ["--text", "Be warm."], ["F.yaml", "--text", "a"]])
def test_the_command_says_what_it_takes(options: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["votes", "try", "whole", *options, "--runs", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr == "expected an edited FILE, or --principle ID with either --text or --request\n"


def test_a_fork_shares_what_is_done_and_goes_its_own_way(recipe: Path, run_of: Path, model: Script) -> None:
    runs = ["--runs", str(recipe.parent)]
    result = CliRunner().invoke(main, ["fork", "whole", "other", *runs])
    next_command = f"Next: cai run {recipe} --name other --runs {recipe.parent}"
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, next_command)
    shared = run_folder.latest(run_of)["votes"].name
    records = [run / shared / "records.jsonl" for run in (run_of, recipe.parent / "other")]
    assert records[0].stat().st_ino == records[1].stat().st_ino

    before = rows_of(recipe, "whole")
    edit(recipe.parent / "constitution.yaml", KIND, "The assistant is warm.")
    result = CliRunner().invoke(main, ["run", str(recipe), "--name", "other", "--until", "labels", *runs])
    assert result.exit_code == 0, result.stderr
    assert n_asked(model)[1] == 4 * 2
    assert rows_of(recipe, "whole") == before
    assert rows_of(recipe, "other")["votes"] != before["votes"]
    result = CliRunner().invoke(main, ["fork", "whole", "other", *runs])
    assert (result.exit_code, result.stderr) == (
        2, f"{recipe.parent / 'other'}: found a folder, expected a name that no run has\n"
    )  # fmt: skip


@pytest.mark.parametrize("command", [["run", "quickstart", "--name"], ["fork", "quickstart"]])
def test_a_name_that_is_no_folder_of_its_own_is_refused(command: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [*command, "../other", "--runs", str(tmp_path)])
    expected = "found the name '../other', expected up to 60 letters, digits, - and _ as in my-run\n"
    assert (result.exit_code, result.stderr) == (2, expected)
