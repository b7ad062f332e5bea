"""People's own preferences: a reward model learns from them directly, and a judge is compared with them.

The transcripts of Bai et al. 2022 (arXiv 2204.05862).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from shared_data import SHARED_DATA
from tiny_models import Tiny
from training_stages import run_stage

from cai.cli import main
from cai.models.reference import MICRO
from cai.prompt_sets import PairSet, load_human_pairs
from cai.storage.rows import read_rows

DATA = SHARED_DATA
NAME = "hh_harmless_base.jsonl.gz"


needs_pairs = pytest.mark.skipif(not (DATA / NAME).exists(), reason=f"no {NAME} in ../shared/data beside the checkout")


@needs_pairs
def test_a_reward_model_learns_from_human_pairs_and_accounts_for_every_one(tmp_path: Path, tiny: Tiny) -> None:
    pairs = load_human_pairs(PairSet(source=NAME, limit=300), DATA)
    rows = pairs.preferences
    assert {row["source"] for row in rows} == {"human"}
    settings = {"max_length": 512, "hold_out": 0.2, "batch_size": 32, "train": {"learning_rate": 1e-3}}
    figures = run_stage("reward", tmp_path / "stage", rows, tiny("gpt_neox"), **settings)["reward"]
    accounted = figures["examples"] + figures["held_out"] + sum(figures["left_out"].values())
    assert accounted == figures["pairs"] == len(rows)
    assert figures["examples"] > 100
    assert figures["left_out"].keys() <= {"too_long", "identical"}
    low, high = figures["accuracy"]["interval"]
    assert 0 < low <= figures["accuracy"]["value"] <= high < 1
    assert (figures["against"], figures["ties"], figures["ungraded"]) == ("labels", 0, 0)
    assert figures["accuracy"]["n"] == figures["held_out"] > 20
    lines = read_rows(tmp_path / "stage" / "evaluation.jsonl")
    assert {line["source"] for line in lines} == {"human"}
    assert len({line["prompt_id"] for line in lines}) == figures["accuracy"]["topics"]


RECIPE = """
name: people
model: micro
constitution: micro
stages:
  - {{id: votes, kind: judge, human: {{source: {pairs}, limit: 24, tags: [red_team]}}, principles: 2}}
  - {{id: preferences, kind: prefer, from: votes, temperature: fitted}}
"""


@needs_pairs
@pytest.mark.skipif(not (MICRO / "config.json").exists(), reason="the embedded model is not there yet")
def test_a_judge_of_real_pairs_is_compared_with_people_and_every_pair_is_accounted_for(tmp_path: Path) -> None:
    (tmp_path / "people.yaml").write_text(RECIPE.format(pairs=DATA / NAME))
    runs = ["--runs", str(tmp_path)]
    result = CliRunner().invoke(main, ["run", str(tmp_path / "people.yaml"), *runs, "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    judged, fitted = summary["votes"]["votes"], summary["labels"]["temperature"]
    assert judged["pairs"] + judged["failed_pairs"] == judged["human"]["pairs"] == 24
    assert (fitted["truth"], fitted["measured_on"]) == ("human", "cross_validation")

    result = CliRunner().invoke(main, ["votes", "calibrate", "people", *runs, "--json"])
    assert result.exit_code == 0, result.output
    calibration = json.loads(result.stdout)
    assert (calibration["truth"], calibration["left_out"]["not_judged"]) == ("human", judged["failed_pairs"])
    assert (
        calibration["accuracy"]["n"] + calibration["left_out"]["ties"] + calibration["left_out"]["no_label"]
        == judged["pairs"]
    )
    low, high = calibration["accuracy"]["interval"]
    assert (low <= 0.5 <= high) == (calibration["against_chance"] == "not distinguishable from chance")
    assert calibration["stage_temperature"] == fitted["value"]
    refused = CliRunner().invoke(main, ["votes", "calibrate", "people", *runs, "--truth", "oracle"])
    assert (refused.exit_code, "expected human" in refused.stderr) == (2, True)
