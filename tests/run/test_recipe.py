"""Recipes are checked as a whole before anything runs; whatever is wrong is one sentence with a position."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import toy_stages
from click.testing import CliRunner

from cai.cli import main
from cai.contracts.profile import load_profile
from cai.document.shipped import shipped_folder, shipped_names
from cai.run.recipe import load_recipe
from cai.text.errors import BadInput

GOOD = """name: small
model: start
constitution: constitution.yaml
prompts:
  red_team: {source: first.jsonl}
  heldout: {source: held.jsonl, hold_out: true}
stages:
  - {id: responses, kind: sample, prompts: [red_team]}
  - {id: revisions, kind: revise, from: responses}
  - id: sl-cai
    kind: sft
    from: [revisions, responses]
    train: {learning_rate: 2.0e-4}
  - {id: candidates, kind: sample, model: sl-cai, prompts: [red_team], n: 2}
  - {id: votes, kind: judge, from: candidates}
  - {id: preferences, kind: prefer, from: votes}
  - {id: reward, kind: reward, model: sl-cai, from: preferences}
  - {id: policy, kind: dpo, model: sl-cai, from: preferences, train: {beta: 0.1}}
  - {id: comparison, kind: compare, models: {base: start, policy: policy}, prompts: heldout}
"""

# What is replaced in GOOD by what, the line and the text at which the sentence points, and what it says.
BROKEN = [
    ("name: small", "name: small\nname: other", 2, "name: other", "a second time"),
    ("name: small", "nam: small", 1, "nam:", "did you mean 'name'"),
    ("name: small", "name: small\nseed: seven", 2, "seven", "whole number"),
    ("model: start", "model: strat/", 2, "strat/", "no such folder"),
    ("  red_team:", "\tred_team:", 5, "\tred_team", "found a tab"),
    ("constitution: constitution.yaml", "constitution: constitutoin.yaml", 3, "constitutoin", "constitution.yaml"),
    ("constitution: constitution.yaml\n", "", 8, "revise, from", "names no `constitution:`"),
    ("kind: sample, prompts: [red_team]}", "kind: smaple, prompts: [red_team]}", 8, "smaple", "did you mean 'sample'"),
    ("prompts: [red_team]}\n  - {id: rev", "prompts: [red_teem]}\n  - {id: rev", 8, "red_teem", "mean 'red_team'"),
    ("from: responses}", "from: response}", 9, "response}", "did you mean 'responses'"),
    ("id: revisions,", "id: responses,", 9, "responses, kind", "a second time"),
    ("id: votes,", "id: start,", 15, "start", "the name of a model too"),
    ("id: votes,", "id: 'a vote',", 15, "'a vote'", "found the text 'a vote'"),
    ("from: [revisions, responses]", "from: [votes, responses]", 12, "votes,", "gives votes, but sft takes texts"),
    ("from: votes}", "from: candidates}", 16, "candidates}", "gives texts, but prefer takes votes"),
    ("model: sl-cai, prompts", "model: sl-cia, prompts", 14, "sl-cia", "did you mean 'sl-cai'"),
    ("model: sl-cai, prompts", "model: votes, prompts", 14, "votes", "expected a stage that trains a model: sl-cai"),
    ("policy: policy}", "policy: preferences}", 19, "preferences}", "gives preferences"),
    ("from: responses}", "from: responses, model: sl-cai}", 9, "{id: revisions", "revisions -> sl-cai -> revisions"),
    ("learning_rate: 2.0e-4", "learning_rat: 2.0e-4", 13, "learning_rat:", "did you mean 'learning_rate'"),
    ("learning_rate: 2.0e-4", "learning_rate: fast", 13, "fast", "expected a number, as in SFTConfig"),
    ("learning_rate: 2.0e-4", "per_device_train_batch_size: 4", 13, "per_device", "the profile's micro_batch"),
    ("learning_rate: 2.0e-4", "deepspeed: zero3.json", 13, "deepspeed", "the profile's accelerate file"),
    ("learning_rate: 2.0e-4", "save_total_limit: 1", 13, "1", "expected at least 2"),
    ("learning_rate: 2.0e-4", "output_dir: here", 13, "output_dir", "is the stage's folder"),
    ("beta: 0.1", "lr_scheduler_type: cosin", 18, "cosin", "did you mean 'cosine'"),
    ("kind: judge,", "kind: judge, pairs: some,", 15, "some", "expected one of disjoint, all, random"),
    ("kind: judge,", "kind: judge, pair: all,", 15, "pair:", "did you mean 'pairs'"),
    ("first.jsonl", "frist.jsonl", 5, "frist", "did you mean 'first.jsonl'"),
    ("kind: prefer,", "kind: prefer, pairs: {source: humans.jsonl},", 16, "humans", "no such file or folder"),
    ("kind: prefer,", "kind: prefer, tag_weights: {styl: 2},", 16, "2", "in 'tiny': none has any"),
    (
        "kind: prefer,",
        "kind: prefer, pairs: {source: first.jsonl, tags: [helpful]}, mix: {human_tags: [helpfull]},",
        16,
        "helpfull",
        "did you mean 'helpful'",
    ),
    ("kind: prefer,", "kind: prefer, mix: {human_share: 0.5},", 16, "{id: preferences", "`pairs:` beside it"),
    ("kind: judge, from: candidates", "kind: judge", 15, "{id: votes", "neither `from:` nor `human:`"),
    ("stages:\n", "stages: *all\n#", 7, "*all", "alias"),
]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """The good recipe in a folder of its own, which is the working directory too."""
    monkeypatch.chdir(tmp_path)
    return toy_stages.make_recipe(tmp_path, GOOD)


def test_the_good_recipe_resolves_its_names(recipe):
    loaded = load_recipe(recipe)
    stages = loaded.stages
    assert [stage_id for stage_id in stages if "." not in stage_id] == re.findall(r"id: ([\w-]+)", GOOD)
    parts = ["comparison.base", "comparison.policy", "comparison.policy.votes", "comparison"]
    assert list(stages)[-4:] == loaded.parts_of("comparison") == parts
    assert stages["responses"].model == "start"
    assert stages["votes"].judge == "sl-cai", "judge: self is whoever wrote the responses"
    assert stages["comparison"].judge == "start", "where nobody wrote them it is the recipe's model"


@pytest.mark.parametrize(("old", "new", "line", "at", "words"), BROKEN, ids=[new[:30] for _, new, *_ in BROKEN])
def test_a_broken_recipe_is_one_sentence_with_a_position(recipe, old, new, line, at, words):
    assert GOOD.count(old) == 1
    recipe.write_text(GOOD.replace(old, new))
    result = CliRunner().invoke(main, ["run", "recipe.yaml"])
    assert result.exit_code == 2, result.output
    sentence = re.fullmatch(r"recipe\.yaml:(\d+):(\d+): (.*)\n", result.stderr)
    assert sentence, result.stderr
    assert int(sentence[1]) == line
    assert recipe.read_text().splitlines()[line - 1][int(sentence[2]) - 1 :].startswith(at)
    assert words in sentence[3]
    assert result.stdout == ""


def test_a_tag_that_no_principle_has_gets_no_weight_but_the_nearest_name(recipe):
    tagged = toy_stages.CONSTITUTION.replace("kind., weight", "kind., tags: [style], weight")
    (recipe.parent / "constitution.yaml").write_text(tagged)
    assert load_recipe(recipe, ["stages.preferences.tag_weights={style: 2}"])
    with pytest.raises(
        BadInput, match="found 'styl', expected a tag of principles in 'tiny': style; did you mean 'style'"
    ):
        load_recipe(recipe, ["stages.preferences.tag_weights={styl: 2}"])


def test_stages_run_after_what_they_need_wherever_they_are_written(recipe):
    lines = GOOD.splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if "id: votes" in line)
    recipe.write_text("".join([*lines[:7], lines[at], *lines[7:at], *lines[at + 1 :]]))
    order = list(load_recipe(recipe).stages)
    assert order.index("candidates") < order.index("votes") < order.index("preferences")


def test_self_is_refused_where_two_models_wrote_the_responses(recipe):
    recipe.write_text(GOOD.replace("kind: judge, from: candidates", "kind: judge, from: [candidates, responses]"))
    with pytest.raises(BadInput, match=r"15:5: .*these are sl-cai and start; name one"):
        load_recipe(recipe)


def test_a_judge_may_be_a_model_or_a_stage(recipe):
    assert load_recipe(recipe, ["judge=sl-cai"]).stages["votes"].judge == "sl-cai"
    assert load_recipe(recipe, ["stages.votes.judge=start"]).stages["votes"].judge == "start"


def test_set_changes_values_by_stage_id(recipe):
    loaded = load_recipe(
        recipe,
        [
            "stages.policy.train.beta=0.2",
            "stages.responses.n=3",
            "seed=5",
            "stages.sl-cai.from=[responses]",
            "prompts.red_team.limit=2",
        ],
    )
    assert loaded.stages["policy"].train["beta"] == 0.2
    assert loaded.stages["responses"].n == 3
    assert loaded.seed == 5
    assert loaded.stages["sl-cai"].from_ == ["responses"]
    assert loaded.prompts["red_team"].limit == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.polcy.train.beta=0.2", "did you mean 'policy'"),
        ("stages.policy.train.bta=0.2", "did you mean 'beta'"),
        ("stages.policy.train.beta=much", "expected a number"),
        ("sed=1", "did you mean 'seed'"),
        ("seed", "expected key=value"),
        ("stages.votes.from=[candidates", "expected"),
        ("stages.votes.judge=preferences", "expected a stage that trains a model"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_given(recipe, override, words):
    result = CliRunner().invoke(main, ["run", "recipe.yaml", "--set", override])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"--set {override}")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_checking_a_recipe_imports_neither_torch_nor_trl(recipe):
    code = (
        "import sys; from cai.run.recipe import load_recipe; load_recipe('recipe.yaml'); "
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=recipe.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", shipped_names("recipes"))
def test_shipped_recipes_are_whole(name):
    text = (shipped_folder("recipes") / f"{name}.yaml").read_text()
    assert re.search(r"^# Run: +cai run ", text, re.M), "the head of a recipe says how to run it"
    assert re.search(r"^# Tried: ", text, re.M), "and where that was tried"
    load_recipe(name)


@pytest.mark.parametrize("name", shipped_names("configs"))
def test_shipped_profiles_are_whole(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.inline == (name in {"cpu", "server"})
    micro, steps = profile.accumulation(96)
    assert micro * steps * profile.processes == 96


@pytest.mark.parametrize(
    "path", sorted((shipped_folder("configs") / "accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_files_are_ones_that_accelerate_takes(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes == load_profile(path.stem).processes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("micro_batsh: 4", "p.yaml:1:1: micro_batsh: unknown key"),
        ("processes: 0", "p.yaml:1:12: processes: "),
        ("processes: 2", "an `accelerate:` file"),
        ("accelerate: none.yaml", "p.yaml:1:13: accelerate: no such file"),
        ("device: tpu", "p.yaml:1:9: device: "),
        ("launcher: [srun]", "p.yaml:1:11: launcher: expected `nodes:` above 1 and a `launcher:` that reaches them"),
        ("fork: true", "p.yaml:1:7: fork: expected `device: cpu` and `engine: local`, without"),
        ("device: cpu\nengine: vllm\nfork: true", "p.yaml:3:7: fork: expected `device: cpu` and `engine: local`"),
        ("nodes: 2", "p.yaml:1:8: nodes: found 2, which cannot share 1 processes"),
    ],
)
def test_a_broken_profile_is_one_sentence(recipe, text, words):
    Path("p.yaml").write_text(text)
    result = CliRunner().invoke(main, ["run", "recipe.yaml", "--on", "p.yaml"])
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["ppo", "rloo"])
@pytest.mark.parametrize("key", ["tensor_parallel", "data_parallel"])
def test_a_policy_in_a_vllm_on_several_gpus_is_refused_before_anything_runs(recipe, kind, key):
    Path("p.yaml").write_text(f"engine: vllm\nvllm: {{{key}: 2}}\n")
    learns = f"  - {{id: learned, kind: {kind}, prompts: [red_team], rewards: [{{judge: model}}], batch_size: 8}}\n"
    recipe.write_text(recipe.read_text().rstrip("\n") + "\n" + learns)
    result = CliRunner().invoke(main, ["run", "recipe.yaml", "--on", "p.yaml"])
    assert result.exit_code == 2
    assert f"profile 'p': found `vllm: {{{key}: 2}}`, but stage 'learned' samples" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("runs").exists()


def test_a_batch_that_processes_cannot_share_is_refused_before_anything_runs(recipe):
    odd = ["--set", "stages.sl-cai.batch_size=31"]
    result = CliRunner().invoke(main, ["run", "recipe.yaml", "--on", "cpu-2-ranks", *odd])
    assert result.exit_code == 2
    assert "batch_size 31 cannot be split over the 2 processes" in result.stderr
    assert not Path("runs").exists()
