"""What an earlier folder of a stage holds of an item is taken over: a change costs its own questions alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import toy_stages
from feedback_stages import Script
from recipe_runs import plan, run

from cai.contracts.engine import Question, Request
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.storage import run_folder
from cai.storage.rows import Failure, read_rows
from cai.text.errors import StageFailed

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
