"""A comparison is made of stages: what is added to it costs its own responses, pairs and figures alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy_stages
from feedback_stages import Script
from recipe_runs import plan, reused, run

from cai.contracts.model import Model
from cai.contracts.profile import Profile

RECIPE = """name: compared
model: start
judge: start
constitution: constitution.yaml
prompts:
  held: {source: held.jsonl, hold_out: true}
stages:
  - {id: comparison, kind: compare, models: {base: start, tuned: tuned}, prompts: held}
"""
THIRD = "stages.comparison.models.third=third"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Script]:
    """What every model was asked, by its name, since it was last cleared."""
    scripts: dict[str, Script] = {}

    def open_engine(model: Model, profile: Profile) -> Script:
        def write(request: object) -> str:
            return f"{model.name} answers"

        return scripts.setdefault(model.name, Script(writes=write, prefers=lambda question: (1.0, 0.9)))

    monkeypatch.setattr("cai.engines.open_engine", open_engine)
    return scripts


@pytest.fixture
def recipe(tmp_path: Path, asked: dict[str, Script]) -> Path:
    """A comparison of two models that has run."""
    path = toy_stages.make_recipe(tmp_path, RECIPE)
    for name in ("tuned", "third", "judge"):
        toy_stages.make_model(tmp_path / name, name)
    run(path)
    assert requests(asked) == {"start": 2, "tuned": 2}
    asked.clear()
    return path


def requests(scripts: dict[str, Script]) -> dict[str, int]:
    """How many responses each model was asked for."""
    return {name: len(script.requests) for name, script in scripts.items() if script.requests}


def questions(scripts: dict[str, Script]) -> dict[str, int]:
    """How many questions each judge was asked."""
    return {name: len(script.questions) for name, script in scripts.items() if script.questions}


def not_reused(recipe: Path, *overrides: str) -> list[str]:
    return [part for part, (status, _) in plan(recipe, *overrides).items() if status != "reused"]


def test_a_third_checkpoint_costs_its_own_responses_and_pairs(recipe: Path, asked: dict[str, Script]) -> None:
    assert not_reused(recipe, THIRD) == ["comparison.third", "comparison.third.votes", "comparison"]
    run(recipe, THIRD)
    assert requests(asked) == {"third": 2}
    assert questions(asked) == {"start": 2 * 2 * 2 * 2}, "2 prompts x 2 earlier checkpoints x 2 principles x 2 orders"


def test_another_judge_samples_nothing(recipe: Path, asked: dict[str, Script]) -> None:
    run(recipe, "judge=judge")
    assert requests(asked) == {}
    assert questions(asked) == {"judge": 2 * 2 * 2}


@pytest.mark.parametrize("change", ["weight", "tie_below"])
def test_a_weight_or_the_width_of_a_tie_computes_the_figures_alone(
    recipe: Path, asked: dict[str, Script], change: str
) -> None:
    document = recipe.parent / "constitution.yaml"
    if change == "weight":
        document.write_text(document.read_text().replace("weight: 2.0", "weight: 0"))
    overrides = [] if change == "weight" else ["stages.comparison.tie_below=5"]
    assert not_reused(recipe, *overrides) == ["comparison"]
    run(recipe, *overrides)
    assert asked == {}


def test_from_and_until_take_the_name_that_the_recipe_gives_to_all_parts(
    recipe: Path, asked: dict[str, Script]
) -> None:
    assert reused(recipe, redo_from="comparison") == []
    run(recipe, redo_from="comparison.tuned")
    assert requests(asked) == {"tuned": 2}
    run(recipe, THIRD, until="comparison.third")
    assert requests(asked) == {"tuned": 2, "third": 2}
    assert (recipe.parent / "runs" / "latest.json").read_text().count("comparison.third") == 2
