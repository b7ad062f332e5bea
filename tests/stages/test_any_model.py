"""Every family of models runs from prompts to preferences; its responses are noise, only that it runs is tested."""

from __future__ import annotations

import pytest
from feedback_stages import prompt, run_stage, sample

from cai.text.errors import StageFailed

PROMPTS = [prompt(f"What is {n} and {n}?", "red_team" if n % 2 else "helpful") for n in range(4)]
SAMPLING = {"max_new_tokens": 8, "temperature": 1.0}


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gpt_neox", "no_system", "pad_is_eos", "mistral", "thinking", "lora", "base"]
)
def test_any_model_samples_revises_judges_and_labels(family, tmp_path, tiny):
    model = tiny(family, templates="fewshot") if family == "base" else tiny(family)

    def run(kind, rows=None, n_failures=0, **config):
        result = run_stage(kind, tmp_path, rows, model=model, **config)
        assert len(result.failures) == n_failures
        return result.rows

    thinks = family == "thinking"  # a random one never ends its reasoning, so nothing that it samples is a response
    if thinks:
        with pytest.raises(StageFailed, match="its reasoning took all 8 tokens"):
            run("sample", sets={"all": PROMPTS}, prompts="all", n=2, **SAMPLING)
        samples = [sample(f"What is {n} and {n}?", text, "helpful") for n in range(4) for text in ("Much.", "Little.")]
    else:
        samples = run("sample", sets={"all": PROMPTS}, prompts="all", n=2, **SAMPLING)
        assert all(row["finish_reason"] == "stop" or row["n_tokens"] == 8 for row in samples)
    assert len(samples) == 8
    revisions = run("revise", {"samples": samples}, n_failures=8 if thinks else 0, rounds=2, **SAMPLING)
    assert len(revisions) == (0 if thinks else 8)
    assert all(len(row["rounds"]) == 2 for row in revisions)
    judging = {"pairs": "all", "min_option_probability": 0.0, "cut_off": "keep"}
    votes = run("judge", {"samples": samples, "revisions": revisions}, **judging)
    assert all({vote["order"] for vote in row["votes"]} == {"ab", "ba"} for row in votes)
    preferences = run("prefer", {"votes": votes})
    assert len(preferences) == len(votes) >= 4
    assert all(0.5 <= row["p_chosen"] <= 1 for row in preferences)
