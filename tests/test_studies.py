"""The parts of the studies that need no model: arithmetic on votes, and the page that is made of results."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cai.maths import calibration
from studies import findings_page, labels

IDS = [f"pair {i}" for i in range(200)]
PRINCIPLES = ["direct", "harmless", "helpful", "polite"]
RNG = np.random.default_rng(0)
TRUTH = (RNG.random(200) < 0.5).astype(float)


def pool(noise: float = 1.0) -> labels.Pool:
    """Votes of a judge that is mostly right, with some of the principles on each pair."""
    votes = (2 * TRUTH - 1)[:, None] + RNG.normal(0, noise, (200, 4))
    votes[:100, 1] = np.nan
    return labels.Pool(
        IDS, PRINCIPLES, votes, votes, TRUTH, RNG.normal(0, 3, 200).round(),
        [f"topic {i % 40}" for i in range(200)], [i % 5 for i in range(200)],
    )  # fmt: skip


def test_principles_are_drawn_among_those_that_voted_and_more_of_them_hold_fewer():
    votes = pool().ab
    is_kept = {k: ~np.isnan(labels.keep_sampled_principles(IDS, PRINCIPLES, votes, k, 0)) for k in (1, 2, 4)}
    assert (is_kept[1].sum(axis=1) == 1).all()
    assert (is_kept[2].sum(axis=1) == 2).all()
    assert (is_kept[4] == ~np.isnan(votes)).all()
    assert not (is_kept[1] & ~is_kept[2]).any()
    assert len(set(np.argmax(is_kept[1], axis=1))) == 4


def test_a_bias_in_both_orders_leaves_the_mean_of_log_odds_and_the_side_of_single_principles():
    held_out = pool()
    bias = labels.position_bias(IDS, PRINCIPLES, "ab")
    assert bias.mean() == pytest.approx(2, abs=0.15)
    assert bias.std() == pytest.approx(1, abs=0.1)
    averages = labels.average_orders(held_out.ab + bias, held_out.ba - bias)
    assert averages["log-odds"] == pytest.approx(held_out.ab, nan_ok=True)
    same_side = (averages["probability"] > 0) == (averages["log-odds"] > 0)
    assert same_side[~np.isnan(held_out.ab)].all()
    right = {way: held_out.right(held_out.label(votes)).mean() for way, votes in averages.items()}
    assert right["one order"] < 0.7 < right["log-odds"]


def test_shares_are_exact_and_a_larger_one_holds_a_smaller_one():
    few, many = (labels.sample_share(IDS, share, "flipped", 0) for share in (0.15, 0.3))
    assert (few.sum(), many.sum()) == (30, 60)
    assert not (few & ~many).any()


def test_a_difference_between_seeds_counts_where_every_row_is_alike():
    topics, seeds = [str(i) for i in range(400)], [i % 5 for i in range(400)]
    steady = labels.difference([0.6] * 400, [0.5] * 400, topics, seeds)
    assert steady["verdict"] == "a higher"
    moved = [0.5 + (0.3, -0.2, 0.3, -0.2, 0.3)[seed] for seed in seeds]
    shaky = labels.difference(moved, [0.5] * 400, topics, seeds)
    assert shaky["value"] == pytest.approx(0.1)
    assert shaky["verdict"] == "not distinguishable"


def test_abstention_trades_coverage_for_nothing_that_is_not_there():
    figures = labels.by_abstention(pool())
    coverage = [of_threshold["coverage"]["value"] for of_threshold in figures["abstain_below"].values()]
    assert coverage[0] == 1
    assert coverage == sorted(coverage, reverse=True)
    strict = figures["min_confidence"]["0.99"]
    assert strict["accuracy"]["value"] > strict["accuracy_of_dropped"]["value"]


def test_the_page_and_its_figures_come_of_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "N_RESAMPLES", 20)
    held_out = pool()
    rate = held_out.estimate(held_out.right(held_out.label(held_out.ab))) | {"examples": [100, 110]}
    difference = held_out.difference(TRUTH, TRUTH)
    policy = dict.fromkeys(labels.POLICY_METRICS, rate)
    principles, others = labels.by_principles(held_out), [*labels.KINDS][1:]
    for k in ("1", "3", "all"):
        principles[k] |= {"reward": rate, "reward_all_less_these": difference}
    results = labels.tier1(held_out) | {
        "labels": {
            "reward": dict.fromkeys(labels.KINDS, rate),
            "reward_less_soft": dict.fromkeys(others, difference),
            "policy": dict.fromkeys(["base", *labels.KINDS], policy),
            "policy_less_soft": dict.fromkeys(["base", *others], dict.fromkeys(labels.POLICY_METRICS, difference)),
        },
        "principles": principles,
        "orders": labels.by_orders(held_out),
        "noise": {share: dict.fromkeys(("0", "0.3"), rate | {"less_clean": difference}) for share in ("0.5", "1")},
        "noise_for_pairs": [{"flipped": 0.3, "share": 0.5, **difference}],
        "abstention": labels.by_abstention(held_out),
        "train": labels.TRAIN,
        "cpu_seconds": 60.0,
        **labels.surroundings([], held_out, 5, labels.QUICK),
    }
    results["sizes"]["pairs_learned"] = [100, 110]
    findings_page.write_page(json.loads(json.dumps(results)), tmp_path / "findings.md")
    page = (tmp_path / "findings.md").read_text()
    for name in ("calibration", *findings_page.FIGURES):
        assert f"(findings/{name}.svg)" in page
        assert (tmp_path / "findings" / f"{name}.svg").stat().st_size > 1000
    assert "hard less soft, reward model: +0.0 points" in page
    assert "not distinguishable, so it does **not reproduce**" in page
    again = json.loads((tmp_path / "findings" / "results.json").read_text())
    findings_page.write_page(again, tmp_path / "again" / "findings.md")
    for path in sorted((tmp_path / "findings").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / "findings" / path.name).read_bytes()
    assert page == (tmp_path / "again" / "findings.md").read_text()
    assert again["sizes"]["seeds"] == 5
