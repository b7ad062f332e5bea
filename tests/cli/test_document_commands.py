"""`cai recipe` and `cai profile`: what is checked, and the schemas that editors check the same documents with."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from cai.cli import main
from cai.contracts.profile import profile_schema
from cai.document.shipped import shipped_folder
from cai.run.recipe_schema import recipe_schema
from cai.stages import STAGES

SCHEMAS = {"recipes": recipe_schema, "configs": profile_schema}


@pytest.mark.parametrize("folder", SCHEMAS)
def test_the_schema_that_ships_is_that_of_the_code_and_accepts_what_ships(folder: str) -> None:
    schema = json.loads((shipped_folder(folder) / "schema.json").read_text(encoding="utf-8"))
    command = {"recipes": "recipe", "configs": "profile"}[folder]
    assert schema == SCHEMAS[folder](), f"cai {command} schema --write {folder}/schema.json"
    validator = jsonschema.Draft202012Validator(schema)
    paths = sorted(shipped_folder(folder).glob("*.yaml"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# yaml-language-server: $schema=schema.json\n"), path
        validator.validate(yaml.safe_load(text))


def test_the_schema_of_a_recipe_refuses_what_the_loader_refuses() -> None:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    stage = {"id": "s", "kind": "sample", "prompts": "p"}
    recipe = {"name": "n", "model": "micro", "stages": [stage]}
    assert validator.is_valid(recipe)
    for key, value in (("kind", "smaple"), ("n", 0), ("nn", 2), ("prompts", 3), ("temperature", "hot")):
        assert not validator.is_valid({**recipe, "stages": [{**stage, key: value}]}), key
    assert not validator.is_valid({**recipe, "modle": "micro"})
    kinds = recipe_schema()["properties"]["stages"]["items"]["properties"]["kind"]["enum"]
    assert kinds == list(STAGES)


def test_every_wrong_recipe_is_named(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("name: wrong\nmodel: micro\nstages:\n  - {id: s, kind: sample, prompts: none}\n")
    result = CliRunner().invoke(
        main, ["recipe", "check", str(wrong), "quickstart", "cai-dpo", str(tmp_path / "no.yaml")]
    )
    assert result.exit_code == 2
    assert [line.split(": ")[1] for line in result.stdout.splitlines()] == ["14 stages", "13 stages"]
    assert f"{wrong}:4:36: " in result.stderr
    assert f"{tmp_path / 'no.yaml'}: no such file" in result.stderr
    result = CliRunner().invoke(
        main, ["recipe", "check", "quickstart", "--set", "stages.policy.train.betta=1", "--json"]
    )
    assert result.exit_code == 2
    facts = json.loads(result.stdout)
    assert facts["documents"] == []
    assert "did you mean 'beta'" in facts["errors"][0]["message"]


def test_profiles_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("device: cpu\nprocesses: 2\n")
    result = CliRunner().invoke(main, ["profile", "check", str(path), "cpu"])
    assert result.exit_code == 2
    assert result.stdout == "cpu: device cpu, processes 1\n"
    assert f"{path}:2:12: processes: found 2, expected 1" in result.stderr
