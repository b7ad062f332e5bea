"""The rule of a stage's labels, as it is written and read back."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from feedback_stages import PRINCIPLES, run_stage, vote_row

from cai.feedback.labelled_votes import LABEL_RULE, LabelledVotes, LabelRule
from cai.feedback.stored_votes import read_votes
from cai.storage.journal import RECORDS
from cai.text.errors import BadInput

ODDS = [(2.0, 1.0), (-0.5, -0.7), (0.1, 0.1), (3.0, -1.0)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"labels": "clamp", "clamp": (0.4, 0.6), "temperature": None}),
        ({"labels": "hard", "temperature": 2.0}, {"labels": "hard", "temperature": 2.0}),
        ({"tag_weights": {"tone": 3.0}, "abstain_below": 0.2}, {"weights": {"calm": 6.0, "short": 0.5}}),
        ({"temperature": "fitted", "min_confidence": 0.55, "labels": "soft"}, {"is_temperature_fitted": True}),
    ],
)
def test_the_rule_of_a_stage_gives_its_labels_again(tmp_path: Path, config: dict, expected: dict) -> None:
    rows = []
    for number, (calm, short) in enumerate(itertools.product(ODDS, ODDS)):
        people_choose_a = (sum(calm) > 0) != (number % 5 == 0)
        row = vote_row(number, {"calm": calm, "short": short})
        rows.append({**row, "method": "reasoned", "human": float(people_choose_a)})
    document = PRINCIPLES.replace("weight: 2.0", "weight: 2.0, tags: [tone]")
    result = run_stage("prefer", tmp_path, {"votes": rows}, document=document, **config)
    rule = LabelRule.read(result.folder)
    assert {name: getattr(rule, name) for name in expected} == expected
    assert rule.methods == ("reasoned",)
    votes = read_votes([tmp_path / "prefer-reads-votes" / RECORDS])
    labels = LabelledVotes("run", rows, votes.principles, *votes.log_odds_by_order(), rule).labels()
    by_pair = {row["pair_id"]: row for row in result.rows}
    strength = {row["id"]: abs(label) for row, label in zip(rows, labels, strict=True)}
    assert {id: row["log_odds"] for id, row in by_pair.items()} == {id: strength[id] for id in by_pair}
    assert all(strength[row["id"]] == 0 for row in rows if row["id"] not in by_pair)
    p_chosen = rule.p_chosen(np.array([row["log_odds"] for row in result.rows]))
    assert [row["p_chosen"] for row in result.rows] == p_chosen.tolist()


def test_a_stage_without_a_rule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"found no {LABEL_RULE}"):
        LabelRule.read(tmp_path)
