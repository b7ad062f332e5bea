"""The constitutions that ship, the schema that editors check them with, and weaknesses, of which they have none."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from cai.cli import main
from cai.constitution import Constitution, json_schema, load_constitution
from cai.constitution.weaknesses import weaknesses
from cai.document.shipped import shipped_folder

FILES = sorted(shipped_folder("constitutions").glob("*.yaml"))
SCHEMA = shipped_folder("constitutions") / "schema.json"
SOUND = """
name: sound
principles:
  - id: calm
    text: The assistant stays calm when it is insulted.
    examples: [{prompt: You fool., better: What went wrong?, worse: You too.}]
  - id: short
    text: The assistant is brief.
    compare: Which response is shorter without leaving anything out?
    examples: [{prompt: Say it., better: It., worse: I would like to say it.}]
"""
"""A document without weaknesses."""


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def constitution(request: pytest.FixtureRequest) -> Constitution:
    return load_constitution(request.param)


def test_the_schema_on_disk_is_the_one_that_the_models_give() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json_schema(), "cai constitution schema --write FILE"


def test_every_document_opens_with_its_schema_and_how_to_use_it(constitution: Constitution) -> None:
    first, *head = constitution.path.read_text(encoding="utf-8").splitlines()[:12]
    assert first == "# yaml-language-server: $schema=schema.json"
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


def weaknesses_of(folder: Path, text: str) -> list[str]:
    path = folder / "document.yaml"
    path.write_text(text)
    return list(weaknesses(load_constitution(path)))


def test_a_sound_document_has_none(tmp_path: Path) -> None:
    assert weaknesses_of(tmp_path, SOUND) == []


def test_shipped_documents_have_none(constitution: Constitution) -> None:
    assert not list(weaknesses(constitution))


def test_a_principle_without_examples_is_named_with_its_place(tmp_path: Path) -> None:
    weak = weaknesses_of(tmp_path, SOUND + "  - {id: bare, text: The assistant tells the truth.}\n")
    assert len(weak) == 1
    assert "document.yaml:11:10: 'bare': has no example" in weak[0]


@pytest.mark.parametrize(
    "compare",
    ["Which response is better?", "Choose the better of these two replies.", "Please pick one: A or an answer"],
)
def test_a_question_without_a_criterion_is_named(tmp_path: Path, compare: str) -> None:
    text = SOUND.replace("Which response is shorter without leaving anything out?", f"'{compare}'")
    weak = weaknesses_of(tmp_path, text)
    assert len(weak) == 1
    assert "'short': `compare` names no criterion" in weak[0]


def test_an_example_that_shows_nothing_is_named(tmp_path: Path) -> None:
    weak = weaknesses_of(tmp_path, SOUND.replace("worse: You too.", "worse: 'What  went wrong? '"))
    assert [line.partition(": ")[2] for line in weak] == ["'calm': in example 1 `better` and `worse` are the same text"]


def with_examples(*examples: str) -> str:
    return SOUND.replace("examples: [{prompt: Say it.", f"examples: [{', '.join(examples)}, {{prompt: Say it.")


@pytest.mark.parametrize(
    ("examples", "numbers"),
    [
        (["{prompt: P, better: A, worse: B}", "{prompt: P, better: B, worse: A}"], "1 and 2"),
        (["{prompt: P, better: A, worse: B}", "{prompt: ' P ', better: B, worse: C}",
          "{prompt: P, better: C, worse: A}"], "1 and 2 and 3"),
        (["{prompt: P, better: A, worse: B}", "{prompt: Q, better: B, worse: A}"], None),
        (["{prompt: P, better: A, worse: B}", "{prompt: P, better: B, worse: C}",
          "{prompt: P, better: A, worse: C}"], None),
    ],
)  # fmt: skip
def test_examples_that_contradict_each_other_are_named(
    tmp_path: Path, examples: list[str], numbers: str | None
) -> None:
    weak = weaknesses_of(tmp_path, with_examples(*examples))
    expected = f"'short': examples {numbers} contradict each other: they rank responses to one prompt in a circle"
    assert [line.partition(": ")[2] for line in weak] == ([] if numbers is None else [expected])


@pytest.mark.parametrize(
    ("compare", "is_weak"),
    [
        ("Is the response short?", True),
        ("Think of the reader. Doesn't it leave anything out?", True),
        ("Leaving taste aside, does the response waste words?", True),
        ("Is response A or response B shorter?", False),
        ("Is it short? Say which of the two is shorter.", False),
        ("Choose the shorter of the two.", False),
    ],
)
def test_a_question_that_is_answered_by_yes_or_no_is_named(tmp_path: Path, compare: str, is_weak: bool) -> None:
    text = SOUND.replace("Which response is shorter without leaving anything out?", f'"{compare}"')
    weak = weaknesses_of(tmp_path, text)
    assert ["'short': `compare` is answered by yes or no, expected a choice" in line for line in weak] == [
        True
    ] * is_weak


def test_tags_that_no_prompt_has_and_tags_that_differ_in_case_are_named(tmp_path: Path) -> None:
    tagged = (
        "  - id: short\n    tags: [Style, style]\n    applies_to: [RedTeam, helpful, topic:soup, held_out, desk, Desk]"
    )
    text = SOUND.replace("  - id: short", tagged)
    weak = [line.partition(": 'short': ")[2] for line in weaknesses_of(tmp_path, text)]
    assert weak == [
        "`tags` has 'style', which differs from 'Style' of 'short' in case alone",
        "`applies_to` has 'Desk', which differs from 'desk' of 'short' in case alone",
        "`applies_to` has 'RedTeam', a tag that no known prompt has; did you mean 'red_team'?",
        "`applies_to` has 'desk', a tag that no known prompt has; name your prompts' tags with --tags or --recipe",
        "`applies_to` has 'Desk', a tag that no known prompt has; name your prompts' tags with --tags or --recipe",
    ]
    assert not list(weaknesses(load_constitution("micro")))
    known = list(weaknesses(load_constitution(tmp_path / "document.yaml"), ["RedTeam", "desk", "Desk"]))
    assert len(known) == 2


def test_strict_takes_the_tags_of_prompts_from_an_option_or_a_recipe(tmp_path: Path) -> None:
    document, recipe, prompts = tmp_path / "x.yaml", tmp_path / "recipe.yaml", tmp_path / "prompts.jsonl"
    document.write_text(SOUND.replace("  - id: short", "  - id: short\n    applies_to: [desk, human]"))
    prompts.write_text('{"prompt": "Hi", "tags": ["desk"]}\n')
    recipe.write_text(
        "name: x\nmodel: nowhere/\nprompts: {mine: {source: prompts.jsonl}}\n"
        "stages: [{id: labels, kind: prefer, pairs: {source: pairs.jsonl, tags: [human]}}, {id: v, kind: judge}]\n"
    )

    def exit_code(*options: str) -> int:
        return CliRunner().invoke(main, ["constitution", "check", str(document), *options]).exit_code

    assert exit_code("--strict") == 1
    assert exit_code("--strict", "--tags", "desk") == 1
    assert exit_code("--strict", "--tags", "desk, human") == 0
    assert exit_code("--strict", "--recipe", str(recipe)) == 0
    assert exit_code("--tags", "desk") == 2
    assert exit_code("--strict", "--recipe", str(document)) == 2


def test_two_principles_that_read_the_same_are_named(tmp_path: Path) -> None:
    again = SOUND + SOUND.partition("principles:\n")[2].replace("id: calm", "id: calm2").replace("id: short", "id: s2")
    changed = "The assistant wastes no words.\n    compare: which"
    again = again.replace("The assistant is brief.\n    compare: Which", changed, 1)
    weak = weaknesses_of(tmp_path, again)
    assert len(weak) == 2
    assert "'calm2': `text` reads the same as that of 'calm'" in weak[0]
    assert "'s2': `compare` reads the same as that of 'short'" in weak[1]


def test_strict_checks_end_with_one_where_a_document_is_weak_and_two_where_one_is_wrong(tmp_path: Path) -> None:
    weak, wrong = tmp_path / "weak.yaml", tmp_path / "wrong.yaml"
    weak.write_text("name: weak\nprinciples: [{id: a, text: Be kind.}]")
    wrong.write_text("name: wrong\nprinciples: 3")
    assert CliRunner().invoke(main, ["constitution", "check", str(weak)]).exit_code == 0
    result = CliRunner().invoke(main, ["constitution", "check", "--strict", str(weak), "--json"])
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["weak"]) == 1
    assert CliRunner().invoke(main, ["constitution", "check", "--strict", str(weak), str(wrong)]).exit_code == 2
