"""The real stages on the embedded model, small: killed in every one of them, and with a weight changed afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cai.contracts.profile import load_profile
from cai.document.shipped import shipped_folder
from cai.models.reference import MICRO
from cai.run.pipeline import run_recipe
from cai.run.plan import Options, plan_recipe
from cai.run.recipe import load_recipe
from cai.storage import run_folder
from cai.text.progress import PlainDisplay

RECIPE = """
name: small
model: start
constitution: micro.yaml
prompts:
  red_team: {source: micro, split: train, tags: [red_team], limit: 6}
  heldout: {source: micro, split: test, limit: 2, hold_out: true}
stages:
  - {id: responses, kind: sample, prompts: [red_team], max_new_tokens: 32, journal_batch: 4}
  - {id: revisions, kind: revise, from: responses, max_new_tokens: 32, journal_batch: 4}
  - {id: sl-cai, kind: sft, from: [revisions, responses], batch_size: 4, train: {learning_rate: 1.0e-3, max_steps: 2}}
  - {id: candidates, kind: sample, model: sl-cai, prompts: [red_team, heldout], n: 2, max_new_tokens: 16,
     journal_batch: 8}
  - {id: votes, kind: judge, from: candidates, journal_batch: 4, cut_off: keep}
  - {id: preferences, kind: prefer, from: votes}
  - {id: reward, kind: reward, model: sl-cai, from: preferences, batch_size: 4, train: {max_steps: 1}}
  - {id: policy, kind: dpo, model: sl-cai, from: preferences, batch_size: 4, train: {max_steps: 1}}
  - {id: comparison, kind: compare, models: {base: start, policy: policy}, prompts: heldout, max_new_tokens: 16,
     journal_batch: 4}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the recipe and two runs of it: undisturbed, and killed once in every stage."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copy(shipped_folder("constitutions") / "micro.yaml", folder)
    shutil.copytree(MICRO, folder / "start")
    (folder / "recipe.yaml").write_text(RECIPE)
    script = Path(__file__).parents[1] / "support" / "run_killed.py"
    command = [sys.executable, str(script), "recipe.yaml", "undisturbed", "killed"]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.run(command, cwd=folder, text=True, capture_output=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    (folder / "digests.json").write_text(process.stdout.splitlines()[-1])
    return folder


def test_killed_in_every_stage_it_leaves_the_same_bytes_as_undisturbed(folder):
    killed = run_folder.latest(folder / "killed")
    for stage, path in run_folder.latest(folder / "undisturbed").items():
        assert path.name == killed[stage].name
        if (path / "records.jsonl").exists():
            assert (path / "records.jsonl").read_bytes() == (killed[stage] / "records.jsonl").read_bytes(), stage


def test_killed_in_every_stage_it_leaves_the_same_weights_as_undisturbed(folder):
    digests = json.loads((folder / "digests.json").read_text())
    assert digests["killed"] == digests["undisturbed"]
    assert set(digests["killed"]) == set(load_recipe(folder / "recipe.yaml").stages)


def test_a_changed_weight_redoes_the_preferences_without_an_engine(folder, monkeypatch):
    document = folder / "micro.yaml"
    before = document.read_text()
    document.write_text(before.replace("weight: 3.0", "weight: 0.5", 1))
    assert document.read_text() != before
    recipe = load_recipe(folder / "recipe.yaml")
    opened: list[object] = []
    monkeypatch.setattr("cai.engines.open_engine", lambda *arguments: opened.append(arguments))
    run = folder / "undisturbed"
    steps = {step.id: step for step in plan_recipe(recipe, load_profile(), run, Options())}
    reused = [stage for stage, step in steps.items() if step.status == "reused"]
    assert reused == ["responses", "revisions", "sl-cai", "candidates", "votes", "comparison.base"]
    assert steps["preferences"].reason == "weight of harmless changed"
    run_recipe(recipe, load_profile(), run, Options(until="preferences"), PlainDisplay())
    assert not opened
    document.write_text(before)


def test_the_summary_has_what_was_measured(folder):
    summary = json.loads((folder / "killed" / "summary.json").read_text())
    assert set(summary["seconds"]) == set(summary["stages"]) == set(load_recipe(folder / "recipe.yaml").stages)
    for checkpoint in ("base", "policy"):
        rate = summary["checkpoints"][checkpoint]["well_formed"]
        assert set(rate) >= {"value", "n", "topics", "interval"}
    assert "accuracy" in summary["reward"]
