"""Every family of models runs from prompts to preferences; its responses are noise, only that it runs is tested."""

from __future__ import annotations

import pytest
from feedback_stages import prompt, run_stage, sample

from cai.text.errors import StageFailed

PROMPTS = [prompt(f"What is {n} and {n}?", "red_team" if n % 2 else "helpful") for n in range(4)]
SAMPLING = {"max_new_tokens": 8, "temperature": 1.0}


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "gpt_neox", "no_system", "pad_is_eos", "mistral", "thinking", "lora", "base"],
)
def test_any_model_samples_revises_judges_and_labels(family, tmp_path, tiny):
    model = tiny(family, templates="fewshot") if family == "base" else tiny(family)

    def run(kind, rows=None, **config):
        result = run_stage(kind, tmp_path, rows, model=model, **config)
        assert not result.failures
        return result.rows

    if family == "thinking":  # a random one never ends its reasoning, so what it samples is none of its responses
        with pytest.raises(StageFailed, match="its reasoning took all 8 tokens"):
            run("sample", sets={"all": PROMPTS}, prompts="all", n=2, **SAMPLING)
        samples = [sample(f"What is {n} and {n}?", text, "helpful") for n in range(4) for text in ("Much.", "Little.")]
    else:
        samples = run("sample", sets={"all": PROMPTS}, prompts="all", n=2, **SAMPLING)
        assert all(row["finish_reason"] == "stop" or row["n_tokens"] == 8 for row in samples)
    assert len(samples) == 8
    if family == "thinking":
        result = run_stage("revise", tmp_path, {"samples": samples}, model=model, rounds=2, **SAMPLING)
        assert len(result.failures) == 8
        revisions = result.rows
    else:
        revisions = run("revise", {"samples": samples}, rounds=2, **SAMPLING)
    assert len(revisions) == (0 if family == "thinking" else 8)
    assert all(len(row["rounds"]) == 2 for row in revisions)
    votes = run(
        "judge", {"samples": samples, "revisions": revisions}, pairs="all", min_option_probability=0.0, cut_off="keep"
    )
    assert all({vote["order"] for vote in row["votes"]} == {"ab", "ba"} for row in votes)
    preferences = run("prefer", {"votes": votes})
    assert len(preferences) == len(votes) >= 4
    assert all(0.5 <= row["p_chosen"] <= 1 for row in preferences)
