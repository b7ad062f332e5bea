"""What people said and preferred: conversations go through all stages, and judges and reward models meet real pairs.

The transcripts of Bai et al. 2022 (arXiv 2204.05862). Every conversation and pair is accounted for at every step.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import feedback_stages
import pytest
from click.testing import CliRunner
from shared_data import SHARED_DATA
from tiny_models import Tiny
from training_stages import run_stage

from cai.cli import main
from cai.models.reference import MICRO
from cai.prompt_sets import PairSet, PromptSet, load_human_pairs, read_prompt_set
from cai.storage.rows import read_rows

NAME = "hh_harmless_base.jsonl.gz"
SAMPLING = {"max_new_tokens": 8, "journal_batch": 50}
reason = f"no {NAME} in ../shared/data beside the checkout"
needs_pairs = pytest.mark.skipif(not (SHARED_DATA / NAME).exists(), reason=reason)


@needs_pairs
def test_a_reward_model_learns_from_human_pairs_and_accounts_for_every_one(tmp_path: Path, tiny: Tiny) -> None:
    pairs = load_human_pairs(PairSet(source=NAME, limit=300), SHARED_DATA)
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
    (tmp_path / "people.yaml").write_text(RECIPE.format(pairs=SHARED_DATA / NAME))
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
    left_out = calibration["left_out"]
    assert calibration["accuracy"]["n"] + left_out["ties"] + left_out["no_label"] == judged["pairs"]
    low, high = calibration["accuracy"]["interval"]
    assert (low <= 0.5 <= high) == (calibration["against_chance"] == "not distinguishable from chance")
    assert calibration["stage_temperature"] == fitted["value"]
    refused = CliRunner().invoke(main, ["votes", "calibrate", "people", *runs, "--truth", "oracle"])
    assert (refused.exit_code, "expected human" in refused.stderr) == (2, True)


@needs_pairs
def test_200_red_team_conversations_are_all_accounted_for(tmp_path, tiny):
    config = PromptSet(source=NAME, format="hh", limit=200, tags=["red_team"])
    prompts = read_prompt_set(config, SHARED_DATA).prompts
    assert len({prompt["id"] for prompt in prompts}) == 200
    assert max(len(prompt["messages"]) for prompt in prompts) > 3, "all their turns, not only the last"
    model = tiny("llama", templates="micro")  # the shortest templates

    def run(kind, rows=None, **config):
        return feedback_stages.run_stage(kind, tmp_path, rows, model=model, **config)

    samples = run("sample", sets={"hh": prompts}, prompts="hh", n=2, **SAMPLING)
    assert len(samples.rows) + len(samples.failures) == 400
    answered = Counter(row["prompt_id"] for row in samples.rows)
    unanswered = {prompt["id"] for prompt in prompts} - set(answered)
    for prompt_id in unanswered:
        assert sum(prompt_id in failure["reason"] for failure in samples.failures) == 2

    first = {row["prompt_id"]: row for row in reversed(samples.rows)}
    revisions = run("revise", {"samples": list(first.values())}, rounds=1, **SAMPLING)
    assert len(revisions.rows) + len(revisions.failures) == len(first) == 200 - len(unanswered)

    judging = {"principles": "one", "min_option_probability": 0.0, "journal_batch": 50, "cut_off": "keep"}
    votes = run("judge", {"samples": samples.rows}, **judging)
    figures = votes.figures["votes"]["judge"]
    paired = 2 * (len(votes.rows) + figures["failed_pairs"])
    in_no_pair = figures["same_text"] + figures["unpaired"] + sum(figures["left_out"].values())
    assert paired + in_no_pair == len(samples.rows)

    preferences = run("prefer", {"votes": votes.rows})
    labelled = preferences.figures["labels"]
    assert len(preferences.rows) + labelled["abstained"] + labelled["dropped"] + labelled["even"] == len(votes.rows)
    by_prompt = {prompt["id"]: prompt for prompt in prompts}
    for row in preferences.rows:
        assert row["prompt"] == by_prompt[row["prompt_id"]]["messages"]

    settings = {"batch_size": 32, "max_length": 512, "train": {"max_steps": 2}}
    rewarded = run_stage("reward", tmp_path / "reward", preferences.rows, model, **settings)["reward"]
    tuned = run_stage("dpo", tmp_path / "policy", preferences.rows, model, **settings)["training"]["stage"]
    for figures, unused in ((rewarded, rewarded["held_out"]), (tuned, 0)):
        assert figures["examples"] > 50
        assert figures["examples"] + unused + sum(figures["left_out"].values()) == len(preferences.rows)
    for stage in ("reward", "policy"):
        assert (tmp_path / stage / "model" / "model.safetensors").is_file()
