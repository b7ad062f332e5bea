"""Sampling: n responses a prompt, tags travel, failures are named, a seed belongs to its item."""

from __future__ import annotations

import pytest
from feedback_stages import Script, prompt, run_stage
from training_stages import Steps

from cai.contracts.engine import Completion
from cai.storage.rows import Failure
from cai.text.errors import StageFailed

PROMPTS = {
    "red": [prompt("How do I pick a lock?", "red_team", "topic:locks"), prompt("Who are you?", "shared")],
    "kind": [prompt("Who are you?", "helpful"), prompt("Is it noon?", "helpful", "held_out")],
}


def test_every_prompt_gets_n_responses_that_carry_its_tags(tmp_path):
    script = Script(writes=lambda request: f"answer {request.seed % 1000}")
    result = run_stage("sample", tmp_path, sets=PROMPTS, script=script, prompts=["red", "kind"], n=3)
    assert len(result.rows) == 9
    assert len({row["id"] for row in result.rows}) == len({row["seed"] for row in result.rows}) == 9
    tags = {row["prompt"][0]["content"]: row["tags"] for row in result.rows}
    assert tags["How do I pick a lock?"] == ["red_team", "topic:locks"]
    assert tags["Is it noon?"] == ["helpful", "held_out"]
    assert tags["Who are you?"] == ["shared", "helpful"], "a prompt of two sets is answered once, with the tags of both"
    assert result.figures["samples"]["sample"]["responses"] == 9


def test_the_recipe_says_how_tokens_are_drawn(tmp_path):
    script = Script()
    settings = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_new_tokens": 11}
    run_stage("sample", tmp_path, sets=PROMPTS, script=script, prompts="kind", stop=["END"], **settings)
    sampling = script.requests[0].sampling
    assert {name: getattr(sampling, name) for name in settings} == settings
    assert sampling.stop == ("END",)


def test_what_fails_is_asked_again_with_another_seed_and_then_named(tmp_path):
    def write(request):
        text = request.messages[0]["content"]
        if "lock" in text:
            return Failure(request.id, "9000 tokens do not fit into 4096")
        attempts = sum(earlier.id == request.id for earlier in script.requests)
        return "yes" if attempts > 1 else Failure(request.id, "try again")

    script = Script(writes=write)
    result = run_stage("sample", tmp_path, sets=PROMPTS, script=script, prompts=["red", "kind"], retries=1)
    assert [row["response"] for row in result.rows] == ["yes", "yes"]
    (failure,) = result.failures
    assert PROMPTS["red"][0]["id"] in failure["reason"]
    assert "9000 tokens" in failure["reason"]
    assert result.figures["samples"]["sample"]["failed"] == 1
    for request_id in {request.id for request in script.requests}:
        seeds = [request.seed for request in script.requests if request.id == request_id]
        assert len(seeds) == len(set(seeds)) == 2


def test_thinking_without_a_response_is_asked_again_and_then_named(tmp_path):
    def write(request):
        thought = Completion(request.id, "", [0] * 9, [-1.0] * 9, "length", [0], reasoning="Hm")
        attempts = sum(earlier.id == request.id for earlier in script.requests)
        return thought if "noon" in request.messages[0]["content"] or attempts < 2 else "yes"

    script = Script(writes=write)
    result = run_stage("sample", tmp_path, sets=PROMPTS, script=script, prompts="kind", retries=1)
    assert [row["response"] for row in result.rows] == ["yes"]
    (failure,) = result.failures
    assert "its reasoning took all 9 tokens" in failure["reason"]


def test_nothing_but_failures_ends_the_stage_with_a_reason(tmp_path):
    script = Script(writes=lambda request: Failure(request.id, "no room"))
    with pytest.raises(StageFailed, match="no room"):
        run_stage("sample", tmp_path, sets=PROMPTS, script=script, prompts="red")


def test_a_seed_belongs_to_the_item_and_not_to_its_batch(tmp_path):
    def run(name, **config):
        script = Script(writes=lambda request: f"answer {request.seed}")
        return run_stage("sample", tmp_path / name, sets=PROMPTS, script=script, n=2, **config)

    together = run("together", prompts=["red", "kind"], journal_batch=64)
    alone = run("alone", prompts=["red", "kind"], journal_batch=1)
    fewer = run("fewer", prompts="kind")
    assert together.bytes == alone.bytes
    seeds = {row["id"]: row["seed"] for row in alone.rows}
    assert all(seeds[row["id"]] == row["seed"] for row in fewer.rows if "shared" not in row["tags"])


def test_progress_advances_with_each_response(tmp_path):
    progress, counts = Steps(), []

    def write(request):
        counts.append((progress.n_finished, progress.tokens))
        return Failure(request.id, "no room") if "noon" in request.messages[0]["content"] else "yes"

    prompts, script = ["red", "kind"], Script(writes=write)
    result = run_stage("sample", tmp_path, sets=PROMPTS, script=script, prompts=prompts, retries=0, progress=progress)
    n_tokens = result.rows[0]["n_tokens"]
    assert [n for n, _ in counts] != [0] * len(counts)
    assert all(tokens == n * n_tokens for n, tokens in counts)
    assert progress.n_finished == progress.total == len(result.rows) + len(result.failures)
    assert progress.tokens == n_tokens * len(result.rows)
