"""200 red-team conversations of people go through all stages, and each is accounted for at every step."""

from __future__ import annotations

from collections import Counter

import pytest
from feedback_stages import run_stage
from shared_data import SHARED_DATA
from training_stages import run_stage as train

from cai.prompt_sets import PromptSet, read_prompt_set

HERE = SHARED_DATA
FILE = "hh_harmless_base.jsonl.gz"
SAMPLING = {"max_new_tokens": 8, "journal_batch": 50}


@pytest.mark.skipif(not (HERE / FILE).is_file(), reason=f"needs hh-rlhf's conversations at {HERE / FILE}")
def test_200_red_team_conversations_are_all_accounted_for(tmp_path, tiny):
    config = PromptSet(source=FILE, format="hh", limit=200, tags=["red_team"])
    prompts = read_prompt_set(config, HERE).prompts
    assert len({prompt["id"] for prompt in prompts}) == 200
    assert max(len(prompt["messages"]) for prompt in prompts) > 3, "all their turns, not only the last"
    model = tiny("llama", templates="micro")  # the shortest templates

    def run(kind, rows=None, **config):
        return run_stage(kind, tmp_path, rows, model=model, **config)

    samples = run("sample", sets={"hh": prompts}, prompts="hh", n=2, **SAMPLING)
    assert len(samples.rows) + len(samples.failures) == 400
    answered = Counter(row["prompt_id"] for row in samples.rows)
    unanswered = {prompt["id"] for prompt in prompts} - set(answered)
    for prompt_id in unanswered:
        assert sum(prompt_id in failure["reason"] for failure in samples.failures) == 2

    first = {row["prompt_id"]: row for row in reversed(samples.rows)}
    revisions = run("revise", {"samples": list(first.values())}, rounds=1, **SAMPLING)
    assert len(revisions.rows) + len(revisions.failures) == len(first) == 200 - len(unanswered)

    votes = run(
        "judge",
        {"samples": samples.rows},
        principles="one",
        min_option_probability=0.0,
        journal_batch=50,
        cut_off="keep",
    )
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
    rewarded = train("reward", tmp_path / "reward", preferences.rows, model, **settings)["reward"]
    tuned = train("dpo", tmp_path / "policy", preferences.rows, model, **settings)["training"]["stage"]
    for figures, unused in ((rewarded, rewarded["held_out"]), (tuned, 0)):
        assert figures["examples"] > 50
        assert figures["examples"] + unused + sum(figures["left_out"].values()) == len(preferences.rows)
    for stage in ("reward", "policy"):
        assert (tmp_path / stage / "model" / "model.safetensors").is_file()
    print(
        f"\n{len(samples.rows)} responses ({len(samples.failures)} failed), {len(revisions.rows)} revisions "
        f"({len(revisions.failures)} failed), {len(votes.rows)} pairs judged, {len(preferences.rows)} preferences, "
        f"{rewarded['examples']} pairs for the reward model, {tuned['examples']} for the policy"
    )
