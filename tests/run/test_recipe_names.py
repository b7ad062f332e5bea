"""Names in a recipe that nothing answers to are refused, with a position, before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import pytest
import toy_stages
from click.testing import CliRunner
from test_recipe import GOOD

from cai.cli import main
from cai.contracts.training_config import ReinforcementConfig
from cai.document.shipped import shipped_folder
from cai.run.plan import Planner
from cai.run.recipe import load_recipe
from cai.run.recipe_names import needs
from cai.storage.run_folder import Finished, Outputs
from cai.text.errors import BadInput

# What is replaced in the recipe by what, the beginning of the message, and words of it.
NAMES = [
    ("seed: 0", "judge: sl_cai", "recipe.yaml:2:8: ", "did you mean 'sl-cai'?"),
    ("seed: 0", "judge: votes", "recipe.yaml:2:8: ", "expected a stage that trains a model"),
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
def rewarded(recipe, monkeypatch) -> Path:
    """A recipe whose last stage but one learns from rewards."""

    class LearnConfig(ReinforcementConfig):
        kind: Literal["learn"] = "learn"

    toy_stages.add_stage("learn", LearnConfig, monkeypatch=monkeypatch)
    classifier = toy_stages.make_model(recipe.parent / "classifier", "weights")
    (classifier / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    (recipe.parent / "mine.py").write_text("def short(prompts, responses):\n    return [-len(r) for r in responses]\n")
    (recipe.parent / "odd.py").write_text("def short(:\n")
    text = recipe.read_text().replace(
        "  - {id: comparison",
        "  - id: learned\n    kind: learn\n    model: sl-cai\n    prompts: red_team\n"
        "    rewards: [{model: reward}]\n  - {id: comparison",
    )
    recipe.write_text(text)
    return recipe


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    good = GOOD.replace("name: small", "name: small\nseed: 0").replace("first.jsonl", "first.jsonl, tags: [red_team]")
    return toy_stages.make_recipe(tmp_path, good)


def refusal(*arguments: str, recipe: str = "recipe.yaml") -> str:
    """What `cai run --dry-run` prints when it refuses the recipe."""
    result = CliRunner().invoke(main, ["run", recipe, *arguments, "--dry-run"])
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.mark.parametrize(("old", "new", "where", "words"), NAMES, ids=[new for _, new, *_ in NAMES])
def test_a_name_that_nothing_answers_to_is_refused(recipe, old, new, where, words):
    text = recipe.read_text()
    assert text.count(old) == 1
    recipe.write_text(text.replace(old, new))
    message = refusal()
    assert message.startswith(where)
    assert words in message


@pytest.mark.parametrize(("sources", "target", "words"), REWARDS, ids=[sources for sources, *_ in REWARDS])
def test_a_source_of_reward_that_cannot_be_one_is_refused_where_it_stands(rewarded, sources, target, words):
    text = rewarded.read_text().replace("[{model: reward}]", f"[{sources}]")
    rewarded.write_text(text)
    message = refusal()
    position = re.match(r"recipe\.yaml:(\d+):(\d+): ", message)
    assert position, message
    line = text.splitlines()[int(position[1]) - 1]
    assert "rewards:" in line
    assert line[int(position[2]) - 1 :].startswith(target)
    assert words in message


def test_a_judge_among_rewards_needs_a_constitution(rewarded):
    text = rewarded.read_text().replace("constitution: constitution.yaml\n", "")
    stages = ("revisions", "votes", "comparison")
    lines = text.splitlines(keepends=True)
    text = "".join(line for line in lines if not any(f"id: {stage}," in line for stage in stages))
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


def test_names_that_something_answers_to_are_accepted(recipe):
    load_recipe(
        recipe,
        [
            "stages.revisions.only=[red_team]",
            "stages.revisions.principles=[kind]",
            "stages.comparison.principles=[honest]",
            "templates=micro",
            "judge=sl-cai",
        ],
    )
    load_recipe("quickstart", ["stages.revisions.only=[red_team, factual]"])


def test_among_compared_models_model_means_the_recipes_own(recipe):
    toy_stages.make_model(recipe.parent / "other", "weights")
    models = load_recipe(recipe, ["stages.comparison.models.base=model", "model=other"]).stages["comparison"].models
    assert models == {"base": "other", "policy": "policy"}
    recipe.write_text(recipe.read_text().replace("id: votes,", "id: model,"))
    with pytest.raises(BadInput, match="'model' is the name of a model too"):
        load_recipe(recipe)


def test_a_dry_run_refuses_a_batch_that_processes_cannot_share(recipe):
    message = refusal("--set", "stages.sl-cai.batch_size=31", "--on", "cpu-2-ranks")
    assert "batch_size 31 cannot be split over the 2 processes" in message


def test_a_judge_as_a_reward_that_every_process_would_start_vllm_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("accelerate/8gpu-zero3.yaml", "8gpu-vllm-tp.yaml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        text = (shipped_folder("configs") / file).read_text()
        (tmp_path / file).write_text(text.replace("parallel: 8", "parallel: 1"))
    message = refusal("--on", "8gpu-vllm-tp.yaml", recipe="rlaif-direct")
    assert "stage 'policy': each of the 8 processes of profile '8gpu-vllm-tp' would start vLLM for" in message
    served = "--set stages.policy.rewards.0.judge=served:judge --on 8gpu-vllm-tp.yaml --dry-run"
    assert CliRunner().invoke(main, ["run", "rlaif-direct", *served.split()]).exit_code == 0
