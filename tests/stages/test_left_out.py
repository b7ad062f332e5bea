"""Every kind of stage tells the user where it leaves out more than a tenth of its input: how many, why, what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import feedback_stages
import pytest
import training_stages
from feedback_stages import EXAMPLES, PRINCIPLES, Script, human_pairs, prompt, sample, vote_row
from tiny_models import Tiny
from training_stages import Steps, numbered_prompts, preference, reinforce

from cai.contracts.model import Model
from cai.contracts.writing_stages import writing_stages
from cai.storage.rows import Failure

CALM_ONLY = "name: calm\nprinciples: [{id: calm, text: The assistant stays calm., applies_to: [red_team]}]"
REWARD = "def picky(prompts, responses):\n    return [None if 'odd' in text else 1.0 for text in responses]\n"


def responses(*texts: str, tag: str = "red_team") -> list[dict[str, Any]]:
    return [sample("Is it noon?", text, tag, number=number) for number, text in enumerate(texts)]


def cut_off(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "finish_reason": "length"}


def fails_at(word: str) -> Script:
    """A model that has no answer about conversations with a word, and another reason each time."""

    def about(request: Any) -> bool:
        return word in str(request.messages)

    return Script(
        writes=lambda request: (
            Failure(request.id, f"error {len(request.id)}", "transient") if about(request) else "a text"
        ),
        prefers=lambda question: (1.0, 0.05 if about(question) else 1.0),
    )


FEEDBACK: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "failed responses": (
        "sample",
        {"sets": {"all": [prompt("odd"), *(prompt(f"{n}?") for n in range(3))]}, "prompts": "all", "n": 2},
        ["2 of 8 responses left out: 2 failed: error 16; `cai run --retry-failures` asks again"],
    ),
    "failed revisions": (
        "revise",
        {"rows": {"responses": [*responses("one", "odd"), *responses("three", tag="helpful")]}, "document": CALM_ONLY},
        ["2 of 3 responses left out: 1 without a principle that applies, 1 failed: error 16; let a principle apply to "
         "their tags; `cai run --retry-failures` asks again"],
    ),
    "unpaired responses": (
        "judge",
        {"rows": {"candidates": [*responses("one", "two", "two"), cut_off(responses("four")[0])]}},
        ["2 of 4 responses left out: 1 cut off at max_new_tokens 64, 1 with the text of another; raise "
         "`max_new_tokens` of stage 'candidates' or set `cut_off: keep`; sample at a higher `temperature`"],
    ),
    "pairs without a vote": (
        "judge",
        {"rows": {"candidates": responses("one", "two", "three", "odd")}, "principles": ["calm"], "pairs": "all"},
        ["3 of 6 votes left out: 3 failed: the options hold 0.05 of the probability, less than min_option_probability "
         "0.1; name another `judge:`, or lower `min_option_probability` of its stage"],
    ),
    "pairs without a label": (
        "prefer",
        {"rows": {"votes": [vote_row(n, {"calm": (0.1 * n, 0.1 * n)}) for n in range(4)]}, "abstain_below": 0.15,
         "min_confidence": 0.56},
        ["3 of 4 pairs left out: 2 on which every principle is nearer to even than abstain_below 0.15 nats, 1 nearer "
         "to even than min_confidence 0.56; lower `abstain_below`; lower `min_confidence`"],
    ),
    "responses without a reward": (
        "best-of-n",
        {"rows": {"candidates": [*responses("one", "odd"), cut_off(responses("three")[0])]},
         "rewards": [{"function": "mine.py:picky"}]},
        ["2 of 3 responses left out: 1 cut off at max_new_tokens 64, 1 failed: picky: it returned NoneType, expected a "
         "number; raise `max_new_tokens` of stage 'candidates'"],
    ),
    "examples without an answer": (
        "gate",
        {"document": EXAMPLES.replace("Say it.", "odd"), "bars": {"below": "warn"}},
        ["1 of 3 examples left out: 1 failed: the options hold 0.05 of the probability, less than "
         "min_option_probability 0.1; name another `judge:`, or lower `min_option_probability` of its stage"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "sentences"), FEEDBACK.values(), ids=FEEDBACK)
def test_feedback_stages(tmp_path: Path, kind: str, settings: dict[str, Any], sentences: list[str]) -> None:
    (tmp_path / "mine.py").write_text(REWARD)
    settings = {"script": fails_at("odd"), "document": PRINCIPLES, **settings}
    for name in settings.get("rows", {}):
        folder = tmp_path / f"{kind}-reads-{name}"
        folder.mkdir()
        (folder / "stage.json").write_text(json.dumps({"config": {"max_new_tokens": 64}}))
    assert feedback_stages.run_stage(kind, tmp_path, **settings).left_out == sentences


def test_an_over_long_prompt_is_not_asked_again(tmp_path: Path, tiny: Tiny) -> None:
    sets = {"all": [prompt("Why? " * 3000), prompt("Why?")]}
    figures = feedback_stages.run_stage(
        "sample", tmp_path, sets=sets, model=tiny("llama"), prompts="all", max_new_tokens=4
    )
    [sentence] = figures.left_out
    assert sentence.endswith("; shorten the prompts, or use a model with a longer context")
    assert "--retry-failures" not in sentence


def test_the_stage_that_wrote_a_cut_off_text_is_named_also_where_others_passed_it_on(tmp_path: Path) -> None:
    kept, long = responses("kept", "long")
    stages: dict[str, tuple[dict[str, Any], list[Any], list[str]]] = {
        "responses": ({"max_new_tokens": 64}, [cut_off(kept), cut_off(long)], []),
        "rewards": ({"max_new_tokens": 9}, [], []),
        "revisions": (
            {"max_new_tokens": 256},
            [cut_off({**kept, "original": "kept"}), cut_off({**long, "response": "longer", "original": "long"})],
            ["responses"],
        ),
        "chosen": ({}, [cut_off({**kept, "original": "kept"})], ["revisions", "rewards"]),
    }
    for name, (config, rows, inputs) in stages.items():
        (tmp_path / name).mkdir()
        gives = "reward" if name == "rewards" else "texts"
        facts = {"config": config, "gives": gives, "inputs": {input: {"folder": input} for input in inputs}}
        (tmp_path / name / "stage.json").write_text(json.dumps(facts))
        (tmp_path / name / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    revised = stages["revisions"][1]
    assert writing_stages("chosen", tmp_path / "chosen", stages["chosen"][1]) == {"responses": 64}
    assert writing_stages("revisions", tmp_path / "revisions", revised) == {"revisions": 256, "responses": 64}
    assert writing_stages("revisions", tmp_path / "revisions", [{**kept, "original": "kept"}]) == {}
    assert writing_stages("people", tmp_path / "people", [cut_off(kept)]) == {"people": None}


def test_a_stage_that_reads_failures_must_declare_it(tmp_path: Path) -> None:
    context = training_stages.stage_context(tmp_path / "stage", {"rows": []}, Model("none", "nowhere"))
    with pytest.raises(AssertionError, match="must refer to 'rows' with `failures='reasons'`"):
        context.failures("rows")
    with pytest.raises(AssertionError, match="must refer to 'rows' with `failures='ids'`"):
        context.failed_ids("rows")
    assert replace(context, failures_read={"rows": "ids"}).failed_ids("rows") == set()


def test_people_whose_pairs_cannot_be_used(tmp_path: Path) -> None:
    pairs = [(["Is it noon?", answer], ["Is it noon?", "no"]) for answer in ("yes", "it is", "no")]
    outcome = feedback_stages.run_stage("prefer", tmp_path, pairs=human_pairs(tmp_path, pairs), document=None)
    assert outcome.left_out == ["1 of 3 labelled pairs left out: 1 (the same answer twice)"]


def test_a_learner_that_learns_from_a_part_of_the_responses(tmp_path: Path, tiny: Tiny) -> None:
    rows = [training_stages.sample(number) for number in range(20)]
    rows = [*map(cut_off, rows[:15]), *rows[15:], training_stages.sample(20, tags=["held_out"])]
    training_stages.write_inputs(tmp_path / "stage", {"rows": rows})
    stage_json = tmp_path / "stage-rows" / "stage.json"
    stage_json.write_text(json.dumps({"config": {"max_new_tokens": 256}}))
    progress = Steps()
    training_stages.run_stage("sft", tmp_path / "stage", None, tiny("llama"), progress=progress)
    assert progress.notes == [
        "15 of 20 responses left out: 15 cut off at max_new_tokens 256; raise `max_new_tokens` of stage 'rows'"
    ]


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_a_learner_that_learns_from_a_part_of_the_pairs(tmp_path: Path, tiny: Tiny, kind: str) -> None:
    rows = [preference(number) for number in range(12)] + [preference(n, chosen="sea " * 400) for n in range(20, 24)]
    progress = Steps()
    training_stages.run_stage(kind, tmp_path / "stage", rows, tiny("llama"), progress=progress, max_length=128)
    sentence = "4 of 16 pairs left out: 4 with more than 128 tokens; raise `max_length`"
    assert sentence in progress.notes


@pytest.mark.parametrize("kind", ["ppo", "rloo"])
def test_a_policy_that_responds_to_a_part_of_the_prompts(tmp_path: Path, tiny: Tiny, kind: str) -> None:
    (tmp_path / "mine.py").write_text("def flat(prompts, responses):\n    return [1.0] * len(responses)\n")
    prompts = numbered_prompts(8)
    prompts[0]["messages"][0]["content"] += " Say it, please!" * 60
    settings = {"rollouts": 1, "rollout_size": 8} if kind == "ppo" else {}
    progress = Steps()
    rewards = [{"function": "mine.py:flat"}]
    reinforce(kind, tmp_path / "stage", prompts, tiny("llama"), rewards, progress=progress, max_length=128, **settings)
    assert progress.notes == ["1 of 8 prompts left out: 1 with more than 128 tokens; raise `max_length`"]
