"""People's own preferences train a reward model directly: the transcripts of Bai et al. 2022 (arXiv 2204.05862)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from training_stages import run_stage

from cai.checkpoint import Model
from cai.prompts import PairSet, load_human_pairs

pytest.importorskip("torch")

DATA = Path(__file__).parents[2].parent / "shared" / "data"
NAME = "hh_harmless_base.jsonl.gz"


@pytest.mark.skipif(not (DATA / NAME).exists(), reason=f"no {NAME} in ../shared/data beside the checkout")
def test_a_reward_model_learns_from_human_pairs_and_accounts_for_every_one(
    tmp_path: Path, tiny: Callable[..., Model]
) -> None:
    pairs = load_human_pairs(PairSet(source=NAME, limit=300), DATA)
    rows = pairs.preferences
    assert {row["source"] for row in rows} == {"human"}
    settings = {"max_length": 512, "holdout": 0.2, "batch_size": 32, "train": {"learning_rate": 1e-3}}
    figures = run_stage("reward", tmp_path / "stage", rows, tiny("gpt_neox"), **settings)["reward"]
    accounted = figures["examples"] + figures["held_out"] + sum(figures["left_out"].values())
    assert accounted == figures["pairs"] == len(rows)
    assert figures["examples"] > 100
    assert figures["left_out"].keys() <= {"too_long", "identical"}
    low, high = figures["accuracy"]["interval"]
    assert 0 < low <= figures["accuracy"]["value"] <= high < 1
    assert (figures["against"], figures["ties"], figures["ungraded"]) == ("labels", 0, 0)
    assert figures["accuracy"]["n"] == figures["held_out"] > 20
    lines = [json.loads(line) for line in (tmp_path / "stage" / "evaluation.jsonl").read_text().splitlines()]
    assert {line["source"] for line in lines} == {"human"}
    assert len({line["prompt_id"] for line in lines}) == figures["accuracy"]["topics"]
