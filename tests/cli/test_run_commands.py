"""Commands: what they print, where, and which exit code they end with."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from unittest.mock import Mock

import jsonschema
import pytest
import toy_stages
import yaml
from click.testing import CliRunner

from cai.cli import main
from cai.constitution import load_constitution
from cai.contracts.profile import load_profile
from cai.run.comparison_recipe import comparison_recipe
from cai.run.recipe import load_recipe
from cai.storage import run_folder
from cai.storage.files import write_json
from cai.storage.rows import row_lines
from cai.storage.stage_folders import unused
from cai.text.errors import BadInput


def cai(*arguments: str):
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with a recipe of toy stages."""
    monkeypatch.chdir(tmp_path)
    toy_stages.install(monkeypatch)
    toy_stages.make_recipe(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "command", ["run", "status", "show", "clean", "init", "compare", "micro pretrain", "micro evaluate"]
)
def test_help_teaches_with_an_example(command):
    result = cai(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"cai {command}" in result.output.split("Options:")[0].partition("\n")[2]


def test_run_puts_results_on_stdout_and_progress_on_stderr(folder):
    result = cai("run", "recipe.yaml", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["failures"] == dict.fromkeys(["texts", "tuned", "more", "labels", "policy"], 0)
    assert json.loads(Path("runs/toy/summary.json").read_text()) == summary
    assert "texts: 12 texts, " in result.stderr
    again = cai("run", "recipe.yaml")
    assert again.stderr == "reused: texts, tuned, more, labels, policy\n"
    assert f"model policy  runs/toy/{summary['stages']['policy']}/model" in again.stdout


def test_a_run_leaves_its_progress_warnings_and_errors_in_its_log(folder, monkeypatch):
    monkeypatch.setenv("TOY_ERROR", "tuned")
    assert cai("run", "recipe.yaml").exit_code == 3
    log = Path("runs/toy/run.log")
    before = log.read_text()
    times, texts = zip(*(line.split(" ", 1) for line in before.splitlines()), strict=True)
    assert all(datetime.fromisoformat(time).tzinfo for time in times)
    assert texts[0].startswith(f"{folder / 'recipe.yaml'} with profile 'cpu', process ")
    assert texts[1] == "texts: started"
    assert texts[2].startswith("texts: 12 texts, ")
    assert texts[3:] == ("tuned: started", "error: stage 'tuned': the pen broke")
    monkeypatch.setenv("TOY_ERROR", "")
    assert cai("run", "recipe.yaml").exit_code == 0
    after = log.read_text().removeprefix(before)
    assert "Z reused: texts\n" in after.replace("+00:00", "Z")
    assert after.endswith(" done\n")


def test_recipes_that_share_a_run_are_noted_and_a_stage_does_not_name_the_machine(folder):
    assert "ran here before" not in cai("run", "recipe.yaml").stderr
    Path("other.yaml").write_text(Path("recipe.yaml").read_text())
    assert f"{folder / 'recipe.yaml'} ran here before under the same name, toy" in cai("run", "other.yaml").stderr
    facts = json.loads(next(Path("runs/toy").glob("texts-*/stage.json")).read_text())
    assert set(facts["host"]) == {"machine", "system", "cores"}


def test_dry_run_in_words_and_for_a_program(folder):
    assert "5 would run" in cai("run", "recipe.yaml", "--dry-run").stdout
    planned = json.loads(cai("run", "recipe.yaml", "--dry-run", "--json").stdout)["stages"]
    assert [step["status"] for step in planned] == ["runs", "waits", "waits", "waits", "waits"]
    assert not Path("runs").exists()


def test_status_tells_done_from_unfinished(folder):
    assert cai("status").exit_code == 2
    cai("run", "recipe.yaml", "--until", "tuned")
    result = cai("status", "--json")
    assert [row["status"] for row in json.loads(result.stdout)["stages"]] == ["done", "done", *["not run"] * 3]
    assert "texts   done" in cai("status", "toy").stdout
    assert "did you mean 'toy'" in cai("status", "tou").stderr


def test_clean_removes_only_what_no_recipe_stage_uses(folder):
    cai("run", "recipe.yaml")
    cai("run", "recipe.yaml", "--set", "stages.policy.size=2")
    ((old, _),) = unused(Path("runs/toy"))
    declined = CliRunner().invoke(main, ["clean", "toy"], input="n\n")
    assert old.name in declined.stdout
    assert old.exists()
    assert cai("clean", "toy", "--yes").exit_code == 0
    assert not old.exists()
    assert "5 reused" in cai("run", "recipe.yaml", "--set", "stages.policy.size=2", "--dry-run").stdout


def test_clean_keeps_interrupted_stages_unless_told(folder, monkeypatch):
    monkeypatch.setenv("TOY_ERROR", "texts")
    cai("run", "recipe.yaml")
    assert "nothing to remove" in cai("clean", "toy", "--yes").stdout
    assert len(list(Path("runs/toy").glob("texts-*"))) == 1
    cai("clean", "toy", "--yes", "--unfinished")
    assert not list(Path("runs/toy").glob("texts-*"))


def test_exit_codes(folder, monkeypatch):
    assert cai("run", "no-such-recipe").exit_code == 2
    assert "did you mean 'quickstart'" in cai("run", "quickstrat").stderr
    assert cai("run", "recipe.yaml", "--on", "no-such-profile").exit_code == 2
    assert "did you mean 'tensorboard'" in cai("run", "recipe.yaml", "--report-to", "tensorbord").stderr
    monkeypatch.setenv("TOY_ERROR", "texts")
    failed = cai("run", "recipe.yaml")
    assert failed.exit_code == 3
    assert failed.stderr == "texts: started\nstage 'texts': the pen broke\n"
    monkeypatch.setenv("TOY_ERROR", "")
    monkeypatch.setattr("cai.run.stage_run.run_function", Mock(side_effect=KeyboardInterrupt))
    assert cai("run", "recipe.yaml").exit_code == 130


def test_init_copies_what_runs_and_overwrites_nothing(tmp_path):
    result = cai("init", str(tmp_path / "mine"))
    assert result.exit_code == 0, result.output
    recipe = load_recipe(tmp_path / "mine" / "recipes" / "quickstart.yaml")
    assert recipe.constitution == load_constitution(tmp_path / "mine" / "constitutions" / "micro.yaml")
    assert recipe.constitution.path.is_relative_to(tmp_path)
    load_profile(str(tmp_path / "mine" / "configs" / "cpu.yaml"))
    assert (tmp_path / "mine" / "configs" / "multi-node" / "2x8gpu-zero3.sbatch").is_file()
    for name in ("assistant", "harmlessness", "helpful-honest", "micro"):
        path = tmp_path / "mine" / "constitutions" / f"{name}.yaml"
        assert load_constitution(path).principles == load_constitution(name).principles
    documents = list((tmp_path / "mine").rglob("*.yaml"))
    assert len(documents) == 8
    for path in documents:
        schema = path.read_text().splitlines()[0].partition("$schema=")[2]
        jsonschema.validate(yaml.safe_load(path.read_text()), json.loads((path.parent / schema).read_text()))
    again = cai("init", str(tmp_path / "mine"))
    assert again.exit_code == 2
    assert "is there already" in again.stderr


def test_what_init_writes_to_be_filled_in_passes_its_checks(tmp_path):
    lines = cai("init", str(tmp_path / "mine")).stdout.splitlines()
    commands = [line.split() for line in lines[-3:]]
    assert [command[1:3] for command in commands[:2]] == [["constitution", "check"], ["recipe", "check"]]
    for command in commands:
        result = cai(*command[1:])
        assert (result.exit_code, result.stderr) == (0, ""), command
    assert "0 reused, 13 would run" in result.stdout


# Rows of a finished run of four feedback stages, about two prompts.
PROMPT = {"prompt_id": "p" * 16, "prompt": [{"role": "user", "content": "why?\nand how?"}], "tags": ["helpful"]}
SAMPLING = {"finish_reason": "stop", "n_tokens": 4, "model": "m", "seed": 1}
SAMPLES = [
    {**PROMPT, **SAMPLING, "id": name * 16, "response": text}
    for name, text in (("a", "Because."), ("b", "[red]\x1b[31m\u202eno[/red]"), ("c", "Perhaps."))
]
REVISION = {
    **SAMPLES[0], "id": "d" * 16, "original": "Because.", "response": "Because it is so.",
    "rounds": [{"principle": "clear", "critique": "Too short.", "revision": "Because it is so.", "outcome": "revised"}],
}  # fmt: skip
VOTE = {
    **PROMPT, "id": "e" * 16, "judge": "m", "constitution": "c", "human": 0.0,
    "a": {"id": "a" * 16, "text": "Because.", "model": "m"}, "b": {"id": "b" * 16, "text": "no", "model": "m"},
    "votes": [
        {"principle": "clear", "order": order, "log_odds": log_odds, "option_probability": 1.0}
        for order, log_odds in (("ab", 1.5), ("ba", 0.5))
    ],
}  # fmt: skip
PREFERENCE = {
    **PROMPT, "id": "f" * 16, "pair_id": "e" * 16, "p_chosen": 0.73, "log_odds": 1.0, "source": "ai", "judge": "m",
    "constitution": "c", "chosen": [{"role": "assistant", "content": "Because."}],
    "rejected": [{"role": "assistant", "content": "no"}],
}  # fmt: skip
OTHER_PROMPTS_SAMPLE = {**SAMPLES[0], "id": "9" * 16, "prompt_id": "8" * 16, "response": "Else."}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run folder with these rows."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "small"
    stages = {
        "responses": ("texts", [*SAMPLES, OTHER_PROMPTS_SAMPLE]), "revisions": ("texts", [REVISION]),
        "votes": ("votes", [VOTE]), "preferences": ("preferences", [PREFERENCE]),
    }  # fmt: skip
    for stage, (gives, rows) in stages.items():
        folder = run / f"{stage}-0"
        folder.mkdir(parents=True)
        (folder / "records.jsonl").write_text("".join(row_lines(rows)))
        write_json(folder / "stage.json", {"gives": gives})
        run_folder.mark_done(folder, run_folder.Outputs("digest", {}))
        run_folder.set_latest(run, stage, folder)
    write_json(run / "run.json", {"stages": list(stages)})
    return run


def test_show_tells_a_prompts_whole_life(run):
    text = cai("show", "small", "p").stdout
    for words in (
        "user: why?", "Because.", "round 1: clear, revised", "critique: Too short.", "Perhaps.", "people chose b",
        "clear           +1.50    +0.50    +1.00  a", "chosen with probability 0.730",
    ):  # fmt: skip
        assert words in text
    assert "Else." not in text


@pytest.mark.parametrize(
    ("item", "stages"),
    [("c", ["responses"]), ("a", ["responses", "revisions", "votes", "preferences"]),
     ("f", ["responses", "votes", "preferences"]), ("9", ["responses"])],
)  # fmt: skip
def test_show_of_one_row_tells_what_it_is_linked_to(run, item, stages):
    assert list(json.loads(cai("show", "small", item, "--json").stdout)) == stages


def test_show_lets_nothing_steer_the_terminal(run):
    text = cai("show", "small", "b").stdout
    assert "[red]" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_show_asks_for_one_item(run):
    assert cai("show", "small", "--random").stdout.startswith(("prompt pppp", "prompt 8888"))
    assert cai("show", "small").exit_code == 2
    missing = cai("show", "small", "zz")
    assert missing.exit_code == 2
    assert "begins with 'zz'" in missing.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["base"], "expected NAME=MODEL"),
        (["base=start", "base=start"], "a second time"),
        (["base=start", "--prompts", "nowhere.jsonl"], "no such file, and not micro:SPLIT"),
    ],
)
def test_compare_refuses_in_one_sentence(folder, arguments, words):
    result = cai("compare", "--prompts", "first.jsonl", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_compare_writes_nothing_where_a_model_is_missing(folder):
    result = cai("compare", "--prompts", "first.jsonl", "base=start", "new=no/such/model")
    assert result.exit_code == 2
    assert not list(Path("runs").glob("compare-*"))


def compare_start_with(model: str) -> Path:
    """The recipe that `cai compare` writes for the model `start` and another one."""
    return comparison_recipe(
        ["base=start", f"new={model}"], "first.jsonl", "constitution.yaml", None, 3, None, None, Path("runs")
    )


def test_compare_takes_the_model_that_a_stage_trained(folder):
    trained = Path("runs/small/policy-0")
    shutil.copytree("start", trained / "model")
    run_folder.set_latest(trained.parent, "policy", trained)
    recipe = load_recipe(compare_start_with("small/policy"))
    assert recipe.stages["comparison"].models["new"] == str((trained / "model").resolve())


def test_compare_writes_a_recipe_that_is_whole(folder):
    path = compare_start_with("start")
    recipe = load_recipe(path)
    assert recipe.stages["comparison"].judge == str(folder / "start")
    assert recipe.prompts["prompts"].limit == 3
    assert path.parent.name == recipe.name


def test_compare_takes_the_columns_of_a_file_and_a_name(tmp_path):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("question,topic\nWhy?,physics\n", encoding="utf-8")
    columns = "prompt=question, tags=topic"
    path = comparison_recipe(["base=micro"], str(prompts), None, None, None, columns, "mine", tmp_path / "runs")
    assert path == tmp_path / "runs" / "mine" / "recipe.yaml"
    assert load_recipe(path).prompts["prompts"].columns.model_dump(exclude_none=True) == {
        "prompt": "question", "tags": "topic",
    }  # fmt: skip
    with pytest.raises(BadInput, match="--columns: found 'question', expected KEY=COLUMN as in prompt=question"):
        comparison_recipe(["base=micro"], str(prompts), None, None, None, "question", None, tmp_path / "runs")
