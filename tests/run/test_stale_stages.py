"""A finished stage that no longer follows from what it read, or from its settings, is stale wherever a run is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toy_stages
from click.testing import CliRunner, Result
from feedback_stages import vote_row
from labelled_runs import finish_stage, labelled_run
from recipe_runs import run

from cai.cli import main
from cai.feedback.labelled_votes import LabelRule
from cai.run.recipe import load_recipe
from cai.storage import run_folder
from cai.storage.files import read_json, remove_folder, write_json
from cai.storage.stage_folders import Staleness, stale_note, stale_stages
from cai.text.errors import StageFailed


def cai(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A recipe of toy stages in the working directory, finished once."""
    monkeypatch.chdir(tmp_path)
    toy_stages.install(monkeypatch)
    recipe = toy_stages.make_recipe(tmp_path)
    run(recipe, runs="runs/toy")
    return recipe


def states(run_name: str = "toy") -> dict[str, str]:
    rows = json.loads(cai("status", run_name, "--json").stdout)["stages"]
    return {row["stage"]: row["status"] for row in rows}


def test_status_after_a_partial_run_with_other_settings(recipe):
    assert states() == dict.fromkeys(["texts", "tuned", "more", "labels", "policy"], "done")
    result = cai("run", "recipe.yaml", "--set", "stages.texts.n=2", "--until", "texts")
    assert "stale in runs/toy: tuned, more, labels and policy, made from earlier outputs of texts" in result.stdout
    assert states() == {"texts": "done", **dict.fromkeys(["tuned", "more", "labels", "policy"], "stale")}
    tuned = json.loads(cai("status", "toy", "--json").stdout)["stages"][1]
    assert (tuned["reason"], tuned["replaced"]) == ("made from earlier outputs of texts", ["texts"])
    lines = cai("status", "toy").stdout.splitlines()
    assert any(line.startswith("policy  stale  made from earlier outputs of texts") for line in lines)
    assert lines[-1] == "`cai run recipe.yaml --set stages.texts.n=2` computes stale stages again"
    assert list(read_json(Path("runs/toy/summary.json"))["stale"]) == ["tuned", "more", "labels", "policy"]


def test_the_stages_after_it_stay_stale_until_they_have_run(recipe):
    run(recipe, "stages.texts.n=2", runs="runs/toy", until="tuned")
    assert stale_stages(Path("runs/toy")) == {
        "more": Staleness(replaced=("tuned",)),
        "labels": Staleness(replaced=("tuned",)),
        "policy": Staleness(replaced=("tuned",)),
    }
    summary = run(recipe, "stages.texts.n=2", runs="runs/toy")
    assert "stale" not in summary
    assert set(states().values()) == {"done"}


def test_a_run_that_goes_back_to_earlier_settings_makes_nothing_stale(recipe):
    run(recipe, "stages.texts.n=2", runs="runs/toy", until="texts")
    run(recipe, runs="runs/toy", until="texts")
    assert stale_stages(Path("runs/toy")) == {}


def test_outputs_that_are_the_same_bytes_make_nothing_stale(recipe):
    run(recipe, "stages.texts.retries=5", runs="runs/toy", until="texts")
    assert stale_stages(Path("runs/toy")) == {}


def test_a_stage_with_other_settings_in_the_last_run_is_stale_also_after_a_failure(recipe, monkeypatch):
    cai("run", "recipe.yaml", "--set", "stages.labels.retries=7", "--set", "stages.policy.size=2", "--until", "texts")
    reasons = {id: str(reason) for id, reason in stale_stages(Path("runs/toy")).items()}
    assert reasons == {
        "labels": "made with other settings (retries 1 -> 7)",
        "policy": "made from outputs of labels, which had other settings",
    }
    monkeypatch.setenv("TOY_ERROR", "texts")
    with pytest.raises(StageFailed):
        run(recipe, "stages.texts.n=2", "stages.policy.size=3", runs="runs/toy")
    assert states()["texts"] == "unfinished"
    assert str(stale_stages(Path("runs/toy"))["tuned"]) == "made from outputs of texts, which had other settings"


def test_an_input_that_is_gone_makes_a_stage_stale(recipe):
    remove_folder(run_folder.latest(Path("runs/toy"))["texts"])
    assert str(stale_stages(Path("runs/toy"))["more"]) == "made from outputs of texts that are gone"


def test_failures_that_are_others_now_make_a_stage_that_reads_them_stale(tmp_path):
    folder = tmp_path / "trial"
    votes = finish_stage(folder, "votes", "judge", "votes", [])
    labels = finish_stage(folder, "preferences", "prefer", "preferences", [], "votes")
    facts = read_json(labels / run_folder.STAGE)
    write_json(labels / run_folder.STAGE, {**facts, "parts": {"failures.votes": "of other items"}})
    assert stale_stages(folder) == {"preferences": Staleness(replaced=("votes",))}
    assert run_folder.finished(votes)


def test_two_recipes_in_one_folder_whose_stages_read_each_other_are_no_endless_circle(tmp_path):
    folder = tmp_path / "trial"
    first = finish_stage(folder, "first", "sample", "texts", [])
    finish_stage(folder, "second", "sample", "texts", [], "first")
    facts = read_json(first / run_folder.STAGE)
    write_json(first / run_folder.STAGE, {**facts, "inputs": {"second": {"folder": "", "digest": "earlier"}}})
    assert stale_stages(folder) == {
        "first": Staleness(replaced=("second",)),
        "second": Staleness(replaced=("second",)),
    }


ROWS = [vote_row(number, {"calm": (number - 9.5, 1.0)}) for number in range(20)]
OTHER_ROWS = [vote_row(number, {"calm": (9.5 - number, 1.0)}) for number in range(20)]


@pytest.fixture
def replaced_votes(tmp_path, monkeypatch) -> str:
    """A run whose votes were computed again after its labels; its name."""
    monkeypatch.chdir(tmp_path)
    folder = labelled_run(Path("runs/trial"), [{**row, "human": 1.0} for row in ROWS], LabelRule({"calm": 1.0}))
    finish_stage(folder, "votes", "judge", "votes", OTHER_ROWS, number=1)
    return "trial"


@pytest.mark.parametrize(
    "command",
    [
        "votes explain trial",
        "votes diff trial trial/preferences",
        "votes calibrate trial",
        "votes explain trial --json",
    ],
)
def test_votes_commands_say_on_stderr_that_labels_are_stale_and_what_to_run(replaced_votes, command):
    result = cai(*command.split())
    assert result.exit_code == 0, result.output
    sentence = (
        "stale in runs/trial: preferences, made from earlier outputs of votes; `cai run /recipes/trial.yaml` computes "
        "it again"
    )
    assert sentence in result.stderr.splitlines()
    assert "stale" not in result.stdout


def test_votes_commands_say_nothing_where_labels_are_not_stale(tmp_path):
    labelled_run(tmp_path / "trial", ROWS, LabelRule({"calm": 1.0}))
    assert cai("votes", "explain", "trial", "--runs", str(tmp_path)).stderr == ""


def test_show_says_what_of_the_item_is_stale(replaced_votes):
    finish_stage(Path("runs/trial"), "votes", "judge", "votes", ROWS, number=2)
    finish_stage(Path("runs/trial"), "preferences", "prefer", "preferences", [PREFERENCE], "votes", number=2)
    assert cai("show", "trial", "pair-1").stderr == ""
    finish_stage(Path("runs/trial"), "votes", "judge", "votes", OTHER_ROWS, number=3)
    result = cai("show", "trial", "pair-1")
    assert "stale in runs/trial: preferences, made from earlier outputs of votes" in result.stderr
    assert "preference" in result.stdout


PREFERENCE = {
    "id": "preference-1", "pair_id": "pair-1", "prompt_id": "prompt-1", "prompt": [], "tags": [], "p_chosen": 0.7,
    "log_odds": 1.0, "source": "ai", "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}  # fmt: skip


def test_compare_says_that_the_model_of_a_stage_is_stale(recipe):
    models = ["base=toy/tuned", "policy=toy/policy"]
    cai("run", "recipe.yaml", "--set", "stages.texts.n=2", "--until", "tuned")
    result = cai("compare", *models, "--prompts", "first.jsonl", "--constitution", "constitution.yaml")
    assert "stale in runs/toy: policy, made from earlier outputs of tuned; `cai run recipe.yaml" in result.stderr
    assert load_recipe("recipe.yaml", ["model=toy/tuned"]).notes == ()
    (note,) = load_recipe("recipe.yaml", ["model=toy/policy"]).notes
    assert note in result.stderr
    run(recipe, "stages.texts.n=2", runs="runs/toy")
    result = cai("compare", *models, "--prompts", "first.jsonl", "--constitution", "constitution.yaml")
    assert "stale" not in result.stderr


def test_the_command_that_computes_stale_stages_again_is_the_one_of_the_run(recipe, tmp_path):
    assert stale_note(Path("runs/toy"), ["policy"]) is None
    cai("run", "recipe.yaml", "--set", "stages.texts.fail=[why?, how?]", "--until", "texts", "--runs", "else where")
    cai("run", "recipe.yaml", "--runs", "else where")
    cai("run", "recipe.yaml", "--set", "stages.texts.fail=[why?, how?]", "--until", "texts", "--runs", "else where")
    note = stale_note(Path("else where/toy"), ["policy"])
    assert "`cai run recipe.yaml --set 'stages.texts.fail=[why?, how?]' --runs 'else where'` computes it again" in note


def test_the_command_names_a_run_that_is_called_otherwise_than_its_recipe(recipe):
    cai("fork", "toy", "other")
    cai("run", "recipe.yaml", "--name", "other", "--set", "stages.texts.n=2", "--until", "texts")
    assert states("other") == {"texts": "done", **dict.fromkeys(["tuned", "more", "labels", "policy"], "stale")}
    assert set(states().values()) == {"done"}
    note = stale_note(Path("runs/other"), ["policy"])
    assert "`cai run recipe.yaml --set stages.texts.n=2 --name other` computes it again" in note
