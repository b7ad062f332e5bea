"""Calibration of judges whose true calibration is known."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from random import Random

import numpy as np
import pytest

from cai.feedback.judge_calibration import (
    calibrate_labels,
    calibration_lines,
    cross_validated_log_odds,
    fit_and_measure_divisor,
    measure_calibration,
)
from cai.feedback.labelled_votes import LabelledVotes, LabelRule
from cai.maths.calibration import brier_score, calibration_error, error_if_calibrated, fit_temperature, reliability_bins
from cai.micro.answers import BROAD, sample_answer
from cai.micro.conversations import as_prompt
from cai.micro.oracle import gold_score
from cai.micro.world import requests
from cai.report.pictures import draw_reliability
from cai.text.errors import BadInput

RNG = np.random.default_rng(0)
N = 20_000


def outcomes(log_odds):
    """The better side of each pair, sampled with the probability of the log-odds."""
    return (RNG.random(len(log_odds)) < 1 / (1 + np.exp(-log_odds))).astype(float)


def test_a_calibrated_judge_has_no_error_and_temperature_one():
    x = RNG.normal(0, 2, N)
    y = outcomes(x)
    assert calibration_error(x, y) < 0.01
    assert fit_temperature(x, y) == pytest.approx(1, abs=0.05)
    bins = reliability_bins(x, y, [str(i) for i in range(N)])
    assert all(abs(pairs.confidence - pairs.right) < 0.04 for pairs in bins)


def test_the_temperature_of_a_judge_three_times_too_sure_is_three_and_mends_it():
    x = RNG.normal(0, 2, N)
    y = outcomes(x)
    assert calibration_error(3 * x, y) > 0.1
    assert fit_temperature(3 * x, y) == pytest.approx(3, rel=0.05)
    scaled = cross_validated_log_odds(3 * x, y, [str(i // 4) for i in range(N)])
    assert calibration_error(scaled, y) < 0.01
    assert brier_score(scaled, y) < brier_score(3 * x, y)


def test_a_pair_is_never_scaled_by_what_was_fitted_on_its_own_prompt():
    x = RNG.normal(0, 2, 40)
    clusters = [str(i // 2) for i in range(40)]
    y = outcomes(x)
    before = cross_validated_log_odds(x, y, clusters)
    changed = y.copy()
    changed[:2] = 1 - changed[:2]
    after = cross_validated_log_odds(x, changed, clusters)
    assert (before[:2] == after[:2]).all()
    assert (before[2:] != after[2:]).any()


def test_calling_a_what_was_b_changes_nothing():
    x = RNG.normal(0, 2, 500)
    y = outcomes(x)
    sign = RNG.choice([-1.0, 1.0], 500)
    flipped_truth = np.where(sign > 0, y, 1 - y)
    assert calibration_error(sign * x, flipped_truth) == pytest.approx(calibration_error(x, y))
    assert brier_score(sign * x, flipped_truth) == pytest.approx(brier_score(x, y))
    assert fit_temperature(sign * x, flipped_truth) == pytest.approx(fit_temperature(x, y))


def test_an_even_judge_is_half_right_and_well_calibrated():
    x, y = np.zeros(10), np.array([1.0] * 7 + [0.0] * 3)
    assert calibration_error(x, y) == 0
    assert brier_score(x, y) == 0.25
    (only,) = reliability_bins(x, y, list("abcdefghij"))
    assert (only.n, only.confidence, only.right) == (10, 0.5, 0.5)


def test_a_judge_that_is_always_right_ends_at_the_lowest_temperature():
    x = np.array([1.0, 2.0, -1.0] * 5)
    assert fit_temperature(x, (x > 0).astype(float)) == pytest.approx(0.05 * 4 / 3, rel=0.01)


def test_intervals_hold_the_figures_and_are_wider_where_pairs_share_prompts():
    x = np.repeat(RNG.normal(0, 2, 50), 8)
    y = np.repeat(outcomes(x[::8]), 8)
    alone = measure_calibration(x, y, [str(i) for i in range(400)])
    shared = measure_calibration(x, y, [str(i // 8) for i in range(400)])
    for name in ("accuracy", "ece", "brier"):
        low, high = alone[name]["interval"]
        assert low <= alone[name]["value"] <= high
    width = lambda figures: figures["accuracy"]["interval"][1] - figures["accuracy"]["interval"][0]  # noqa: E731
    assert width(shared) > 2 * width(alone)


@pytest.mark.parametrize("n", [2, 20, 200])
@pytest.mark.parametrize("too_sure", [1, 3])
def test_the_interval_of_an_error_holds_it_and_a_perfect_judge_shows_what_n_allows(n, too_sure):
    x = RNG.normal(0, 2, n)
    figures = measure_calibration(too_sure * x, outcomes(x), [str(i) for i in range(n)])
    for name in ("ece", "ece_after_temperature", "brier", "brier_after_temperature"):
        low, high = figures[name]["interval"]
        assert 0 <= low <= figures[name]["value"] <= high <= 1


def test_the_interval_of_an_error_begins_at_none_unless_more_than_noise_is_seen():
    clusters = [str(i) for i in range(200)]

    def lowest(too_sure):
        rng = np.random.default_rng(3)
        x = rng.normal(0, 2, (20, 200))
        y = (rng.random((20, 200)) < 1 / (1 + np.exp(-x))).astype(float)
        return [measure_calibration(too_sure * a, b, clusters)["ece"]["interval"][0] for a, b in zip(x, y, strict=True)]

    assert lowest(1).count(0) >= 17
    assert lowest(3).count(0) == 0


def test_the_error_of_a_perfect_judge_is_the_mean_over_what_may_happen():
    # Four pairs at 0.75, k of them right: |0.75 - k / 4|, k binomial.
    x = np.full(4, np.log(3))
    expected = sum(comb(4, k) * 0.75**k * 0.25 ** (4 - k) * abs(0.75 - k / 4) for k in range(5))
    assert error_if_calibrated(x) == pytest.approx(expected, abs=0.02)
    assert error_if_calibrated(np.full(400, np.log(3))) < 0.03
    calibration = calibrate_labels(chosen_by_people([n % 4 != 0 for n in range(200)]))
    assert "calibration error if calibrated" in "\n".join(calibration_lines(calibration))


def test_two_clusters_are_never_in_one_fold_and_one_alone_measures_nothing(tmp_path):
    x = 3 * RNG.normal(0, 2, 40)
    y = outcomes(x / 3)
    for n in range(20):
        clusters = [f"{n}-{i % 2}" for i in range(40)]
        expected = np.where(
            np.arange(40) % 2, x / fit_temperature(x[::2], y[::2]), x / fit_temperature(x[1::2], y[1::2])
        )
        assert cross_validated_log_odds(x, y, clusters) == pytest.approx(expected)
    assert np.isnan(cross_validated_log_odds(x, y, ["one"] * 40)).all()
    calibration = calibrate_labels(chosen_by_people([n % 4 != 0 for n in range(40)], 1))
    assert (calibration["ece_after_temperature"]["value"], calibration["reliability_after_temperature"]) == (None, [])
    rows = [line.split() for line in calibration_lines(calibration)]
    assert ["calibration", "error", "after", "temperature", "-"] in rows
    draw_reliability(calibration, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").exists()


def labels_of(pairs: list[tuple[dict, str, str]], log_odds: list[float]) -> LabelledVotes:
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
    return LabelledVotes("run", rows, ["all"], votes, votes, LabelRule({"all": 1.0}))


def test_labels_on_the_embedded_world_are_measured_against_its_oracle():
    rng = Random(0)
    prompts = [as_prompt(request) for request in requests("test", "harmful")[:60]]
    pairs = [(prompt, *(sample_answer(request, BROAD, rng).text for _ in "ab"))
             for prompt, request in zip(prompts, requests("test", "harmful"), strict=False)]  # fmt: skip
    gold = [gold_score(prompt["messages"], a) - gold_score(prompt["messages"], b) for prompt, a, b in pairs]
    calibration = calibrate_labels(labels_of(pairs, [x or 1.0 for x in gold]))
    assert calibration["accuracy"]["value"] == 1
    assert calibration["left_out"] == {"unclear": 0, "ties": gold.count(0), "no_label": 0, "not_judged": 0}
    assert (calibration["truth"], calibration["against_chance"]) == ("oracle", "better than chance")
    assert calibration["accuracy"]["n"] == 60 - gold.count(0)
    assert f"{60 - gold.count(0)} labels on all prompts" in next(iter(calibration_lines(calibration)))
    flipped = calibrate_labels(labels_of(pairs, [-x or 1.0 for x in gold]))
    assert (flipped["accuracy"]["value"], flipped["against_chance"]) == (0, "worse than chance")
    unread = calibrate_labels(labels_of([*pairs, (prompts[0], "Hm.", "Hm?")], [*(x or 1.0 for x in gold), 1.0]))
    assert unread["left_out"]["unclear"] == 1


def test_without_a_known_truth_there_is_nothing_to_say():
    prompt = {"id": "x", "messages": [{"role": "user", "content": "Is it noon?"}], "tags": []}
    with pytest.raises(BadInput, match="no pair of this run has a known truth"):
        calibrate_labels(labels_of([(prompt, "Yes.", "No.")], [1.0]))


def chosen_by_people(right: list[bool], prompts: int = 1000, *tags: str) -> LabelledVotes:
    """Labels that are right or wrong by people, in turns about `prompts` prompts."""
    pairs = [({"id": f"p{i % prompts}", "messages": [{"role": "user", "content": f"Why {i}?"}], "tags": list(tags)},
              "So.", "Thus.") for i in range(len(right))]  # fmt: skip
    labelled = labels_of(pairs, [1.0 if i % 2 else -1.0 for i in range(len(right))])
    for i, (row, agrees) in enumerate(zip(labelled.rows, right, strict=True)):
        row["human"] = float(agrees == (i % 2 == 1))
    return labelled


def test_labels_are_measured_against_people_where_these_labelled_the_pairs():
    figures = calibrate_labels(chosen_by_people([n % 4 != 0 for n in range(200)]))
    assert (figures["truth"], figures["accuracy"]["value"], figures["accuracy"]["topics"]) == ("human", 0.75, 200)
    assert figures["against_chance"] == "better than chance"


def test_a_judge_that_is_not_distinguishable_from_chance_is_called_so():
    for right, prompts in (([n % 2 == 0 for n in range(40)], 1000), ([True] * 40, 1)):
        calibration = calibrate_labels(chosen_by_people(right, prompts))
        assert calibration["against_chance"] == "not distinguishable from chance", "one prompt says nothing of others"
        assert "the judge is not distinguishable from chance" in list(calibration_lines(calibration))


@pytest.mark.parametrize(
    ("rule", "fitted"),
    [
        ({}, None),
        ({"points_per_nat": 2.0}, None),
        ({"points_per_nat": 2.0, "is_points_per_nat_fitted": True}, "points per nat"),
        ({"temperature": 2.0, "is_temperature_fitted": True}, "temperature"),
        ({"temperature": 2.0, "is_temperature_fitted": True, "points_per_nat": 2.0, "is_points_per_nat_fitted": True},
         "temperature and points per nat"),
    ],
)  # fmt: skip
def test_it_is_said_which_divisor_of_the_stage_was_fitted_on_the_measured_prompts(rule, fitted):
    votes = replace(chosen_by_people([n % 4 != 0 for n in range(40)]), rule=LabelRule({"all": 1.0}, **rule))
    figures = calibrate_labels(votes)
    assert figures["stage_temperature_fitted"] == ("is_temperature_fitted" in rule)
    assert figures["stage_points_per_nat"] == rule.get("points_per_nat")
    assert figures["stage_points_per_nat_fitted"] == ("is_points_per_nat_fitted" in rule)
    text = " ".join(calibration_lines(figures))
    expected = f"fitted on these prompts: the stage's {fitted}; figures after temperature are of other prompts"
    assert (expected in text) == (fitted is not None)
    assert ("fitted on these prompts" in text) == (fitted is not None)


def test_pairs_on_which_people_contradict_each_other_are_counted_and_left_out():
    labelled = chosen_by_people([True] * 10)
    labelled.rows[0]["human"] = 0.5
    calibration = calibrate_labels(labelled)
    assert (calibration["accuracy"]["n"], calibration["left_out"]["ties"]) == (9, 1)


def test_labels_are_measured_against_people_on_held_out_prompts_where_there_are_any():
    labelled = chosen_by_people([n < 30 for n in range(40)])
    for row in labelled.rows[30:]:
        row["tags"].append("held_out")
    figures = calibrate_labels(labelled)
    assert (figures["measured_on"], figures["accuracy"]["value"], figures["accuracy"]["n"]) == ("held_out", 0, 10)


def test_where_both_truths_are_known_one_must_be_said():
    request = next(iter(requests("test", "harmful")))
    prompt = as_prompt(request)
    texts = {
        gold_score(prompt["messages"], text): text
        for text in (sample_answer(request, BROAD, Random(n)).text for n in range(50))
    }
    scores = sorted(score for score in texts if score is not None)
    of_world = labels_of([(prompt, texts[scores[-1]], texts[scores[0]])], [1.0])
    people = chosen_by_people([False] * 3)
    votes = np.concatenate([of_world.ab, people.ab])
    both = LabelledVotes("run", [*of_world.rows, *people.rows], ["all"], votes, votes, of_world.rule)
    with pytest.raises(BadInput, match=r"^run: found .* expected --truth"):
        calibrate_labels(both)
    assert calibrate_labels(both, "oracle")["accuracy"]["value"] == 1
    assert calibrate_labels(both, "human")["accuracy"]["value"] == 0
    with pytest.raises(BadInput, match="--truth oracle: no pair of this run has that, expected human"):
        calibrate_labels(people, "oracle")


def test_a_fitted_temperature_is_measured_where_it_was_not_fitted():
    x = RNG.normal(0, 2, 4000)
    y = outcomes(x)
    clusters = [str(i // 4) for i in range(4000)]
    nowhere = np.zeros(4000, dtype=bool)
    fitted = fit_and_measure_divisor("human", 3 * x, 3 * x, y, clusters, nowhere)
    assert fitted.value == fit_temperature(3 * x, y)
    assert fitted.ece_after == calibration_error(cross_validated_log_odds(3 * x, y, clusters), y)
    assert (fitted.measured_on, fitted.measured_pairs, fitted.prompts) == ("cross_validation", 4000, 1000)
    last = np.arange(4000) >= 3000
    fitted = fit_and_measure_divisor("human", 3 * x, 3 * x, np.where(last, 1 - y, y), clusters, last)
    assert fitted.value == fit_temperature(3 * x[:3000], y[:3000]), "held-out pairs change nothing"
    assert fitted.brier_after == brier_score(3 * x[3000:] / fitted.value, 1 - y[3000:])
    assert (fitted.measured_on, fitted.pairs, fitted.measured_pairs) == ("held_out", 3000, 1000)
