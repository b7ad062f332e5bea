"""The gate before a judge: what it measures, when it stops a run, and where a recipe has it."""

from __future__ import annotations

import json
import math

import pytest
from feedback_stages import EXAMPLES, Script, run_stage
from training_stages import Steps

from cai.run.plan import Planner
from cai.run.recipe import load_recipe
from cai.stages.gate import FIGURES, PADDING
from cai.storage.rows import Failure
from cai.text.errors import BadInput, GateFailed


def responses(question) -> list[str]:
    """The first and the second response that the question shows."""
    text = question.messages[-1]["content"]
    return [text.split(f"<response_{letter}>\n")[1].split(f"\n</response_{letter}>")[0] for letter in "ab"]


def log_odds(question) -> float:
    """What a judge answers that knows good from bad, likes length, and is even between equals."""
    first, second = responses(question)
    longer = (len(first) > len(second)) - (len(first) < len(second))
    return 2.0 * (first.count("GOOD") - second.count("GOOD")) + 0.5 * longer


def good_judge(question) -> tuple[float, float]:
    return log_odds(question), 1.0


def contrary_judge(question) -> tuple[float, float]:
    return -log_odds(question), 1.0


def gate(folder, judge=good_judge, **config):
    return run_stage("gate", folder, script=Script(prefers=judge), document=EXAMPLES, **config)


def test_a_good_judge_passes_and_its_figures_say_what_it_is_like(tmp_path):
    figures = gate(tmp_path).figures["gate"]["gate"]
    assert figures["accuracy"] == 1
    assert figures["flip_rate"] == 0
    assert figures["prefers_padded"]["value"] == 1
    assert figures["nats_from_even_between_equals"] == 0
    assert figures["ece"] == pytest.approx(1 - 1 / (1 + math.exp(-2)), abs=0.1)
    assert figures["principles"]["short"]["n"] == 1


def test_progress_advances_with_each_answer(tmp_path):
    progress, counts = Steps(), []

    def judge(question):
        counts.append(progress.n_finished)
        return good_judge(question)

    gate(tmp_path, judge, progress=progress)
    assert counts[:7] == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert progress.total == progress.n_finished == 3
    assert progress.parts[-1] == (6, 6, "padded and equal pairs")


def test_a_judge_that_answers_the_contrary_stops_the_run_and_leaves_its_figures(tmp_path):
    with pytest.raises(GateFailed, match=r"accuracy 0\.00 \[.*\] of at least 0\.75") as stopped:
        gate(tmp_path, contrary_judge)
    assert stopped.value.exit_code == 1
    (figures,) = tmp_path.rglob(FIGURES)
    failing = json.loads(figures.read_text())["principles"]["calm"]["failing"]
    assert [example["name"] for example in failing] == ["calm/1", "calm/2"]


def test_a_judge_that_is_not_distinguishable_from_chance_is_called_that(tmp_path):
    half_right = EXAMPLES.replace("better: GOOD it, worse: no", "better: no, worse: GOOD it")
    script = Script(prefers=good_judge)
    with pytest.raises(GateFailed, match=r"of at least 0\.9, not distinguishable from chance"):
        run_stage("gate", tmp_path, script=script, document=half_right, bars={"min_accuracy": 0.9})
    progress = Steps()
    figures = gate(tmp_path / "few", progress=progress).figures["gate"]["gate"]
    assert (figures["accuracy"], figures["against_chance"]) == (1, "not distinguishable from chance")
    (note,) = progress.notes
    assert "passes the gate, but is not distinguishable from chance on 3 examples: accuracy 1.00 [0." in note


def test_a_judge_that_goes_by_the_order_is_told_so(tmp_path):
    with pytest.raises(GateFailed, match=r"1\.00 of its verdicts turn with the order, at most 0\.3 may"):
        gate(tmp_path, lambda question: (3.0 + log_odds(question) / 2, 1.0))


def test_with_a_warning_the_run_goes_on(tmp_path):
    outcome = gate(tmp_path, contrary_judge, bars={"below": "warn"})
    assert outcome.figures["gate"]["gate"]["accuracy"] == 0


def test_no_answer_is_no_pass(tmp_path):
    with pytest.raises(GateFailed, match=r"accuracy 0\.00"):
        gate(tmp_path, lambda question: Failure(question.id, "no idea"))


def test_a_padded_response_is_the_other_one_and_the_padding(tmp_path):
    script = Script(prefers=good_judge)
    run_stage("gate", tmp_path, script=script, document=EXAMPLES)
    padded = [responses(question) for question in script.questions if PADDING in question.messages[-1]["content"]]
    assert len(padded) == 2 * 3
    assert all(sorted(pair, key=len)[1] == f"{sorted(pair, key=len)[0]} {PADDING}" for pair in padded)


def recipe(folder, text: str):
    path = folder / "r.yaml"
    path.write_text(f"name: r\nmodel: micro\n{text}{STAGES}", encoding="utf-8")
    return load_recipe(path)


STAGES = """
prompts: {questions: {source: micro, split: train, limit: 8}}
stages:
  - {id: responses, kind: sample, prompts: questions}
  - {id: trained, kind: sft, from: responses}
  - {id: candidates, kind: sample, prompts: questions, model: trained, n: 2}
  - {id: votes, kind: judge, from: candidates}
"""


def test_a_recipe_has_its_gate_first_or_after_the_stage_that_trains_the_judge(tmp_path):
    first = recipe(tmp_path, "judge: model\nconstitution: micro\ngate: {min_accuracy: 0.9}")
    assert list(first.stages) == ["gate", "responses", "trained", "candidates", "votes"]
    assert first.stages["gate"].bars.min_accuracy == 0.9
    assert first.stages["gate"].judge == "micro"
    later = recipe(tmp_path, "judge: trained\nconstitution: micro\ngate: {}")
    assert list(later.stages) == ["responses", "trained", "gate", "candidates", "votes"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("constitution: micro\ngate: {}", "expected a `judge:` that has a name beside it"),
        ("judge: model\nconstitution: micro\ngate: {min_acuracy: 1}", "did you mean 'min_accuracy'"),
    ],
)
def test_a_gate_that_cannot_be_is_refused_where_it_stands(tmp_path, text, message):
    with pytest.raises(BadInput, match=message) as refused:
        recipe(tmp_path, text)
    assert "r.yaml:4:" in str(refused.value) or "r.yaml:5:" in str(refused.value)


def test_other_examples_are_another_test(tmp_path):
    document = tmp_path / "c.yaml"

    def parts(constitution: str) -> dict:
        document.write_text(constitution, encoding="utf-8")
        loaded = recipe(tmp_path, "judge: model\nconstitution: c.yaml\ngate: {}")
        return Planner(loaded, tmp_path / "run", offline=True).fingerprints.parts(loaded.stages["gate"], {})

    before, after = parts(EXAMPLES), parts(EXAMPLES.replace("better: GOOD it", "better: GOOD that"))
    assert {name for name in after if before[name] != after[name]} == {"principle.short.examples"}
