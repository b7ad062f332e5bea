"""A model that cannot do what a recipe or a command names it for is refused before anything runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import toy_stages
from click.testing import CliRunner, Result
from recipe_runs import plan
from toy_stages import GOOD

from cai.cli import main
from cai.models.reference import MICRO
from cai.run.recipe import load_recipe
from cai.storage import run_folder
from cai.text.errors import BadInput

CLASSIFIER = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "score"}}
WRITER = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
IS_CLASSIFIER = "is a sequence classifier, which gives a score, expected a language model, which writes"
ABSENT = "is neither a folder here nor in the Hugging Face cache: give the path of a folder, or download it"
REWARDED = GOOD + "  - {id: best, kind: best-of-n, from: candidates, rewards: [{model: reward}]}\n"


def cai(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def trained(run: Path, stage: str, config: dict[str, object]) -> None:
    """Makes a model that stage `stage` of `run` has trained."""
    model = toy_stages.make_model(run / f"{stage}-0" / "model", stage)
    (model / "config.json").write_text(json.dumps(config))
    run_folder.set_latest(run, stage, run / f"{stage}-0")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe, and a run `quickstart` that trained a reward model and a policy."""
    monkeypatch.chdir(tmp_path)
    toy_stages.make_recipe(tmp_path, REWARDED)
    trained(tmp_path / "runs" / "quickstart", "reward", CLASSIFIER)
    trained(tmp_path / "runs" / "quickstart", "policy", WRITER)
    return tmp_path


def refusal(*arguments: str) -> str:
    """The one sentence that a command refuses its input with, when it has left nothing behind."""
    before = sorted(Path().rglob("*"))
    result = cai(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return result.stderr


def test_a_classifier_is_not_compared(folder: Path) -> None:
    message = refusal("compare", "a=micro", "b=quickstart/reward", "--prompts", "micro:test")
    assert message == f"b=quickstart/reward: 'quickstart/reward' {IS_CLASSIFIER}\n"
    message = refusal("compare", "a=micro", "--judge", "quickstart/reward", "--prompts", "micro:test")
    assert message == f"--judge quickstart/reward: 'quickstart/reward' {IS_CLASSIFIER}\n"


@pytest.mark.parametrize(
    "override",
    [
        "model=quickstart/reward", "judge=quickstart/reward", "stages.candidates.model=quickstart/reward",
        "stages.votes.judge=quickstart/reward", "stages.sl-cai.model=quickstart/reward",
        "stages.policy.model=quickstart/reward", "stages.comparison.models.base=quickstart/reward",
        "stages.comparison.judge=quickstart/reward",
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [["run"], ["run", "--dry-run"], ["plan"]], ids=" ".join)
def test_a_classifier_does_not_write_judge_or_become_a_policy(folder: Path, override: str, command: list[str]) -> None:
    message = refusal(*command, "recipe.yaml", "--set", override)
    key = override.partition("=")[0].replace(".", r"\.")
    place = re.sub(r"stages\\\.[\w-]+", r"stages\\[\\d\\]", key)
    assert re.fullmatch(rf"--set {key}=quickstart/reward: {place}: 'quickstart/reward' {IS_CLASSIFIER}\n", message)


@pytest.mark.parametrize("override", ["judge=reward", "stages.policy.model=reward", "stages.candidates.model=reward"])
def test_nor_does_a_reward_model_that_the_recipe_trains(folder: Path, override: str) -> None:
    message = refusal("run", "recipe.yaml", "--dry-run", "--set", override)
    assert "stage 'reward' gives reward, expected a stage that gives policy: sl-cai, policy" in message


def test_a_reward_model_starts_from_either_kind(folder: Path) -> None:
    for start in ("quickstart/reward", "quickstart/policy"):
        recipe = load_recipe("recipe.yaml", [f"stages.reward.model={start}"])
        assert recipe.models[start].path.startswith(str(folder / "runs"))


def test_a_language_model_does_not_score(folder: Path) -> None:
    message = refusal("run", "recipe.yaml", "--dry-run", "--set", "stages.best.rewards=[{model: quickstart/policy}]")
    assert "'quickstart/policy' is a language model, which writes, expected a sequence classifier" in message
    assert load_recipe("recipe.yaml", ["stages.best.rewards=[{model: quickstart/reward}]"])


# What is done to the model `start`, the options, and words of the refusal.
FINDINGS = {
    "no such judge": ("", "judge=nobody", f"--set judge=nobody: judge: model 'nobody' {ABSENT}"),
    "no such model": ("", "model=org/none", f"--set model=org/none: model: model 'org/none' {ABSENT}"),
    "a misspelt run": ("", "judge=quickstrat/policy", "did you mean 'quickstart/policy'?"),
    "a misspelt stage": ("", "judge=quickstart/polcy", "expected one of: reward, policy; did you mean 'policy'?"),
    "no tokenizer": ("rm start/tokenizer.json", "", "recipe.yaml:2:8: model: model 'start' has no tokenizer in "),
    "half the weights": ("cut start/model.safetensors", "", "recipe.yaml:2:8: model: model 'start': "),
    "a broken config": ("cut start/config.json", "", "start/config.json: not JSON"),
    "one response": ("", "stages.candidates.n=1", "--set stages.candidates.n=1: stages[3].n: stage 'votes' comp"),
    "no epochs": ("", "stages.policy.train.num_train_epochs=0", "found 0, expected a number above 0"),
    "a negative rate": ("", "stages.sl-cai.train.learning_rate=-1e-4", "found -0.0001, expected a number above 0"),
    "no rate": ("", "stages.sl-cai.train.learning_rate=0", "found 0, expected a number above 0"),
    "not a number": ("", "stages.sl-cai.train.learning_rate=.nan", "found nan, expected a number above 0"),
    "no beta": ("", "stages.policy.train.beta=0", "found 0, expected a number above 0"),
    "no steps": ("", "stages.policy.train.max_steps=0", "found 0, expected a number of steps above 0, or -1"),
    "a negative decay": ("", "stages.reward.train.weight_decay=-1", "found -1, expected a number of at least 0"),
}


@pytest.mark.parametrize(("damage", "override", "words"), FINDINGS.values(), ids=FINDINGS)
def test_the_dry_run_finds_what_the_run_would(folder: Path, damage: str, override: str, words: str) -> None:
    verb, _, name = damage.partition(" ")
    if verb == "rm":
        Path(name).unlink()
    elif verb == "cut":
        Path(name).write_bytes(Path(name).read_bytes()[:-1])
    options = ["--set", override] if override else []
    message = refusal("run", "recipe.yaml", *options)
    assert words in message
    assert refusal("run", "recipe.yaml", "--dry-run", *options) == message


def test_a_judge_that_no_stage_to_run_asks_is_not_looked_for(folder: Path) -> None:
    steps = plan(folder / "recipe.yaml", "judge=nobody", until="responses")
    assert steps == {"responses": ("runs", "it has not run yet")}


@pytest.mark.parametrize("command", [["run", "quickstart"], ["run", "quickstart", "--dry-run"]], ids=" ".join)
def test_quickstart_with_a_judge_that_does_not_exist(folder: Path, command: list[str]) -> None:
    assert f"--set judge=nobody: judge: model 'nobody' {ABSENT}" in refusal(*command, "--set", "judge=nobody")


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        (["stages.candidates.n=1"], True),
        (["stages.candidates.n=1", "stages.votes.from=revisions"], True),
        (["stages.candidates.n=1", "stages.votes.from=[candidates, responses]", "judge=start"], False),
        (["stages.candidates.n=1", "stages.votes.from=[revisions, responses]"], False),
        (["stages.responses.n=2", "stages.votes.from=revisions"], False),
        (["stages.votes.from=best", "judge=start"], True),
    ],
)
def test_one_response_is_refused_only_where_no_pair_can_arise(folder: Path, changes: list[str], is_refused) -> None:
    if not is_refused:
        load_recipe("recipe.yaml", changes)
        return
    if "best" in changes[0]:
        best = "  - {id: best, kind: best-of-n, from: candidates, rewards: [{model: quickstart/reward}]}\n"
        Path("recipe.yaml").write_text(GOOD + best)
    with pytest.raises(
        BadInput, match=r"'votes' compares two responses to a prompt, and '[a-z]*' gives each prompt one"
    ):
        load_recipe("recipe.yaml", changes)


def test_pairs_that_people_labelled_need_no_second_response(folder: Path) -> None:
    pair = {"prompt": "why?", "chosen": "because", "rejected": "no"}
    Path("pairs.jsonl").write_text(json.dumps(pair) + "\n")
    changes = ["stages.candidates.n=1", "stages.votes.human={source: pairs.jsonl}"]
    assert load_recipe("recipe.yaml", changes).stages["candidates"].n == 1


def test_run_and_stage_are_a_model_wherever_one_is_named(folder: Path) -> None:
    names = ["model=quickstart/policy", "judge=quickstart/policy", "stages.candidates.model=quickstart/policy"]
    recipe = load_recipe("recipe.yaml", [*names, "stages.best.rewards=[{model: quickstart/reward}]"])
    latest = folder / "runs" / "quickstart"
    assert {name: model.path for name, model in recipe.models.items()} == {
        "quickstart/policy": str(latest / "policy-0" / "model"),
        "quickstart/reward": str(latest / "reward-0" / "model"),
        "start": str(folder / "start"),
    }
    elsewhere = load_recipe("recipe.yaml", names[:1], runs=folder / "others").models["quickstart/policy"]
    assert elsewhere.path == "quickstart/policy", "a hub id, where no run is called so"


@pytest.fixture
def micro_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run `quickstart` whose stage `policy` trained what is the embedded model."""
    monkeypatch.chdir(tmp_path)
    stage = tmp_path / "runs" / "quickstart" / "policy-0"
    shutil.copytree(MICRO, stage / "model")
    run_folder.set_latest(stage.parent, "policy", stage)
    return tmp_path


def test_constitution_test_and_judge_attack_ask_what_a_stage_trained(micro_run: Path) -> None:
    document = "name: one\nprinciples:\n  - {id: kind, text: The assistant is kind., examples: "
    document += "[{prompt: why?, better: Because of the rain., worse: Shut up.}]}\n"
    Path("one.yaml").write_text(document)
    result = cai("constitution", "test", "one.yaml", "--model", "quickstart/policy", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == "quickstart/policy"
    attack = ["judge", "attack", "--model", "quickstart/policy", "--constitution", "one.yaml", "--per-family", "2"]
    result = cai(*attack, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == "quickstart/policy"


def test_compare_is_judged_by_what_a_stage_trained(micro_run: Path) -> None:
    command = ["compare", "a=micro", "b=quickstart/policy", "--prompts", "micro:test", "--limit", "2"]
    result = cai(*command, "--judge", "quickstart/policy", "--set", "stages.comparison.max_new_tokens=4")
    assert result.exit_code == 0, result.output
    (recipe,) = Path("runs").glob("compare-*/recipe.yaml")
    assert f"judge: {micro_run}/runs/quickstart/policy-0/model" in recipe.read_text()


@pytest.mark.parametrize(
    "command", [["constitution", "test", "micro"], ["judge", "attack"], ["micro", "evaluate"]], ids=" ".join
)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody", f"--model nobody: model 'nobody' {ABSENT}"),
        ("quickstart/reward", f"--model quickstart/reward: 'quickstart/reward' {IS_CLASSIFIER}"),
        ("quickstart/polcy", "did you mean 'policy'?"),
        ("quickstrat/policy", "did you mean 'quickstart/policy'?"),
    ],
)
def test_a_judge_of_a_command_is_refused_in_one_sentence(folder, command: list[str], name: str, words: str) -> None:
    assert words in refusal(*command, "--model", name)


@pytest.mark.parametrize("command", ["compare", "constitution test", "judge attack", "micro evaluate"])
def test_help_says_that_run_and_stage_name_a_model(command: str) -> None:
    assert "RUN/STAGE" in cai(*command.split(), "--help").output
