"""Principles that a recipe names, by id and by tag: what is accepted, refused, and part of the fingerprint."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy_stages

from cai.run.plan import Planner
from cai.run.recipe import load_recipe
from cai.storage.run_folder import Finished, Outputs
from cai.text.errors import BadInput

RECIPE = """name: names
model: start
constitution: constitution.yaml
prompts: {first: {source: first.jsonl}}
stages:
  - {id: texts, kind: write, prompts: [first]}
  - {id: revisions, kind: revise, from: texts, principles: NAMES}
  - {id: votes, kind: judge, judge: start, from: texts, principles: NAMES}
  - {id: best, kind: best-of-n, from: texts, rewards: [{judge: model, principles: NAMES}]}
  - {id: compared, kind: compare, models: {base: start, same: start}, prompts: first, principles: NAMES}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    toy_stages.install(monkeypatch)
    return tmp_path


def make_recipe(folder: Path, names: str, tags: str = "[virtue, honest]") -> Path:
    """A recipe whose stages choose principles by these names; `tags` are those of the principle `kind`."""
    path = toy_stages.make_recipe(folder, RECIPE.replace("NAMES", names))
    tagged = toy_stages.CONSTITUTION.replace("kind., weight", f"kind., tags: {tags}, weight")
    (folder / "constitution.yaml").write_text(tagged)
    return path


def parts(folder: Path, stage: str, names: str, tags: str = "[virtue, honest]") -> dict[str, object]:
    """What the fingerprint of a stage is made of."""
    recipe = load_recipe(make_recipe(folder, names, tags))
    done = {stage: Finished(folder / stage, Outputs("digest", {})) for stage in ("texts", "compared.base")}
    done["compared.same"] = done["texts"]
    return Planner(recipe, folder / "runs").fingerprints.parts(recipe.stages[stage], done)


@pytest.mark.parametrize("stage", ["votes", "best", "compared.same.votes"])
def test_a_tag_is_part_of_the_fingerprint_and_ids_alone_are_as_before(folder: Path, stage: str) -> None:
    by_id = parts(folder, stage, "[honest]")
    assert not [name for name in by_id if name.endswith(".tags")], "an id wins over the tag `honest` of another"
    tagged = parts(folder, stage, "[honest, virtue]")
    assert tagged["principle.kind.tags"] == ["virtue"]
    untagged = parts(folder, stage, "[honest, virtue]", "[virtue, other]")
    assert untagged == tagged, "a tag that is not named is no part"


def test_the_fingerprint_of_a_revision_lists_tags_beside_ids_alone_too(folder: Path) -> None:
    assert parts(folder, "revisions", "[kind]")["principle.honest.tags"] == []


@pytest.mark.parametrize(("line", "kind"), [(7, "revise"), (8, "judge"), (9, "best-of-n"), (10, "compare")])
def test_a_name_that_is_neither_is_refused_where_it_stands(folder: Path, line: int, kind: str) -> None:
    path = make_recipe(folder, "[honest, virtue]")
    load_recipe(path)
    lines = path.read_text().splitlines()
    lines[line - 1] = lines[line - 1].replace("virtue", "virtu")
    assert kind in lines[line - 1]
    path.write_text("\n".join(lines))
    expected = rf"recipe.yaml:{line}:\d+: .*found 'virtu', expected ids or tags of .*'tiny'; did you mean 'virtue'\?"
    with pytest.raises(BadInput, match=expected):
        load_recipe(path)
