"""Calibration of judges whose true calibration is known."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from cai.errors import BadInput
from cai.feedback.calibration import (
    brier,
    calibration_error,
    fit_temperature,
    held_out,
    lines,
    measured,
    of_labels,
    reliability,
)
from cai.feedback.explain import Evidence, Rule
from cai.micro.answers import BROAD, draw
from cai.micro.conversations import as_prompt
from cai.micro.oracle import gold_score
from cai.micro.world import requests

RNG = np.random.default_rng(0)
N = 20_000


def outcomes(log_odds):
    """The better side of each pair, drawn with the probability that the log-odds say."""
    return (RNG.random(len(log_odds)) < 1 / (1 + np.exp(-log_odds))).astype(float)


def test_a_judge_that_says_what_is_so_has_no_error_and_temperature_one():
    x = RNG.normal(0, 2, N)
    y = outcomes(x)
    assert calibration_error(x, y) < 0.01
    assert fit_temperature(x, y) == pytest.approx(1, abs=0.05)
    assert all(abs(each.confidence - each.right) < 0.04 for each in reliability(x, y, [str(i) for i in range(N)]))


def test_the_temperature_of_a_judge_three_times_too_sure_is_three_and_mends_it():
    x = RNG.normal(0, 2, N)
    y = outcomes(x)
    assert calibration_error(3 * x, y) > 0.1
    assert fit_temperature(3 * x, y) == pytest.approx(3, rel=0.05)
    scaled = held_out(3 * x, y, [str(i // 4) for i in range(N)])
    assert calibration_error(scaled, y) < 0.01
    assert brier(scaled, y) < brier(3 * x, y)


def test_a_pair_is_never_scaled_by_what_was_fitted_on_its_own_prompt():
    x = RNG.normal(0, 2, 40)
    clusters = [str(i // 2) for i in range(40)]
    y = outcomes(x)
    before = held_out(x, y, clusters)
    changed = y.copy()
    changed[:2] = 1 - changed[:2]
    after = held_out(x, changed, clusters)
    assert (before[:2] == after[:2]).all()
    assert (before[2:] != after[2:]).any()


def test_calling_a_what_was_b_changes_nothing():
    x = RNG.normal(0, 2, 500)
    y = outcomes(x)
    sign = RNG.choice([-1.0, 1.0], 500)
    turned = np.where(sign > 0, y, 1 - y)
    assert calibration_error(sign * x, turned) == pytest.approx(calibration_error(x, y))
    assert brier(sign * x, turned) == pytest.approx(brier(x, y))
    assert fit_temperature(sign * x, turned) == pytest.approx(fit_temperature(x, y))


def test_an_even_judge_is_half_right_and_well_calibrated():
    x, y = np.zeros(10), np.array([1.0] * 7 + [0.0] * 3)
    assert calibration_error(x, y) == 0
    assert brier(x, y) == 0.25
    (only,) = reliability(x, y, list("abcdefghij"))
    assert (only.n, only.confidence, only.right) == (10, 0.5, 0.5)


def test_a_judge_that_is_always_right_ends_at_the_lowest_temperature():
    x = np.array([1.0, 2.0, -1.0] * 5)
    assert fit_temperature(x, (x > 0).astype(float)) == pytest.approx(0.05, rel=0.01)


def test_intervals_hold_the_figures_and_are_wider_where_pairs_share_prompts():
    x = np.repeat(RNG.normal(0, 2, 50), 8)
    y = np.repeat(outcomes(x[::8]), 8)
    alone = measured(x, y, [str(i) for i in range(400)])
    shared = measured(x, y, [str(i // 8) for i in range(400)])
    for name in ("accuracy", "ece", "brier"):
        low, high = alone[name]["interval"]
        assert low <= alone[name]["value"] <= high or name == "ece"  # resampling adds noise to an absolute error
    width = lambda found: found["accuracy"]["interval"][1] - found["accuracy"]["interval"][0]  # noqa: E731
    assert width(shared) > 2 * width(alone)


def labels_of(pairs: list[tuple[dict, str, str]], log_odds: list[float]) -> Evidence:
    rows = [
        {
            "prompt_id": prompt["id"],
            "prompt": prompt["messages"],
            "tags": prompt["tags"],
            "a": {"text": a},
            "b": {"text": b},
        }
        for prompt, a, b in pairs
    ]
    votes = np.array(log_odds)[:, None]
    return Evidence("run", rows, ["all"], votes, votes, Rule({"all": 1.0}, None, 0.0, 0.5))


def test_labels_on_the_embedded_world_are_held_against_its_oracle():
    rng = Random(0)
    asked = [as_prompt(request) for request in requests("test", "harmful")[:60]]
    pairs = [(prompt, *(draw(request, BROAD, rng).text for _ in "ab"))
             for prompt, request in zip(asked, requests("test", "harmful"), strict=False)]  # fmt: skip
    gold = [gold_score(prompt["messages"], a) - gold_score(prompt["messages"], b) for prompt, a, b in pairs]
    found = of_labels(labels_of(pairs, [x or 1.0 for x in gold]))
    assert found["accuracy"]["value"] == 1
    assert found["left_out"] == {"unclear": 0, "ties": gold.count(0)}
    assert found["accuracy"]["n"] == 60 - gold.count(0)
    assert f"{60 - gold.count(0)} labels on all prompts" in next(iter(lines(found)))
    turned = of_labels(labels_of(pairs, [-x or 1.0 for x in gold]))
    assert turned["accuracy"]["value"] == 0
    unread = of_labels(labels_of([*pairs, (asked[0], "Hm.", "Hm?")], [*(x or 1.0 for x in gold), 1.0]))
    assert unread["left_out"]["unclear"] == 1


def test_without_a_known_truth_there_is_nothing_to_say():
    prompt = {"id": "x", "messages": [{"role": "user", "content": "Is it noon?"}], "tags": []}
    with pytest.raises(BadInput, match="no pair of this run has a known truth"):
        of_labels(labels_of([(prompt, "Yes.", "No.")], [1.0]))
