"""Feedback stages leave the same bytes in one process and in several, where a process has as many CPU threads; training
leaves the same up to rounding, and the same bytes again in as many processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cai.contracts.profile import Profile
from cai.run.pipeline import run_recipe
from cai.run.plan import Options
from cai.run.recipe import load_recipe
from cai.storage import run_folder
from cai.text.progress import PlainDisplay
from cai.training.metrics import read_metrics

RECIPE = """
name: ranks
model: micro
constitution: micro
prompts:
  red_team: {source: micro, split: train, tags: [red_team], limit: 7}
stages:
  - {id: responses, kind: sample, prompts: [red_team], n: 2, max_new_tokens: 24, journal_batch: 3}
  - {id: votes, kind: judge, from: responses, cut_off: keep, journal_batch: 2}
  - {id: comparison, kind: compare, models: {base: model, other: OTHER}, prompts: red_team, max_new_tokens: 8,
     journal_batch: 2, pair_batch: 2}
  - {id: tuned, kind: sft, from: responses, batch_size: 4, train: {max_steps: 2}}
"""
FEEDBACK = ("responses", "votes", "comparison.base", "comparison.other", "comparison.other.votes")


def test_two_ranks_and_forks_leave_what_one_process_does(tmp_path, monkeypatch, tiny):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("OTHER", tiny("llama").path))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()

    def stage_folders(name: str, until: str | None = None, **processes: object) -> dict[str, Path]:
        profile = Profile(device="cpu", threads=1, **processes)
        run_recipe(recipe, profile, tmp_path / name, Options(until=until), PlainDisplay())
        return run_folder.latest(tmp_path / name)

    alone = stage_folders("alone")
    ranks = stage_folders("ranks", until="comparison", processes=2)
    forks = stage_folders("forks", processes=2, fork=True)
    forks_again = stage_folders("forks-again", processes=2, fork=True)
    torch.set_num_threads(threads)
    for shared in (ranks, forks):
        for stage in (*FEEDBACK, "comparison"):
            assert shared[stage].name == alone[stage].name
            assert run_folder.finished(shared[stage]).digest == run_folder.finished(alone[stage]).digest
        for stage in FEEDBACK:
            for file in ("records.jsonl", "failures.jsonl", "plan.json"):
                assert (shared[stage] / file).read_bytes() == (alone[stage] / file).read_bytes(), f"{stage}/{file}"
    n_rows = [len((alone[stage] / "records.jsonl").read_bytes().splitlines()) for stage in FEEDBACK]
    assert n_rows == [14, 7, 7, 7, 7]
    for file in ("model/model.safetensors", "metrics.jsonl"):
        assert (forks["tuned"] / file).read_bytes() == (forks_again["tuned"] / file).read_bytes()
    losses = [[entry["loss"] for entry in read_metrics(folders["tuned"])] for folders in (forks, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
