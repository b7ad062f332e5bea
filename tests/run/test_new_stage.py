"""A stage that the package does not know needs a file and a line in the table, whatever it calls its keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import toy_stages
from pydantic import BaseModel, ConfigDict, Field
from recipe_runs import plan, run

from cai.contracts.context import Context
from cai.contracts.references import (
    FileRef,
    JudgeRef,
    ModelRef,
    OneOrMore,
    OutputKind,
    PrincipleRef,
    PromptSetRef,
    TagRef,
    TextsRef,
    nested_models,
)
from cai.contracts.stage_config import FeedbackConfig, PrincipleField
from cai.run.recipe import load_recipe
from cai.run.recipe_names import needs
from cai.storage.journal import Result
from cai.text.errors import BadInput

RECIPE = """name: graded
model: start
constitution: constitution.yaml
prompts:
  first: {source: first.jsonl, tags: [school]}
stages:
  - {id: texts, kind: write, prompts: [first]}
  - {id: tuned, kind: fit, from: texts}
  - id: grades
    kind: grade
    essays: texts
    teacher: tuned
    graders: {strict: other, kind: model}
    rubric: rubric.md
    exams: first
    criteria:
      - {principle: kind, among: [school]}
"""


class Criterion(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    principle: PrincipleRef
    among: OneOrMore[TagRef] = Field(default_factory=list)


class GradeConfig(FeedbackConfig):
    gives: ClassVar[OutputKind] = "texts"

    kind: Literal["grade"] = "grade"
    essays: OneOrMore[TextsRef]
    teacher: ModelRef
    graders: dict[str, ModelRef] = Field(default_factory=dict)
    examiner: JudgeRef | None = None
    rubric: FileRef
    exams: OneOrMore[PromptSetRef]
    criteria: list[Criterion] = Field(default_factory=list)

    def principle_fields(self) -> tuple[PrincipleField, ...]:
        return ("compare",)


def run_grade(config: GradeConfig, context: Context) -> dict[str, Any]:
    essays = context.rows(config.essays)
    rubric = (context.home / config.rubric).read_text()
    teacher, examiner = context.model(config.teacher).name, context.model(config.examiner).name
    for portion in context.journal.portions([{"id": row["id"]} for row in essays], size=config.journal_batch):
        rows = [{"id": item["id"], "by": teacher, "checked_by": examiner, "rubric": rubric} for item in portion.items]
        context.journal.append(portion, [Result(row) for row in rows])
    context.journal.finish()
    return {"grades": {context.stage_id: {"essays": len(essays), "prompts": len(context.prompts(config.exams))}}}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    toy_stages.install(monkeypatch)
    toy_stages.add_stage("grade", GradeConfig, run_grade, monkeypatch)
    toy_stages.make_model(tmp_path / "other", "other weights")
    (tmp_path / "rubric.md").write_text("Be brief.")
    return toy_stages.make_recipe(tmp_path, RECIPE)


def test_its_names_are_resolved_and_what_it_needs_is_known(recipe: Path) -> None:
    stages = load_recipe(recipe).stages
    grades = stages["grades"]
    assert isinstance(grades, GradeConfig)
    assert grades.examiner == "start", "`self` is whoever wrote the essays"
    assert grades.graders == {"strict": "other", "kind": "start"}
    assert needs(grades, stages) == ["texts", "tuned"]


def test_it_runs_on_what_its_names_mean(recipe: Path) -> None:
    summary = run(recipe)
    assert summary["grades"]["grades"] == {"essays": 4, "prompts": 4}
    [records] = (recipe.parent / "runs").glob("grades-*/records.jsonl")
    row = json.loads(records.read_text().splitlines()[0])
    assert (row["by"], row["checked_by"], row["rubric"]) == ("tuned", "start", "Be brief.")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("rubric.md", "Be brief.", "Be long."), "file rubric.md changed"),
        (("other/model.safetensors", "other weights", "fresh weights"), "model other changed"),
        (("constitution.yaml", "kind., weight", "kind., compare: Which is kinder?, weight"), "principle kind changed"),
        (("recipe.yaml", "strict: other", "strict: start"), "strict other -> start; model other changed"),
    ],
    ids=["file", "model", "principle", "name"],
)
def test_it_is_reused_until_something_that_it_names_changes(
    recipe: Path, change: tuple[str, str, str], reason: str
) -> None:
    run(recipe)
    assert plan(recipe)["grades"] == ("reused", "")
    name, old, new = change
    path = recipe.parent / name
    path.write_text(path.read_text().replace(old, new))
    status, words = plan(recipe)["grades"]
    assert (status, words.replace("graders.", "")) == ("runs", reason)


@pytest.mark.parametrize(
    ("old", "new", "place", "words"),
    [
        ("essays: texts", "essays: textes", "11:13: stages[2].essays:", "did you mean 'texts'"),
        ("essays: texts", "essays: [tuned]", "11:14: stages[2].essays[0]:", "gives policy, but grade takes texts"),
        ("teacher: tuned", "teacher: tuend", "12:14: stages[2].teacher:", "did you mean 'tuned'"),
        ("strict: other", "strict: texts", "13:23: stages[2].graders.strict:", "a stage that trains a model: tuned"),
        ("rubric: rubric.md", "rubric: rubrik.md", "14:13: stages[2].rubric:", "did you mean 'rubric.md'"),
        ("exams: first", "exams: frist", "15:12: stages[2].exams:", "did you mean 'first'"),
        ("principle: kind", "principle: knd", "17:21: stages[2].criteria[0].principle:", "did you mean 'kind'"),
        ("among: [school]", "among: [scool]", "17:35: stages[2].criteria[0].among[0]:", "did you mean 'school'"),
    ],
)  # fmt: skip
def test_a_wrong_name_is_refused_where_it_stands(recipe: Path, old: str, new: str, place: str, words: str) -> None:
    recipe.write_text(recipe.read_text().replace(old, new))
    with pytest.raises(BadInput) as refusal:
        load_recipe(recipe)
    assert str(refusal.value).startswith(f"{recipe}:{place} "), refusal.value
    assert words in str(refusal.value)


class Exam(BaseModel):
    first: Criterion
    others: list[Criterion]
    by_name: dict[str, Criterion]


def test_the_models_in_a_field_a_list_and_a_mapping_are_found_where_they_stand() -> None:
    first, second, third = (Criterion(principle=name) for name in ("kind", "honest", "brief"))
    exam = Exam(first=first, others=[second], by_name={"last": third})
    expected = [(("first",), first), (("others", 0), second), (("by_name", "last"), third)]
    assert list(nested_models(exam, Criterion)) == expected
