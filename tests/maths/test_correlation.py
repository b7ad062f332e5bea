"""Correlations about zero: against a second writing, their intervals' coverage, and where nothing can be said."""

from __future__ import annotations

import numpy as np
import pytest

from cai.maths.correlation import correlation_about_zero


def test_the_value_is_that_of_a_plain_loop_and_keeps_when_a_pair_is_turned_round() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 1, 40), rng.normal(0, 1, 40)
    topics = np.arange(40) // 2
    first = correlation_about_zero(x, y, topics)
    assert first is not None
    assert first.value == pytest.approx(sum(x * y) / (sum(x * x) * sum(y * y)) ** 0.5)
    sign = np.where(np.arange(40) % 3 == 0, -1.0, 1.0)
    turned = correlation_about_zero(x * sign, y * sign, topics)
    assert (turned.value, turned.interval) == (pytest.approx(first.value), pytest.approx(first.interval))


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_intervals_hold_the_truth_as_often_as_they_say(correlation: float) -> None:
    """12 topics of 4 pairs whose votes correlate within the topic by one half."""
    rng = np.random.default_rng(1)
    topics = np.repeat(np.arange(12), 4)
    n_runs, n_held = 400, 0
    for _ in range(n_runs):
        x, noise = (
            np.sqrt(0.5) * (rng.normal(size=(12, 1)) + rng.normal(size=(12, 4))).ravel() for _ in range(2)
        )  # fmt: skip
        y = correlation * x + np.sqrt(1 - correlation**2) * noise
        low, high = correlation_about_zero(x, y, topics).interval
        n_held += low <= correlation <= high
    error_of_simulation = 3 * (0.95 * 0.05 / n_runs) ** 0.5
    assert n_held / n_runs > 0.93 - error_of_simulation
    assert n_held < n_runs, "no interval misses: they are too wide"


def test_what_one_topic_alone_says_is_nothing() -> None:
    x = np.array([1.0, 2.0, -1.0])
    assert correlation_about_zero(x, x, np.zeros(3, dtype=int)).interval == (-1.0, 1.0)
    held_by_one = np.array([1.0, 0.0, 0.0])
    assert correlation_about_zero(held_by_one, x, np.arange(3)).interval == (-1.0, 1.0)
    assert correlation_about_zero(np.zeros(3), x, np.arange(3)) is None
    assert correlation_about_zero(np.zeros(0), np.zeros(0), np.zeros(0, dtype=int)) is None
