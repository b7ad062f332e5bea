"""Weaknesses of documents, of which the shipped ones have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cai.cli import main
from cai.constitution import load_constitution
from cai.constitution.weaknesses import weaknesses
from cai.document.shipped import shipped_folder, shipped_names

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


def weaknesses_of(folder: Path, text: str) -> list[str]:
    path = folder / "document.yaml"
    path.write_text(text)
    return list(weaknesses(load_constitution(path)))


def test_a_sound_document_has_none(tmp_path: Path) -> None:
    assert weaknesses_of(tmp_path, SOUND) == []


@pytest.mark.parametrize("name", shipped_names("constitutions"))
def test_shipped_documents_have_none(name: str) -> None:
    assert not list(weaknesses(load_constitution(shipped_folder("constitutions") / f"{name}.yaml")))


def test_a_principle_without_examples_is_named_with_its_place(tmp_path: Path) -> None:
    weak = weaknesses_of(tmp_path, SOUND + "  - {id: bare, text: The assistant tells the truth.}\n")
    assert len(weak) == 1
    assert "document.yaml:11:10: 'bare': has no example" in weak[0]


@pytest.mark.parametrize(
    "compare",
    ["Which response is better?", "Choose the better of these two replies.", "Please pick one: A or an answer"],
)
def test_a_question_without_a_criterion_is_named(tmp_path: Path, compare: str) -> None:
    weak = weaknesses_of(
        tmp_path, SOUND.replace("Which response is shorter without leaving anything out?", f"'{compare}'")
    )
    assert len(weak) == 1
    assert "'short': `compare` names no criterion" in weak[0]


def test_an_example_that_shows_nothing_is_named(tmp_path: Path) -> None:
    weak = weaknesses_of(tmp_path, SOUND.replace("worse: You too.", "worse: 'What  went wrong? '"))
    assert [line.partition(": ")[2] for line in weak] == ["'calm': in example 1 `better` and `worse` are the same text"]


def test_two_principles_that_read_the_same_are_named(tmp_path: Path) -> None:
    again = SOUND + SOUND.partition("principles:\n")[2].replace("id: calm", "id: calm2").replace("id: short", "id: s2")
    again = again.replace(
        "The assistant is brief.\n    compare: Which", "The assistant wastes no words.\n    compare: which", 1
    )
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
