"""The sum that `cai show` prints leads from the votes of a pair to the label that `prefer` gave it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from feedback_stages import PRINCIPLES, run_stage, vote_row
from labelled_runs import finish_stage, labelled_run

from cai.cli import main
from cai.feedback.label_sums import label_line, label_sum
from cai.feedback.labelled_votes import LabelRule

RULE = LabelRule({"calm": 2.0, "safe": 1.0, "short": 0.5})
ROW = vote_row(1, {"calm": (2.0, 1.0), "safe": (-0.6, -0.2), "short": (0.1, 0.1)})
"""Means +1.5, -0.4 and +0.1: the weighted sum is 3.0 - 0.4 + 0.05 = 2.65, of weights 3.5."""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "sum +2.65 / sum of weights 3.5 = +0.76, so a is better with probability 0.681; soft label 0.681"),
        ({"temperature": 2.0}, "sum +2.65 / temperature 2 = +1.32, so a is better with probability 0.790"),
        ({"temperature": 2.0, "is_temperature_fitted": True}, "/ fitted temperature 2 ="),
        ({"abstain_below": 0.2}, "sum +2.60 / sum of weights 3 = +0.87"),
        ({"labels": "hard"}, "with probability 0.681; hard label 1.000"),
        ({"labels": "clamp", "clamp": (0.4, 0.6)}, "0.681; label 0.600, kept within 0.4 and 0.6"),
        ({"min_confidence": 0.7}, "0.681; no label, since that is below min_confidence 0.7"),
        ({"abstain_below": 9.0}, "preferences: no label, since no principle has a say"),
        ({"weights": {"calm": 0.0, "safe": 1.0, "short": 0.0}}, "= -0.40, so b is better with probability 0.599"),
    ],
)
def test_the_sum_follows_the_rule_of_the_labels(changes, words):
    assert words in label_line(label_sum("preferences", ROW, replace(RULE, **changes)))


def test_points_are_divided_before_they_are_weighed():
    rated = {**ROW, "method": "rating", "scale": 5}
    label = label_sum("preferences", rated, replace(RULE, points_per_nat=0.5))
    assert [term["mean"] for term in label["terms"]] == pytest.approx([3.0, -0.8, 0.2])
    assert "sum +5.30 / sum of weights 3.5, with 0.5 points per nat, = +1.51" in label_line(label)


def test_a_principle_with_a_vote_in_one_order_alone_has_no_say():
    votes = [vote for vote in ROW["votes"] if (vote["principle"], vote["order"]) != ("calm", "ba")]
    label = label_sum("preferences", {**ROW, "votes": votes}, RULE)
    assert [term["weighted"] for term in label["terms"]] == [None, pytest.approx(-0.4), pytest.approx(0.05)]
    assert label["divisor"] == 1.5


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.5, "abstain_below": 0.4}, {"labels": {"clamp": [0.4, 0.6]}}]
)
def test_the_label_is_the_one_that_prefer_wrote(tmp_path: Path, settings) -> None:
    rows = [vote_row(n, {"calm": (n - 2.5, 0.3), "short": (-0.2 * n, 1.0)}) for n in range(5)]
    outcome = run_stage("prefer", tmp_path, {"votes": rows}, document=PRINCIPLES, **settings)
    rule = LabelRule.read(outcome.folder)
    labels = {row["id"]: label_sum("preferences", row, rule) for row in rows}
    assert {row["pair_id"] for row in outcome.rows} == {id for id, label in labels.items() if label["p_chosen"]}
    for preference in outcome.rows:
        label = labels[preference["pair_id"]]
        assert label["p_chosen"] == preference["p_chosen"]
        assert abs(label["log_odds"] or math.nan) == preference["log_odds"]
        assert label["sum"] / label["divisor"] == pytest.approx(label["log_odds"])


def test_show_has_the_weights_beside_the_log_odds(tmp_path: Path) -> None:
    run = labelled_run(tmp_path / "trial", [ROW], RULE)
    result = CliRunner().invoke(main, ["show", "trial", "pair-1", "--runs", str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "log-odds for a a first b first mean better weight weighted" in lines
    assert "calm +2.00 +1.00 +1.50 a 2 +3.00" in lines
    assert "short +0.10 +0.10 +0.10 a 0.5 +0.05" in lines
    assert any(line.startswith("preferences: sum +2.65 / sum of weights 3.5 = +0.76") for line in lines)
    finish_stage(run, "other", "prefer", "preferences", [], "votes", rule=replace(RULE, temperature=1.0))
    both = CliRunner().invoke(main, ["show", "trial", "pair-1", "--runs", str(tmp_path), "--json"])
    labels = json.loads(both.stdout)["votes"][0]["labels"]
    assert [(label["stage"], round(label["log_odds"], 2)) for label in labels] == [
        ("preferences", 0.76),
        ("other", 2.65),
    ]
