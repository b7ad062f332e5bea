"""summary.json: its schema, the one definition of it, accepts what every kind of stage reports and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import NotRequired, get_origin, get_type_hints

import feedback_stages
import jsonschema
import pytest
import training_stages
from feedback_stages import Script, prompt, sample

from cai.feedback.asked_votes import AskedVotes
from cai.feedback.principle_tests import ExampleFigures, RateBounds
from cai.maths.statistics import RateFigure
from cai.report import summary
from cai.report.figure_types import HeadToHead
from cai.report.figures import ComparisonRows, VerdictRule, prompt_set_figures
from cai.report.summary import compared_sets, comparison_summary, summary_of

SCHEMA = json.loads(Path(summary.__file__).with_name("summary.schema.json").read_text(encoding="utf-8"))
EMPTY = {"recipe": "trial", "run": "runs/trial", "stages": {}, "seconds": {}, "failures": {}}
RESPONSES = [sample("Is it noon?", text, number=number) for number, text in enumerate(("one", "two", "three"))]
REWARD = "def length(prompts, responses):\n    return [float(len(text)) for text in responses]\n"


def validate(figures: dict) -> None:
    jsonschema.validate(EMPTY | json.loads(json.dumps(figures)), SCHEMA)


def comparison_figures(tag: str = "") -> dict:
    """Figures of two checkpoints, of which the second one failed once."""
    prompts = {row["id"]: row for row in (prompt(f"Is it {number}?", tag or f"topic:{number}") for number in range(3))}
    samples = {
        (name, prompt_id, 0): {"id": f"{name} {prompt_id}", "response": f"It is {name}.", "finish_reason": "stop"}
        for name in ("base", "policy")
        for prompt_id in prompts
    }
    failed = list(samples)[-1]
    del samples[failed]
    votes = {
        (("policy", "base"), prompt_id, 0): {"votes": [], "tags": prompts[prompt_id]["tags"]}
        for prompt_id in list(prompts)[:2]
    }
    rows = ComparisonRows(prompts, samples, votes, [failed], [(("policy", "base"), failed[1], 0)])
    return prompt_set_figures(rows, ["base", "policy"], VerdictRule({}, 0.1))


@pytest.mark.parametrize("figure_type", [RateFigure, HeadToHead, ExampleFigures, RateBounds, AskedVotes])
def test_the_types_that_code_is_checked_by_have_the_keys_of_the_schema(figure_type):
    definition = SCHEMA["$defs"][figure_type.__name__]
    hints = get_type_hints(figure_type, include_extras=True)
    assert hints.keys() == definition["properties"].keys()
    assert {key for key, hint in hints.items() if get_origin(hint) is not NotRequired} == {*definition["required"]}


@pytest.mark.parametrize(
    ("kind", "rows", "settings"),
    [
        ("sample", None, {"sets": {"all": [prompt("Is it noon?")]}, "prompts": "all", "n": 2}),
        ("revise", RESPONSES, {}),
        ("judge", RESPONSES, {}),
        ("judge", RESPONSES, {"method": "rating"}),
        ("judge", RESPONSES, {"pairs": "against"}),  # one stage alone: nothing is judged
        ("gate", None, {"document": feedback_stages.EXAMPLES, "bars": {"below": "warn"}}),
        ("best-of-n", RESPONSES, {"rewards": [{"function": "mine.py:length"}]}),
    ],
)
def test_the_schema_accepts_the_figures_of_feedback_stages(tmp_path, kind, rows, settings):
    (tmp_path / "mine.py").write_text(REWARD)
    inputs = {"responses": rows} if rows else None
    validate(feedback_stages.run_stage(kind, tmp_path, inputs, script=Script(), **settings).figures)


@pytest.mark.parametrize("settings", [{}, {"temperature": "fitted"}])
def test_the_schema_accepts_the_figures_of_labels(tmp_path, settings):
    judged = feedback_stages.run_stage("judge", tmp_path, {"responses": RESPONSES}, script=Script(), pairs="all")
    rows = [{**row, "human": 1.0} for row in judged.rows] if settings else judged.rows
    figures = feedback_stages.run_stage("prefer", tmp_path, {"votes": rows}, **settings).figures
    assert ("temperature" in figures["labels"]) == bool(settings)
    validate(figures)


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_the_schema_accepts_the_figures_of_training_on_rows(tmp_path, tiny, kind):
    make_row = training_stages.sample if kind == "sft" else training_stages.preference
    rows = [make_row(number, tags=["held_out"] if number < 4 else []) for number in range(16)]
    validate(training_stages.run_stage(kind, tmp_path / "stage", rows, tiny("llama"), train={"max_steps": 1}))


@pytest.mark.parametrize(
    ("kind", "settings"), [("rloo", {"train": {"max_steps": 1}}), ("ppo", {"rollouts": 1, "rollout_size": 8})]
)
def test_the_schema_accepts_the_figures_of_reinforcement(tmp_path, tiny, kind, settings):
    (tmp_path / "mine.py").write_text(REWARD)
    prompts = [training_stages.prompt_row(number) for number in range(8)]
    rewards = [{"function": "mine.py:length"}]
    validate(training_stages.reinforce(kind, tmp_path / "stage", prompts, tiny("llama"), rewards, **settings))


def test_the_schema_accepts_comparisons_and_their_sets_are_read_back():
    figures = {"heldout": comparison_figures(), "other_verbs": comparison_figures("tag")}
    assert figures["heldout"]["checkpoints"]["policy"]["finished"]["missing"] == 1
    comparison = comparison_summary(figures)
    validate(comparison)
    first, second = compared_sets(EMPTY | comparison)
    assert (first.prompt_set, second.prompt_set) == ("", "other_verbs")
    assert first.rates == figures["heldout"]["checkpoints"]
    assert second.head_to_head == figures["other_verbs"]["head_to_head"]
    assert compared_sets(EMPTY) == []


@pytest.mark.parametrize(
    "figures",
    [
        {"unknown": 1},
        {"seconds": {"stage": "long"}},
        {"samples": {"stage": {"prompts": 1}}},
        {"training": {"stage": {"steps": 1, "loss": {"first": 1.0, "last": 1.0}, "left_out": {}, "unknown": 1}}},
        {"checkpoints_other": {"base": {}}},
    ],
)
def test_the_schema_refuses_what_no_stage_reports(figures):
    with pytest.raises(jsonschema.ValidationError):
        validate(figures)


def test_figures_of_stages_are_merged_by_key():
    facts = {
        "one": {"figures": {"training": {"one": {"steps": 1}}, "labels": {"pairs": 1}}, "seconds": 2.5},
        "two": {"figures": {"training": {"two": {"steps": 2}}, "labels": {"votes": 2}}, "failures": 3},
    }
    stages = {name: SimpleNamespace(folder=Path(f"{name}-0a"), facts=stage) for name, stage in facts.items()}
    assert summary_of("trial", Path("runs/trial"), stages) == {
        "recipe": "trial",
        "run": "runs/trial",
        "stages": {"one": "one-0a", "two": "two-0a"},
        "seconds": {"one": 2.5, "two": None},
        "failures": {"one": 0, "two": 3},
        "training": {"one": {"steps": 1}, "two": {"steps": 2}},
        "labels": {"pairs": 1, "votes": 2},
    }
    assert facts["one"]["figures"]["training"] == {"one": {"steps": 1}}, "the stages' own figures stay as they are"
