"""A finished stage is reused only while its outputs are what they were when it was done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy_stages

from cai.contracts.profile import Profile
from cai.run import plan
from cai.run.pipeline import run_recipe
from cai.run.plan import Options, plan_recipe
from cai.run.recipe import load_recipe
from cai.storage import run_folder
from cai.text.progress import PlainDisplay

CPU = Profile(device="cpu")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of toy stages that has run."""
    toy_stages.install(monkeypatch)
    path = toy_stages.make_recipe(tmp_path)
    run(path)
    return path


def run(recipe: Path) -> dict[str, Any]:
    return run_recipe(load_recipe(recipe), CPU, recipe.parent / "runs", Options(), PlainDisplay())


def planned(recipe: Path) -> dict[str, tuple[str, str]]:
    steps = plan_recipe(load_recipe(recipe), CPU, recipe.parent / "runs", Options())
    return {step.id: (step.status, step.reason) for step in steps}


def folder_of(recipe: Path, stage: str) -> Path:
    return run_folder.latest(recipe.parent / "runs")[stage]


def cut(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))


def edit_without_changing_the_size(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"!" + content[-1:])


@pytest.mark.parametrize(
    ("stage", "name", "damage", "reason"),
    [
        ("texts", "records.jsonl", cut, "records.jsonl was changed"),
        ("more", "records.jsonl", edit_without_changing_the_size, "records.jsonl was changed"),
        ("labels", "failures.jsonl", Path.unlink, "failures.jsonl is missing"),
        ("tuned", "model/model.safetensors", edit_without_changing_the_size, "model/model.safetensors was changed"),
        ("policy", "model/config.json", Path.unlink, "model/config.json is missing"),
    ],
)
def test_an_output_that_was_cut_edited_or_removed_is_noticed_by_name_and_made_again(
    recipe: Path, capsys: pytest.CaptureFixture[str], stage: str, name: str, damage: Callable[[Path], None], reason: str
) -> None:
    path = folder_of(recipe, stage) / name
    before = path.read_bytes()
    damage(path)
    assert planned(recipe)[stage] == ("runs", reason)
    run(recipe)
    assert f"{stage} runs again: {reason}" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert {status for status, _ in planned(recipe).values()} == {"reused"}


def test_a_run_that_was_copied_is_reused_though_its_files_are_younger(recipe: Path) -> None:
    runs = recipe.parent / "runs"
    shutil.copytree(runs, recipe.parent / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(runs)
    shutil.move(recipe.parent / "copy", runs)
    assert {status for status, _ in planned(recipe).values()} == {"reused"}


def test_a_file_whose_size_and_time_are_the_same_is_not_read_again(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cai.run.outputs.cached_file_digest", None)
    assert {status for status, _ in planned(recipe).values()} == {"reused"}
    records = folder_of(recipe, "texts") / "records.jsonl"
    os.utime(records, ns=(0, 0))
    with pytest.raises(TypeError):
        planned(recipe)


def test_reuse_of_what_other_library_versions_made_is_said_in_a_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage_file = folder_of(recipe, "texts") / "stage.json"
    versions = json.loads(stage_file.read_text())["versions"]
    monkeypatch.setattr(plan, "library_versions", lambda: versions | {"torch": "99.0"})
    words = f"made with torch {versions['torch']}, here 99.0"
    assert planned(recipe)["texts"] == ("reused", words)
    run(recipe)
    assert f"texts, tuned, more, labels, policy: {words}\n" in capsys.readouterr().err
