"""Recipes are checked as a whole before anything runs; whatever is wrong is one sentence with a position."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest
import toy_stages
from click.testing import CliRunner
from toy_stages import GOOD

from cai.cli import main
from cai.contracts.profile import load_profile
from cai.contracts.training_config import ReinforcementConfig
from cai.document.shipped import shipped_folder, shipped_names
from cai.run.plan import Planner
from cai.run.recipe import load_recipe
from cai.run.recipe_names import needs
from cai.stages import config_class
from cai.storage.run_folder import Finished, Outputs
from cai.text.errors import BadInput
from cai.training import train_fields

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
    ("model: sl-cai, prompts", "model: votes, prompts", 14, "votes", "expected a stage that gives policy: sl-cai"),
    ("policy: policy}", "policy: preferences}", 19, "preferences}", "gives preferences"),
    ("from: responses}", "from: responses, model: sl-cai}", 9, "{id: revisions", "revisions -> sl-cai -> revisions"),
    ("learning_rate: 2.0e-4", "learning_rat: 2.0e-4", 13, "learning_rat:", "did you mean 'learning_rate'"),
    ("learning_rate: 2.0e-4", "learning_rate: fast", 13, "fast", "expected a number, as in SFTConfig"),
    ("learning_rate: 2.0e-4", "per_device_train_batch_size: 4", 13, "per_device", "the profile's micro_batch"),
    ("learning_rate: 2.0e-4", "deepspeed: zero3.json", 13, "deepspeed", "the profile's accelerate file"),
    ("learning_rate: 2.0e-4", "save_total_limit: 1", 13, "1", "expected at least 2"),
    ("learning_rate: 2.0e-4", "output_dir: here", 13, "output_dir", "is the stage's folder"),
    ("beta: 0.1", "lr_scheduler_type: cosin", 18, "cosin", "did you mean 'cosine'"),
    ("from: candidates}", "from: candidates, method: rating}", 16, "votes}",
     "found votes in points from 1 to 7, expected `points_per_nat`"),
    ("from: votes}", "from: votes, points_per_nat: 2.0}", 16, "2.0}", "expected it with votes of judges that rate"),
    ("kind: judge,", "kind: judge, pairs: some,", 15, "some", "expected one of disjoint, all, random"),
    ("kind: judge,", "kind: judge, pair: all,", 15, "pair:", "did you mean 'pairs'"),
    ("first.jsonl", "frist.jsonl", 5, "frist", "did you mean 'first.jsonl'"),
    ("kind: prefer,", "kind: prefer, pairs: {source: humans.jsonl},", 16, "humans", "no such file or folder"),
    ("kind: prefer,", "kind: prefer, tag_weights: {styl: 2},", 16, "2", "in 'tiny': none has any"),
    ("kind: prefer,", "kind: prefer, pairs: {source: first.jsonl, tags: [helpful]}, mix: {human_tags: [helpfull]},",
     16, "helpfull", "did you mean 'helpful'"),
    ("kind: prefer,", "kind: prefer, mix: {human_share: 0.5},", 16, "{id: preferences", "`pairs:` beside it"),
    ("kind: judge, from: candidates", "kind: judge", 15, "{id: votes", "neither `from:` nor `human:`"),
    ("stages:\n", "stages: *all\n#", 7, "*all", "alias"),
]  # fmt: skip


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """The good recipe in a folder of its own, which is the working directory too."""
    monkeypatch.chdir(tmp_path)
    return toy_stages.make_recipe(tmp_path, GOOD)


def refusal(*arguments: str, recipe: str = "recipe.yaml") -> str:
    """What `cai run` prints when it refuses the recipe."""
    result = CliRunner().invoke(main, ["run", recipe, *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


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
    message = refusal()
    sentence = re.fullmatch(r"recipe\.yaml:(\d+):(\d+): (.*)\n", message)
    assert sentence, message
    assert int(sentence[1]) == line
    assert recipe.read_text().splitlines()[line - 1][int(sentence[2]) - 1 :].startswith(at)
    assert words in sentence[3]


def test_all_problems_of_a_recipe_are_reported_at_once_each_with_its_place(recipe):
    wrong = {
        "name: small": "name: small\nsed: 1", "model: start": "model: strat/", "first.jsonl": "first.jsonl, tags: help",
        "kind: sample, prompts: [red_team]}": "kind: smaple, prompts: [red_teem]}",
        "from: responses}": "from: responses, rounds: 0}", "from: [revisions,": "from: [revision,",
        "learning_rate: 2.0e-4": "learning_rat: 1, deepspeed: x", "model: sl-cai, prompts": "model: sl-cia, prompts",
        "kind: judge,": "kind: judge, pair: all, principles: harmles,", "policy: policy}": "policy: preferences}",
    }  # fmt: skip
    text = GOOD
    for old, new in wrong.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    recipe.write_text(text)
    result = CliRunner().invoke(main, ["run", "recipe.yaml", "--dry-run"])
    assert result.exit_code == 2
    problems = [re.fullmatch(r"recipe\.yaml:(\d+):(\d+): (.*)", line) for line in result.stderr.splitlines()]
    lines = text.splitlines()
    named = [lines[int(problem[1]) - 1][int(problem[2]) - 1 :] for problem in problems]
    beginnings = (
        "sed", "strat/", "help", "smaple", "0}", "revision,", "learning_rat", "deepspeed", "sl-cia", "pair:",
        "harmles,", "preferences}",
    )  # fmt: skip
    assert len(named) == len(beginnings), result.stderr
    assert all(at.startswith(beginning) for at, beginning in zip(named, beginnings, strict=True)), named


def test_a_wrong_stage_or_prompt_set_is_refused_once_and_not_where_its_name_stands(recipe):
    recipe.write_text(GOOD.replace("first.jsonl", "first.jsonl, limit: 0"))
    assert "prompts.red_team.limit: found the number 0" in refusal()
    recipe.write_text(GOOD.replace("kind: judge,", "kind: judge, pair: all,"))
    assert "stages[4].pair: unknown key" in refusal()
    for key in ("prompts", "constitution"):
        recipe.write_text(GOOD.replace(f"{key}:", f"{key[:-1]}:", 1))
        assert f"{key[:-1]}: unknown key" in refusal()
    recipe.write_text(GOOD)
    assert "prompts: found the number 3, expected a mapping" in refusal("--set", "prompts=3")


def test_a_document_of_another_kind_is_named_with_the_command_that_takes_it(recipe):
    constitution, profile = "constitution.yaml", recipe.parent / "p.yaml"
    assert f"this is a constitution, expected a recipe; `cai constitution check {constitution}` checks it" in refusal(
        recipe=constitution
    )
    profile.write_text("device: cpu\n")
    assert "p.yaml:1:1: this is a profile, expected a recipe; `cai run RECIPE --on p.yaml` uses it" in refusal(
        recipe="p.yaml"
    )
    assert "this is a recipe, expected a profile; `cai run recipe.yaml` runs it" in refusal("--on", "recipe.yaml")
    recipe.write_text(GOOD.replace("constitution: constitution.yaml", "constitution: recipe.yaml"))
    assert "this is a recipe, expected a constitution; `cai run recipe.yaml` runs it" in refusal()
    assert "no recipe 'harmlessness', expected a file or one of" in (message := refusal(recipe="harmlessness"))
    assert message.endswith("; 'harmlessness' is a constitution\n")


def test_principles_that_are_no_list_are_told_how_one_is_written(recipe):
    message = refusal("--set", "stages.votes.principles=harmles")
    assert "expected one, all, a whole number or a list; write `principles: [harmles]`" in message
    message = refusal("--set", "stages.votes.principles=[knd]")
    assert "stages[4].principles[0]: found 'knd', expected ids" in message
    assert "did you mean 'kind'?" in message
    assert "did you mean 'all'?" in refusal("--set", "stages.votes.principles=alll")
    assert "found the number 0, expected a number of at least 1" in refusal("--set", "stages.votes.principles=0")


# A key in the words of another library, and what it is here.
ELSEWHERE = {
    "total_episodes": "is `rollouts` times `rollout_size` of the stage here",
    "num_mini_batches": "is `rollout_size` divided by `batch_size` of the stage here",
    "response_length": "is `max_new_tokens` of the stage here",
    "local_rollout_forward_batch_size": "is the profile's micro_batch here (--on)",
    "per_device_train_batch_size": "is derived from the stage's batch_size and the profile's micro_batch",
    "gradient_accumulation_steps": "is derived from the stage's batch_size and the profile's micro_batch",
    "init_kl_coef": "is `kl_coef` under `train` here",
    "clip_range": "is `cliprange` under `train` here",
    "value_coef": "is `vf_coef` under `train` here",
    "lmbda": "is `lam` under `train` here",
    "ppo_epochs": "is `num_ppo_epochs` under `train` here",
    "num_train_epochs": "is `rollouts` of the stage here",
    "target_kl": "is `limits: {kl: ...}` of the stage here",
}


def test_names_of_other_ppo_implementations_are_answered_with_ours_wherever_they_stand(recipe):
    keys = ", ".join(f"{key}: 4" for key in ELSEWHERE)
    stage = f"{{id: learned, kind: ppo, prompts: [red_team], rewards: [{{judge: model}}], {keys}, train: {{{keys}}}}}"
    recipe.write_text(recipe.read_text().rstrip("\n") + f"\n  - {stage}\n")
    with pytest.raises(BadInput) as refused:
        load_recipe(recipe)
    sentences = [line.partition(": ")[2] for line in str(refused.value).splitlines()]
    at = next(sentence.partition(".")[0] for sentence in sentences)
    assert sentences == [
        *(f"{at}.{key}: {key} {answer}" for key, answer in ELSEWHERE.items()),
        *(f"{at}.train.{key}: {key} {answer}" for key, answer in ELSEWHERE.items()),
    ]
    recipe.write_text(GOOD.replace("train: {beta: 0.1}", "beta: 0.1, train: {batch_size: 8}"))
    with pytest.raises(BadInput) as refused:
        load_recipe(recipe)
    assert "].beta: beta stands under `train:`" in str(refused.value)
    assert "].train.batch_size: batch_size stands in the stage itself, not under train" in str(refused.value)


@pytest.mark.parametrize("kind", ["ppo", "rloo"])
def test_every_name_of_another_implementation_is_answered_by_a_key_that_exists(kind):
    stage_class = config_class(kind)
    answers = train_fields.ELSEWHERE[stage_class.train_class]
    keys = {*stage_class.model_fields, *train_fields.fields(stage_class.train_class)}
    assert not answers.keys() & stage_class.model_fields
    assert {key for answer in answers.values() for key in re.findall(r"`(\w+)", answer)} <= keys | {"train"}


def test_all_problems_of_a_profile_are_reported_at_once(recipe):
    Path("p.yaml").write_text("processes: 3\nnodes: 2\nvllm: {python: nowhere}\nlauncher: [srun]\n")
    result = CliRunner().invoke(main, ["run", "recipe.yaml", "--on", "p.yaml"])
    assert result.exit_code == 2
    places = [line.partition(" ")[0] for line in result.stderr.splitlines()]
    assert places == ["p.yaml:1:12:", "p.yaml:2:8:", "p.yaml:3:16:"]
    Path("p.yaml").write_text("processes: 0\nmicro_batsh: 3\nengine: vlm\n")
    result = CliRunner().invoke(main, ["run", "recipe.yaml", "--on", "p.yaml"])
    assert [line.partition(" ")[0] for line in result.stderr.splitlines()] == [
        "p.yaml:1:12:", "p.yaml:2:1:", "p.yaml:3:9:",
    ]  # fmt: skip


def test_a_comparison_reads_no_votes_in_points(recipe):
    votes = "{id: ratings, kind: judge, from: [candidates, responses], judge: start, pairs: against, method: rating}"
    figures = "{id: rated, kind: comparison, responses: {a: candidates}, votes: ratings, models: {a: sl-cai}"
    figures += ", judge: start, prompts: red_team}"
    recipe.write_text(GOOD + f"  - {votes}\n  - {figures}\n")
    message = refusal()
    assert "found votes in points from 1 to 7, expected votes in nats" in message
    assert "votes: found" in message, "the position is that of the key that names the judges"
    assert "set `method: pairwise` or `method: reasoned` in stage 'ratings'" in message


def test_a_tag_that_no_principle_has_gets_no_weight_but_the_nearest_name(recipe):
    tagged = toy_stages.CONSTITUTION.replace("kind., weight", "kind., tags: [style], weight")
    (recipe.parent / "constitution.yaml").write_text(tagged)
    assert load_recipe(recipe, ["stages.preferences.tag_weights={style: 2}"])
    message = "found 'styl', expected a tag of principles in 'tiny': style; did you mean 'style'"
    with pytest.raises(BadInput, match=message):
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
    overrides = ["stages.policy.train.beta=0.2", "stages.responses.n=3", "seed=5", "stages.sl-cai.from=[responses]"]
    loaded = load_recipe(recipe, [*overrides, "prompts.red_team.limit=2"])
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
        ("stages.votes.judge=preferences", "expected a stage that gives policy: sl-cai"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_given(recipe, override, words):
    message = refusal("--set", override)
    assert message.startswith(f"--set {override}")
    assert words in message


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
    assert words in refusal("--on", "p.yaml")


@pytest.mark.parametrize("kind", ["ppo", "rloo"])
@pytest.mark.parametrize("key", ["tensor_parallel", "data_parallel"])
def test_a_policy_in_a_vllm_on_several_gpus_is_refused_before_anything_runs(recipe, kind, key):
    Path("p.yaml").write_text(f"engine: vllm\nvllm: {{{key}: 2}}\n")
    learns = f"  - {{id: learned, kind: {kind}, prompts: [red_team], rewards: [{{judge: model}}], batch_size: 8}}\n"
    recipe.write_text(recipe.read_text().rstrip("\n") + "\n" + learns)
    message = refusal("--on", "p.yaml")
    assert f"profile 'p': found `vllm: {{{key}: 2}}`, but stage 'learned' samples" in message
    assert not Path("runs").exists()


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_batch_that_processes_cannot_share_is_refused_before_anything_runs(recipe, dry_run):
    message = refusal("--set", "stages.sl-cai.batch_size=31", "--on", "cpu-2-ranks", *dry_run)
    assert "batch_size 31 cannot be split over the 2 processes" in message
    assert not Path("runs").exists()


# What is replaced in the recipe by what, the beginning of the message, and words of it.
NAMES = [
    ("seed: 0", "judge: sl_cai", "recipe.yaml:2:8: ", "did you mean 'sl-cai'?"),
    ("seed: 0", "judge: votes", "recipe.yaml:2:8: ", "expected a stage that gives policy: sl-cai"),
    ("seed: 0", "templates: defalt", "recipe.yaml:2:12: ", "did you mean 'default'?"),
    ("prompts: heldout}", "prompts: heldout, principles: [knd]}", "recipe.yaml:20:", "did you mean 'kind'?"),
    ("from: responses}", "from: responses, principles: [hnest]}", "recipe.yaml:10:", "did you mean 'honest'?"),
    ("from: responses}", "from: responses, only: [rd_team]}", "recipe.yaml:10:", "did you mean 'red_team'?"),
]
# The list of rewards, the text at which the message points, and words of it.
REWARDS = [
    ("{model: rewrd}", "rewrd", "did you mean 'reward'?"),
    ("{model: policy}", "policy", "stage 'policy' gives policy, expected a stage that gives reward: reward"),
    ("{model: votes}", "votes", "stage 'votes' gives votes, expected a stage that gives reward: reward"),
    ("{model: model}", "model}", "found 'model', expected a `reward` stage or a reward model"),
    ("{model: micro}", "micro", "'micro' is a language model, which writes, expected a sequence classifier"),
    ("{model: 'served:big'}", "'served:big'", "which only a server has, expected a reward model"),
    ("{model: classifier, scale: 7}", "{model: classifier", "found `scale` with `model`, expected it with"),
    ("{judge: reward}", "reward", "stage 'reward' gives reward, expected a stage that gives policy: sl-cai"),
    ("{judge: classifier}", "classifier", "'classifier' is a sequence classifier, which gives a score, expected"),
    ("{judge: model, principles: [knd]}", "knd", "expected ids of principles in 'tiny'; did you mean 'kind'?"),
    ("{function: 'mine.py'}", "'mine.py'", "found 'mine.py', expected `file.py:name`"),
    ("{function: 'mien.py:short'}", "'mien", "no such file 'mien.py', relative to the recipe; did you mean 'mine.py'?"),
    ("{function: 'mine.py:shrt'}", "'mine", "mine.py defines no 'shrt', expected a function; did you mean 'short'?"),
    ("{function: 'odd.py:short'}", "'odd", "odd.py:1 is not Python"),
    ("{model: reward, judge: model}", "{model: reward, judge", "found `model` and `judge`, expected exactly one of"),
    ("{weight: 2}", "{weight", "found none, expected exactly one of `model`, `judge` and `function`"),
    ("{model: reward, wieght: 2}", "wieght", "unknown key"),
    ("{model: reward}, {model: reward, weight: 2}", "[{model", "found two rewards called 'reward'"),
]  # fmt: skip


@pytest.fixture
def tagged(tmp_path, monkeypatch) -> Path:
    """The good recipe with a seed and a tag of its prompts."""
    monkeypatch.chdir(tmp_path)
    good = GOOD.replace("name: small", "name: small\nseed: 0").replace("first.jsonl", "first.jsonl, tags: [red_team]")
    return toy_stages.make_recipe(tmp_path, good)


@pytest.fixture
def rewarded(tagged, monkeypatch) -> Path:
    """A recipe whose last stage but one learns from rewards."""

    class LearnConfig(ReinforcementConfig):
        kind: Literal["learn"] = "learn"

    toy_stages.add_stage("learn", LearnConfig, monkeypatch=monkeypatch)
    classifier = toy_stages.make_model(tagged.parent / "classifier", "weights")
    (classifier / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    (tagged.parent / "mine.py").write_text("def short(prompts, responses):\n    return [-len(r) for r in responses]\n")
    (tagged.parent / "odd.py").write_text("def short(:\n")
    learned = (
        "  - id: learned\n    kind: learn\n    model: sl-cai\n    prompts: red_team\n    rewards: [{model: reward}]\n"
    )
    tagged.write_text(tagged.read_text().replace("  - {id: comparison", f"{learned}  - {{id: comparison"))
    return tagged


@pytest.mark.parametrize(("old", "new", "where", "words"), NAMES, ids=[new for _, new, *_ in NAMES])
def test_a_name_that_nothing_answers_to_is_refused(tagged, old, new, where, words):
    text = tagged.read_text()
    assert text.count(old) == 1
    tagged.write_text(text.replace(old, new))
    message = refusal("--dry-run")
    assert message.startswith(where)
    assert words in message


@pytest.mark.parametrize(("sources", "target", "words"), REWARDS, ids=[sources for sources, *_ in REWARDS])
def test_a_source_of_reward_that_cannot_be_one_is_refused_where_it_stands(rewarded, sources, target, words):
    text = rewarded.read_text().replace("[{model: reward}]", f"[{sources}]")
    rewarded.write_text(text)
    message = refusal("--dry-run")
    position = re.match(r"recipe\.yaml:(\d+):(\d+): ", message)
    assert position, message
    line = text.splitlines()[int(position[1]) - 1]
    assert "rewards:" in line
    assert line[int(position[2]) - 1 :].startswith(target)
    assert words in message


def test_a_judge_among_rewards_needs_a_constitution(rewarded):
    lines = rewarded.read_text().replace("constitution: constitution.yaml\n", "").splitlines(keepends=True)
    text = "".join(line for line in lines if not re.search("id: (revisions|votes|comparison),", line))
    text = text.replace("from: [revisions, responses]", "from: [responses]")
    text = text.replace("kind: prefer, from: votes", "kind: prefer, pairs: {source: first.jsonl}")
    rewarded.write_text(text)
    assert load_recipe(rewarded).constitution is None
    rewarded.write_text(text.replace("[{model: reward}]", "[{judge: model}]"))
    with pytest.raises(BadInput, match="learn asks about principles, but the recipe names no `constitution:`"):
        load_recipe(rewarded)


def test_the_judges_among_rewards_are_resolved_and_all_models_come_first(rewarded):
    toy_stages.make_model(rewarded.parent / "other", "weights")

    def judge(name: str, *overrides: str) -> str:
        loaded = load_recipe(rewarded, [f"stages.learned.rewards=[{{judge: {name}}}]", *overrides])
        return loaded.stages["learned"].rewards[0].judge

    assert judge("model") == "start"
    assert judge("self") == "sl-cai", "the recipe's judge is `self` too: the stage's own starting model"
    assert judge("self", "judge=other") == "other"
    assert judge("policy") == "policy"
    sources = "[{model: reward}, {judge: policy}, {function: 'mine.py:short'}]"
    loaded = load_recipe(rewarded, [f"stages.learned.rewards={sources}"])
    learned = loaded.stages["learned"]
    assert set(needs(learned, set(loaded.stages))) == {"sl-cai", "reward", "policy"}
    assert [reward.log_name for reward in learned.rewards] == ["reward", "judge", "short"]
    assert learned.template_names() == ("rate",)
    lines = rewarded.read_text().splitlines(keepends=True)
    learned_at = next(n for n, line in enumerate(lines) if "id: learned" in line)
    reward_at = next(n for n, line in enumerate(lines) if "id: reward," in line)
    learned_lines, lines[learned_at : learned_at + 5] = lines[learned_at : learned_at + 5], []
    rewarded.write_text("".join([*lines[:reward_at], *learned_lines, *lines[reward_at:]]))
    order = list(load_recipe(rewarded).stages)
    assert order.index("reward") < order.index("learned"), "it runs after the model that scores its responses"


def test_what_a_reward_is_made_of_is_part_of_the_fingerprint(rewarded):
    def parts(sources: str) -> dict[str, object]:
        loaded = load_recipe(rewarded, [f"stages.learned.rewards=[{sources}]"])
        others = [name for name in loaded.stages if name != "learned"]
        for name in others:
            toy_stages.make_model(rewarded.parent / name / "model", name)
        finished = {name: Finished(rewarded.parent / name, Outputs(f"digest of {name}", {})) for name in others}
        return Planner(loaded, rewarded.parent / "run").fingerprints.parts(loaded.stages["learned"], finished)

    of_a_judge = {"principles", "weight.kind", "principle.kind.critique", "template.rate.default"}
    by_model = parts("{model: reward}")
    assert by_model["model.reward"] == "digest of reward"
    assert not of_a_judge & by_model.keys()
    assert of_a_judge <= parts("{judge: model}").keys()
    before = parts("{function: 'mine.py:short'}")
    with (rewarded.parent / "mine.py").open("a") as file:
        file.write("# a comment\n")
    after = parts("{function: 'mine.py:short'}")
    assert {name for name in before if before[name] != after[name]} == {"file.mine.py:short"}
    assert not of_a_judge & before.keys()


def test_names_that_something_answers_to_are_accepted(tagged):
    names = ["stages.revisions.only=[red_team]", "stages.revisions.principles=[kind]", "templates=micro"]
    load_recipe(tagged, [*names, "stages.comparison.principles=[honest]", "judge=sl-cai"])
    load_recipe("quickstart", ["stages.revisions.only=[red_team, factual]"])


def test_among_compared_models_model_means_the_recipes_own(tagged):
    toy_stages.make_model(tagged.parent / "other", "weights")
    models = load_recipe(tagged, ["stages.comparison.models.base=model", "model=other"]).stages["comparison"].models
    assert models == {"base": "other", "policy": "policy"}
    tagged.write_text(tagged.read_text().replace("id: votes,", "id: model,"))
    with pytest.raises(BadInput, match="'model' is the name of a model too"):
        load_recipe(tagged)


def test_a_judge_as_a_reward_that_every_process_would_start_vllm_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("accelerate/8gpu-zero3.yaml", "8gpu-vllm-tp.yaml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        text = (shipped_folder("configs") / file).read_text()
        (tmp_path / file).write_text(text.replace("parallel: 8", "parallel: 1"))
    message = refusal("--on", "8gpu-vllm-tp.yaml", "--dry-run", recipe="rlaif-direct")
    assert "stage 'policy': each of the 8 processes of profile '8gpu-vllm-tp' would start vLLM for" in message
    served = "--set stages.policy.rewards.0.judge=served:judge --on 8gpu-vllm-tp.yaml --dry-run"
    assert CliRunner().invoke(main, ["run", "rlaif-direct", *served.split()]).exit_code == 0


def test_tags_that_meet_nothing_are_told_before_a_run(tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Why?", "tag": ["private"]}\n{"prompt": "How?", "tag": []}\n')
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nprinciples:\n  - {id: private, text: Be discreet., applies_to: [privat]}\n"
    )
    path = tmp_path / "recipe.yaml"
    text = "name: r\nmodel: micro\nconstitution: mine.yaml\nprompts: {asked: {source: asked.jsonl%s}}\nstages:\n"
    stage = "  - {id: s, kind: sample, prompts: asked}\n"
    path.write_text(text % "" + stage)
    result = CliRunner().invoke(main, ["recipe", "check", str(path)])
    assert result.exit_code == 0
    applies = f"{tmp_path}/mine.yaml:3:10: 'private' applies to no prompt of this recipe: none has the tag privat"
    assert result.stdout.splitlines()[1:] == [
        applies,
        "prompts asked: found no column 'tags', and 'tag' is not read; say `columns: {tags: tag}` if it holds tags",
    ]
    path.write_text(text % ", columns: {tags: tag}" + stage)
    assert CliRunner().invoke(main, ["recipe", "check", str(path)]).stdout.splitlines()[1:] == [
        f"{applies}; did you mean 'private'?"
    ]
