"""Feedback in several processes leaves what one does, byte for byte, where each has as many CPU threads; training the
same up to rounding, and in as many processes the same bytes again."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import feedback_stages
import pytest
import torch

from cai.contracts.engine import Request
from cai.contracts.model import Model
from cai.contracts.profile import Profile
from cai.document.shipped import shipped
from cai.models.reference import MICRO
from cai.run.pipeline import Options, run_recipe
from cai.run.recipe import load_recipe
from cai.storage import run_folder
from cai.storage.journal import ShareDone
from cai.text.progress import PlainDisplay
from cai.training.metrics import read_metrics

RECIPE = """
name: ranks
model: start
constitution: micro.yaml
prompts:
  red_team: {source: micro, split: train, tags: [red_team], limit: 7}
stages:
  - {id: responses, kind: sample, prompts: [red_team], n: 2, max_new_tokens: 24, journal_batch: 3}
  - {id: votes, kind: judge, from: responses, cut_off: keep, journal_batch: 2}
  - {id: tuned, kind: sft, from: responses, batch_size: 4, train: {max_steps: 2}}
"""


@pytest.mark.skipif(not (MICRO / "config.json").exists(), reason="the embedded model is not there yet")
def test_two_ranks_and_forks_leave_what_one_process_does(tmp_path, monkeypatch):
    shutil.copy(shipped("constitutions") / "micro.yaml", tmp_path)
    (tmp_path / "start").symlink_to(MICRO)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    forked = {"processes": 2, "fork": True}
    ways = {"one": ({}, None), "ranks": ({"processes": 2}, "votes"), "forks": (forked, None), "again": (forked, None)}
    for way, (processes, until) in ways.items():
        profile = Profile(device="cpu", threads=1, **processes)
        run_recipe(recipe, profile, tmp_path / way, Options(until=until), PlainDisplay())
    torch.set_num_threads(threads)
    one, ranks, forks, again = (run_folder.latest(tmp_path / way) for way in ways)
    for other in (ranks, forks):
        for stage in ("responses", "votes"):
            assert other[stage].name == one[stage].name
            for file in ("records.jsonl", "failures.jsonl", "plan.json", "DONE"):
                assert (other[stage] / file).read_bytes() == (one[stage] / file).read_bytes(), f"{stage}/{file}"
    assert len((one["responses"] / "records.jsonl").read_bytes().splitlines()) == 14
    for file in ("model/model.safetensors", "metrics.jsonl"):
        assert (forks["tuned"] / file).read_bytes() == (again["tuned"] / file).read_bytes()
    losses = [[entry["loss"] for entry in read_metrics(way["tuned"])] for way in (forks, one)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("size", [4, 5, 64])
def test_verdicts_wait_for_the_responses_of_all_ranks(tmp_path, size):
    named = {name: Model(name, "nowhere") for name in ("start", "tuned")}
    prompts = [feedback_stages.prompt(f"question {number}") for number in range(6)]

    def compare(rank: int, ranks: int) -> feedback_stages.Outcome | None:
        def writes(request: Request) -> str:
            if rank == 1:
                time.sleep(0.05)  # the other rank is ready to judge long before
            return f"response {request.id}"

        script = feedback_stages.Script(writes, lambda question: (len(str(question.messages)) % 7 - 3.0, 0.9))
        try:
            return feedback_stages.run_stage(
                "compare", tmp_path / f"{ranks}", script=script, named=named, sets={"held": prompts}, rank=rank,
                ranks=ranks, models={"base": "start", "policy": "tuned"}, prompts="held", journal_batch=size,
            )  # fmt: skip
        except ShareDone:
            return None

    alone = compare(0, 1)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(compare, range(2), [2, 2])
    assert (first.bytes, first.figures, first.failures) == (alone.bytes, alone.figures, [])
    assert second is None
    assert len(first.rows) == 18
