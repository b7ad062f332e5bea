"""Unit tests for principles: what passes, what fails by name, and what no answer counts for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from feedback_stages import EXAMPLES, Script, constitution

from cai.cli import main
from cai.contracts.engine import Question
from cai.document.shipped import shipped_folder
from cai.feedback.principle_tests import example_figures, example_lines, run_examples, with_examples_of
from cai.storage.rows import Failure
from cai.templates import load_templates
from cai.text.errors import BadInput


def shown_first(question: Question) -> bool:
    """Whether the better response is the first one shown."""
    text = question.messages[-1]["content"]
    return text.index("GOOD") < text.index("no\n")


def seeing(question: Question) -> tuple[float, float]:
    return (2.0 if shown_first(question) else -1.0), 1.0


def outcomes(folder: Path, script: Script, text: str = EXAMPLES):  # type: ignore[no-untyped-def]
    return run_examples(constitution(folder, text), script, load_templates("default"), retries=0)


def figures_of(folder: Path, results, text: str = EXAMPLES):  # type: ignore[no-untyped-def]
    return example_figures(constitution(folder, text), results)


def test_a_judge_that_agrees_passes_every_example(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, outcomes(tmp_path, Script(prefers=seeing)))
    assert (figures["accuracy"], figures["n"], figures["failed"], figures["flip_rate"]) == (1.0, 3, 0, 0.0)
    assert 0.8 < figures["confidence"] < 0.83  # log-odds of 1.5
    assert {id: principle["n"] for id, principle in figures["principles"].items()} == {"calm": 2, "short": 1, "bare": 0}
    assert not any(principle["failing"] for principle in figures["principles"].values())


def test_an_example_that_is_seen_the_other_way_is_named(tmp_path: Path) -> None:
    swapped = EXAMPLES.replace("better: GOOD it, worse: no", "better: no, worse: GOOD it")
    results = outcomes(tmp_path, Script(prefers=seeing), swapped)
    figures = figures_of(tmp_path, results, swapped)
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert [principle["name"] for principle in figures["principles"]["short"]["failing"]] == ["short/1"]
    assert any(line.startswith("failing short/1: 'Say it.'") for line in example_lines(figures, results))


def test_a_judge_of_positions_alone_passes_nothing_and_flips_everywhere(tmp_path: Path) -> None:
    figures = figures_of(tmp_path, outcomes(tmp_path, Script(prefers=lambda question: (3.0, 1.0))))
    assert (figures["accuracy"], figures["flip_rate"], figures["confidence"]) == (0.0, 1.0, 0.5)


def test_no_answer_is_no_pass_and_says_why(tmp_path: Path) -> None:
    def broken(question: Question) -> tuple[float, float] | Failure:
        return Failure(question.id, "too long") if "Wake up." in question.messages[-1]["content"] else seeing(question)

    results = outcomes(tmp_path, Script(prefers=broken))
    figures = figures_of(tmp_path, results)
    assert (figures["accuracy"], figures["failed"]) == (pytest.approx(2 / 3), 1)
    assert "too long" in figures["principles"]["calm"]["failing"][0]["reason"]
    assert figures["principles"]["calm"]["failures"] == {"too long": 1}
    lines = list(example_lines(figures, results))
    assert "no answer to 1 of 3 examples: too long (1)" in lines
    assert any(line.startswith("failing calm/1") and line.endswith("too long") for line in lines)


def test_a_principle_without_an_example_or_an_answer_is_listed(tmp_path: Path) -> None:
    def broken(question: Question) -> tuple[float, float] | Failure:
        return Failure(question.id, "too long") if "Say it." in question.messages[-1]["content"] else seeing(question)

    results = outcomes(tmp_path, Script(prefers=broken))
    figures = figures_of(tmp_path, results)
    assert figures["principles"]["bare"]["accuracy"] is None
    rows = {line.split()[0]: line.split()[1:] for line in example_lines(figures, results) if line}
    assert rows["bare"] == ["no", "example"]
    assert rows["short"][:4] == ["0/1", "1", "0", "%"]


def test_examples_of_somebody_else_take_the_place_of_the_own_ones(tmp_path: Path) -> None:
    own = constitution(tmp_path, EXAMPLES)
    source = "name: other\nprinciples: [{id: bare, text: x, examples: [{prompt: P, better: GOOD, worse: no}]}]"
    changed = with_examples_of(own, constitution(tmp_path, source))
    assert [len(principle.examples) for principle in changed.principles] == [0, 0, 1]
    assert changed.principles[2].text == "The assistant has no example here."
    with pytest.raises(BadInput, match=r"principle 'clam', expected .*calm"):
        with_examples_of(own, constitution(tmp_path, source.replace("bare", "clam")))
    with pytest.raises(BadInput, match="none of its principles has an example"):
        run_examples(
            constitution(tmp_path, "name: n\nprinciples: [{id: a, text: b}]"), Script(), load_templates("default")
        )


def test_the_embedded_judge_passes_its_constitution_and_fails_where_one_principle_is_turned_round(tmp_path):
    path = shipped_folder("constitutions") / "micro.yaml"
    result = CliRunner().invoke(main, ["constitution", "test", str(path), "--min-accuracy", "0.95", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["accuracy"] >= 0.95
    assert result.stderr.startswith(f"examples: started\nexamples: {json.loads(result.stdout)['n']} examples, ")
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    polite = next(principle for principle in written["principles"] if principle["id"] == "polite")
    for example in polite["examples"]:
        example["better"], example["worse"] = example["worse"], example["better"]
    (tmp_path / "turned.yaml").write_text(yaml.safe_dump(written))
    result = CliRunner().invoke(main, ["constitution", "test", str(tmp_path / "turned.yaml"), "--min-accuracy", "0.95"])
    assert result.exit_code == 1
    assert "failing polite/1" in result.stdout


def test_a_judge_that_is_not_distinguishable_from_chance_is_called_that(tmp_path: Path) -> None:
    """The document whose examples are wrong half of the time; the table fits 100 columns."""
    path = tmp_path / "half.yaml"
    written = yaml.safe_load((shipped_folder("constitutions") / "micro.yaml").read_text(encoding="utf-8"))
    for principle in written["principles"]:
        example = principle["examples"][0]
        example["better"], example["worse"] = example["worse"], example["better"]
    written["principles"].append({"id": "kind", "text": "The assistant is kind."})
    path.write_text(yaml.safe_dump(written))
    result = CliRunner().invoke(main, ["constitution", "test", str(path)])
    assert result.exit_code == 0, result.output
    assert "over all examples the judge is not distinguishable from chance" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    chosen = ["--principle", "polite", "--principle", "help", "--principle", "kind"]
    result = CliRunner().invoke(main, ["constitution", "test", str(path), *chosen, "--json"])
    figures = json.loads(result.stdout)
    assert set(figures["principles"]) == {"polite", "helpful", "kind"}
    assert (figures["n"], figures["against_chance"]) == (4, "not distinguishable from chance")


def test_a_principle_with_too_few_examples_is_not_called_indistinguishable_from_chance(tmp_path: Path) -> None:
    many = ", ".join(f"{{prompt: Say {i}., better: GOOD it, worse: no}}" for i in range(7))
    repeated = ", ".join(f"{{prompt: Again., better: GOOD {i}, worse: no}}" for i in range(7))
    text = (
        f"{EXAMPLES}  - {{id: wise, text: The assistant is wise., examples: [{many}]}}\n"
        f"  - {{id: kind, text: The assistant is kind., examples: [{repeated}]}}\n"
    )
    sentence = "too few examples to tell by these alone, 7 or more about different prompts would: calm, short, kind"
    results = outcomes(tmp_path, Script(prefers=seeing), text)
    lines = " ".join(line.strip() for line in example_lines(figures_of(tmp_path, results, text), results))
    assert sentence in lines
    assert "by its own examples alone" not in lines, "all seven of `wise` are right"

    def wrong_for_three(question: Question) -> tuple[float, float]:
        is_wrong = any(f"Say {i}." in question.messages[-1]["content"] for i in range(3))
        log_odds, probability = seeing(question)
        return (-log_odds if is_wrong else log_odds), probability

    results = outcomes(tmp_path, Script(prefers=wrong_for_three), text)
    lines = " ".join(line.strip() for line in example_lines(figures_of(tmp_path, results, text), results))
    assert "not distinguishable from chance by its own examples alone: wise" in lines
    assert sentence in lines
