"""Names in a recipe that nothing answers to are refused, with a position, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy
from click.testing import CliRunner
from test_recipe import GOOD

from cai.cli import main
from cai.errors import BadInput
from cai.recipe import load_recipe

NAMES = [
    ("seed: 0", "judge: sl_cai", "recipe.yaml:2:8: ", "did you mean 'sl-cai'?"),
    ("seed: 0", "judge: votes", "recipe.yaml:2:8: ", "expected a stage that trains a model"),
    ("seed: 0", "templates: defalt", "recipe.yaml:2:12: ", "did you mean 'default'?"),
    ("prompts: heldout}", "prompts: heldout, principles: [knd]}", "recipe.yaml:20:", "did you mean 'kind'?"),
    ("from: responses}", "from: responses, principles: [hnest]}", "recipe.yaml:10:", "did you mean 'honest'?"),
    ("from: responses}", "from: responses, only: [rd_team]}", "recipe.yaml:10:", "did you mean 'red_team'?"),
]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    good = GOOD.replace("name: small", "name: small\nseed: 0").replace("first.jsonl", "first.jsonl, tags: [red_team]")
    return toy.make_recipe(tmp_path, good)


@pytest.mark.parametrize(("old", "new", "where", "words"), NAMES, ids=[each[1] for each in NAMES])
def test_a_name_that_nothing_answers_to_is_refused(recipe, old, new, where, words):
    text = recipe.read_text()
    assert text.count(old) == 1
    recipe.write_text(text.replace(old, new))
    result = CliRunner().invoke(main, ["run", "recipe.yaml", "--dry-run"])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(where)
    assert words in result.stderr


def test_names_that_are_there_are_taken(recipe):
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
    toy.make_model(recipe.parent / "other", "weights")
    models = load_recipe(recipe, ["stages.comparison.models.base=model", "model=other"]).stages["comparison"].models
    assert models == {"base": "other", "policy": "policy"}
    recipe.write_text(recipe.read_text().replace("id: votes,", "id: model,"))
    with pytest.raises(BadInput, match="'model' is the name of a model too"):
        load_recipe(recipe)


def test_a_dry_run_refuses_a_batch_that_processes_cannot_share(recipe):
    odd = ["--set", "stages.sl-cai.batch_size=31", "--on", "cpu-2-ranks", "--dry-run"]
    result = CliRunner().invoke(main, ["run", "recipe.yaml", *odd])
    assert result.exit_code == 2
    assert "batch_size 31 cannot be split over the 2 processes" in result.stderr
