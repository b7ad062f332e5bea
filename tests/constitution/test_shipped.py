"""The constitutions that ship, and the schema that editors check them with."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
import yaml

import cai.constitution
from cai.constitution import Constitution, json_schema, load_constitution
from cai.document.shipped import shipped_folder

FILES = sorted(shipped_folder("constitutions").glob("*.yaml"))
SCHEMA = Path(cai.constitution.__file__).with_name("schema.json")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def constitution(request: pytest.FixtureRequest) -> Constitution:
    return load_constitution(request.param)


def test_the_schema_on_disk_is_the_one_that_the_models_give() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json_schema(), "cai constitution schema --write FILE"


def test_every_document_opens_with_its_schema_and_how_to_use_it(constitution: Constitution) -> None:
    first, *head = constitution.path.read_text(encoding="utf-8").splitlines()[:12]
    assert first == "# yaml-language-server: $schema=../cai/constitution/schema.json"
    assert any("cai constitution " in line and f"constitutions/{constitution.path.name}" in line for line in head)


def test_every_document_has_a_description_and_distinct_principles_with_examples(constitution: Constitution) -> None:
    assert constitution.name == constitution.path.stem
    assert constitution.description
    principles = constitution.principles
    assert len({principle.id for principle in principles}) == len(principles)
    for field in ("text", "critique", "revise", "compare"):
        assert max(Counter(getattr(principle, field) for principle in principles).values()) == 1, field
    for principle in principles:
        assert len({principle.text, principle.critique, principle.revise, principle.compare}) == 4
        assert "which" in principle.compare.lower(), principle.id
        assert len(principle.examples) >= 2, principle.id
        assert all(example.better != example.worse for example in principle.examples)


def test_no_example_stands_twice(constitution: Constitution) -> None:
    prompts = Counter(example.prompt for principle in constitution.principles for example in principle.examples)
    assert max(prompts.values()) == 1


def test_harmlessness_writes_every_principle_field_itself_and_balances_caution_and_use() -> None:
    path = shipped_folder("constitutions") / "harmlessness.yaml"
    principles = yaml.safe_load(path.read_text(encoding="utf-8"))["principles"]
    assert len(principles) >= 16
    assert all({"critique", "revise", "compare", "tags"} <= set(principle) for principle in principles)
    assert sum("over-refusal" in principle["tags"] for principle in principles) >= 4


def test_the_schema_accepts_what_ships_and_refuses_what_the_loader_refuses() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    for path in FILES:
        validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    principle = {"id": "a", "text": "T."}
    validator.validate({"name": "x", "principles": [principle, {"id": "b", "drop": True}]})
    for wrong in (
        {"principles": [principle]},
        {"name": "No Slug"},
        {"name": "x", "extends": []},
        {"name": "x", "extends": "base.txt"},
        {"name": "x", "principels": []},
        {"name": "x", "principles": [{"id": "a"}]},
        {"name": "x", "principles": [{"id": "a", "drop": True, "text": "T."}]},
        {"name": "x", "principles": [{**principle, "weight": -1}]},
        {"name": "x", "principles": [{**principle, "text": " "}]},
        {"name": "x", "principles": [{**principle, "tags": ["two words"]}]},
        {"name": "x", "principles": [{**principle, "examples": [{"prompt": "P", "better": "B"}]}]},
        {"name": "x", "principles": [{**principle, "examples": [{"prompt": [], "better": "B", "worse": "W"}]}]},
    ):
        assert not validator.is_valid(wrong), wrong
