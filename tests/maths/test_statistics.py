"""Intervals keep what they promise, by simulation and against textbook formulas and published figures."""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, t
from shared_data import SHARED_DATA

from cai.maths import statistics

outcomes = st.sampled_from([0.0, 0.5, 1.0])
columns = st.lists(st.tuples(outcomes, outcomes, st.sampled_from("abcdefgh")), min_size=1, max_size=60)


def clustered_sums(p: float, rho: float, sizes: np.ndarray, repeats: int, seed: int) -> np.ndarray:
    """Successes a topic, (repeats, topics): beta-binomial with mean p and intra-class correlation rho."""
    generator = np.random.default_rng(seed)
    shape = (repeats, len(sizes))
    if rho == 0:
        p_topic = np.full(shape, p)
    elif rho == 1:
        p_topic = (generator.random(shape) < p).astype(float)
    else:
        p_topic = generator.beta(p * (1 - rho) / rho, (1 - p) * (1 - rho) / rho, shape)
    return generator.binomial(sizes, p_topic)


@pytest.mark.parametrize("topics", [5, 12, 40, 200])
@pytest.mark.parametrize("p", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("rho", [0.0, 0.1, 0.5, 1.0])
def test_interval_covers_the_truth_whatever_topics_share(p: float, rho: float, topics: int) -> None:
    uneven = np.maximum(1, np.round(8 * np.exp(np.random.default_rng(topics).normal(0, 0.6, topics)))).astype(int)
    for sizes in (np.full(topics, 8), uneven):
        sums = clustered_sums(p, rho, sizes, 3000, seed=topics)
        low, high = statistics.score_interval(sums, sums.sum(-1), sizes)
        coverage = float(((low <= p) & (p <= high)).mean())
        assert coverage >= (0.93 if topics > 5 and rho < 1 else 0.89), (coverage, sizes)


def log_normal_sizes(topics: int, sigma: float, seed: int) -> np.ndarray:
    """Rows of each topic, around 8."""
    drawn = 8 * np.exp(np.random.default_rng(1000 * seed + topics).normal(0, sigma, topics))
    return np.maximum(1, np.round(drawn)).astype(int)


UNEQUAL_SIZES = {
    "one of 100 among twos": np.array([100] + [2] * 199),
    **{f"sigma 1, {topics}": log_normal_sizes(topics, 1.0, seed=0) for topics in (40, 200)},
    **{f"sigma 1.5, {topics}": log_normal_sizes(topics, 1.5, seed=1) for topics in (40, 200)},
    **{f"sigma 2, {topics}": log_normal_sizes(topics, 2.0, seed=1) for topics in (40, 200)},
}


@pytest.mark.parametrize("sizes", UNEQUAL_SIZES.values(), ids=UNEQUAL_SIZES)
@pytest.mark.parametrize("p", [0.02, 0.2, 0.5, 0.98])
def test_interval_covers_the_truth_where_some_topics_are_much_larger(p: float, sizes: np.ndarray) -> None:
    repeats = 3000
    assert sizes.sum() ** 2 / (sizes**2).sum() > 10, "effective topics"
    for rho in (0.0, 0.5, 1.0):
        sums = clustered_sums(p, rho, sizes, repeats, seed=len(sizes))
        low, high = statistics.score_interval(sums, sums.sum(-1), sizes)
        coverage = float(((low <= p) & (p <= high)).mean())
        assert coverage >= 0.93 - 2 * (0.93 * 0.07 / repeats) ** 0.5, (coverage, rho)


@pytest.mark.parametrize("name", ["sigma 1, 40", "sigma 1.5, 40", "sigma 2, 40"])
def test_differences_and_lengths_cover_the_truth_where_some_topics_are_much_larger(name: str) -> None:
    """Half of the pairs are ties, a third are won; lengths are Gaussian with half of their variance between topics."""
    sizes = UNEQUAL_SIZES[name]
    generator = np.random.default_rng(0)
    repeats = 200
    topics = np.repeat(np.arange(len(sizes)), sizes)
    clusters = [str(topic) for topic in topics]
    counts = {"difference": 0, "length": 0}
    for _ in range(repeats):
        by_topic = generator.dirichlet([1 / 3, 1 / 2, 1 / 6], len(sizes)).cumsum(axis=1)[topics]
        outcomes = (generator.random((len(topics), 1)) < by_topic).sum(axis=1) - 1  # 2 where a won, 1 for a tie
        won, lost = (outcomes == 2).astype(float), (outcomes == 0).astype(float)
        low, high = statistics.paired_difference(list(won), list(lost), clusters).interval
        counts["difference"] += low <= 1 / 3 - 1 / 6 <= high
        lengths = generator.normal(0, 1, len(sizes))[topics] + generator.normal(0, 1, len(topics))
        low, high = statistics.mean(list(lengths), clusters).interval
        counts["length"] += low <= 0 <= high
    assert min(counts.values()) / repeats >= 0.93 - 2 * (0.93 * 0.07 / repeats) ** 0.5, counts


@pytest.mark.parametrize("sizes", [np.full(12, 8), log_normal_sizes(40, 1.0, seed=0)], ids=["12 equal", "sigma 1, 40"])
def test_means_of_skewed_values_cover_the_truth(sizes: np.ndarray) -> None:
    """Log-normal values with half of the variance of their logarithm between topics."""
    generator = np.random.default_rng(0)
    repeats, variance = 400, 1.0
    topics = np.repeat(np.arange(len(sizes)), sizes)
    clusters = [str(topic) for topic in topics]
    n_covered = 0
    for _ in range(repeats):
        logs = generator.normal(0, 1, len(sizes))[topics] + generator.normal(0, 1, len(topics))
        low, high = statistics.mean(list(np.exp(logs * (variance / 2) ** 0.5)), clusters).interval
        n_covered += low <= np.exp(variance / 2) <= high
    assert n_covered / repeats >= 0.9 - 2 * (0.9 * 0.1 / repeats) ** 0.5, n_covered


@given(st.lists(st.integers(1, 60), min_size=2, max_size=8), st.floats(0, 1))
def test_degrees_of_freedom_are_those_of_the_covariance_matrix(rows: list[int], rho: float) -> None:
    sizes = np.array(rows, dtype=float)
    topics = np.repeat(np.arange(len(rows)), rows)
    n = len(topics)
    covariance = np.where(topics[:, None] == topics[None, :], rho, 0.0) + (1 - rho) * np.eye(n)
    sums = (topics == np.arange(len(rows))[:, None]).astype(float)
    residual_sums = sums @ (np.eye(n) - 1 / n) / np.sqrt(1 - sizes / n)[:, None]
    of_sums = residual_sums @ covariance @ residual_sums.T
    expected = max(1.0, np.trace(of_sums) ** 2 / (of_sums**2).sum())
    assert statistics.degrees_of_freedom(sizes, np.float64(rho)) == pytest.approx(expected)
    equal = statistics.degrees_of_freedom(np.full(len(rows), sizes[0]), np.float64(rho))
    assert equal == pytest.approx(len(rows) - 1)


def test_interval_is_not_so_wide_as_to_say_nothing() -> None:
    sizes = np.full(40, 8)
    sums = clustered_sums(0.5, 0.1, sizes, 500, seed=1)
    low, high = statistics.score_interval(sums, sums.sum(-1), sizes)
    exact = 2 * 1.96 * np.sqrt(0.25 * (1 + 7 * 0.1) / 320)
    assert exact < (high - low).mean() < 1.25 * exact


def test_paired_differences_cover_no_difference() -> None:
    generator = np.random.default_rng(3)
    clusters = [f"t{i // 6}" for i in range(120)]
    wrong = 0
    for _ in range(400):
        topic = np.repeat(generator.random(20), 6)
        a, b = ((generator.random(120) < topic).astype(float) for _ in range(2))
        wrong += statistics.paired_difference(list(a), list(b), clusters).verdict != "not distinguishable"
    assert wrong <= 0.07 * 400


def test_independent_rows_give_wilsons_interval_with_t_for_z() -> None:
    values = [1.0] * 61 + [0.0] * 139
    level = 2 * t.cdf(1.959963984540054, 199) - 1  # the level at which t's quantile is the normal 97.5 % one
    ours = statistics.rate(values, level=level).interval
    wilson = binomtest(61, 200).proportion_ci(0.95, method="wilson")
    assert ours == pytest.approx((wilson.low, wilson.high), abs=1e-12)


def test_topics_that_agree_within_themselves_count_once_each() -> None:
    topics = [f"t{i}" for i in range(30) for _ in range(10)]
    values = [float(i % 2) for i in range(30) for _ in range(10)]
    by_topic = statistics.rate([float(i % 2) for i in range(30)]).interval
    assert statistics.rate(values, topics).interval == pytest.approx(by_topic, abs=1e-12)


def test_no_event_at_all_still_has_an_interval() -> None:
    nothing = statistics.rate([0.0] * 40, [f"t{i // 8}" for i in range(40)])
    everything = statistics.rate([1.0] * 40, [f"t{i // 8}" for i in range(40)])
    assert nothing.interval[0] == 0.0
    assert 0.5 < nothing.interval[1] < 0.7
    assert everything.interval == pytest.approx((1 - nothing.interval[1], 1.0))


def test_one_topic_or_no_row_tells_nothing() -> None:
    assert statistics.rate([1.0, 1.0, 0.0], ["same"] * 3).interval == (0.0, 1.0)
    assert statistics.rate([]).as_json() == {"value": None, "n": 0, "topics": 0, "interval": [0.0, 1.0]}
    assert statistics.paired_difference([1.0], [0.0]).verdict == "not distinguishable"


def test_bad_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        statistics.rate([2.0])
    with pytest.raises(ValueError, match="2 rows and 1 clusters"):
        statistics.rate([1.0, 0.0], ["a"])
    with pytest.raises(ValueError, match="missing"):
        statistics.rate([float("nan")])
    with pytest.raises(ValueError, match="same rows"):
        statistics.paired_difference([1.0], [])


@settings(deadline=None)
@given(columns, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter_to_the_last_bit(rows, shuffler):
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    results = []
    for ordered in (rows, shuffled):
        a, b, clusters = (list(column) for column in zip(*ordered, strict=True))
        results.append((statistics.rate(a, clusters), statistics.paired_difference(a, b, clusters)))
    assert results[0] == results[1]


@settings(deadline=None)
@given(columns)
def test_intervals_hold_their_value_and_mirror(rows: list[tuple[float, float, str]]) -> None:
    a, b, clusters = (list(column) for column in zip(*rows, strict=True))
    rate = statistics.rate(a, clusters)
    assert rate.value is not None
    assert 0 <= rate.interval[0] <= rate.value <= rate.interval[1] <= 1
    low, high = statistics.rate([1 - x for x in a], clusters).interval
    assert (1 - high, 1 - low) == pytest.approx(rate.interval, abs=1e-9)
    ours, theirs = (statistics.paired_difference(*pair, clusters) for pair in ((a, b), (b, a)))
    assert theirs.interval == pytest.approx((-ours.interval[1], -ours.interval[0]), abs=1e-9)
    assert {ours.verdict, theirs.verdict} in ({"a better", "b better"}, {"not distinguishable"})
    if ours.verdict != "not distinguishable":
        assert ours.interval[0] > 0 or ours.interval[1] < 0


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_never_more_lenient_than_one_test_and_never_more_strict_than_bonferroni(p: list[float]) -> None:
    for raw, adjusted in zip(p, statistics.holm(p), strict=True):
        assert raw <= adjusted <= min(1.0, raw * len(p)) + 1e-15


def test_holm_on_a_worked_example() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_an_additive_position_bias_does_not_decide_who_wins() -> None:
    for bias in (-3.0, 0.0, 3.0):
        assert statistics.outcome(0.4 + bias, 0.4 - bias) == 1.0
        assert statistics.outcome(-0.4 + bias, -0.4 - bias) == 0.0
        assert statistics.outcome(0.05 + bias, -0.01 - bias, tie_below=0.1) == 0.5


def test_a_win_rate_counts_a_tie_half() -> None:
    result = statistics.win_rate([1.0, 1.0, 0.5, 0.0], ["a", "b", "c", "d"])
    assert (result.wins, result.ties, result.losses) == (2, 1, 1)
    assert result.rate.value == 0.625
    assert result.verdict == "not distinguishable"
    assert statistics.win_rate([1.0] * 30).verdict == "a better"
    assert statistics.win_rate([0.5] * 30).verdict == "not distinguishable"


def standard_error(values: list[float], clusters: list[str] | None = None) -> float:
    """The standard error of the mean, from the width of its interval."""
    estimate = statistics.mean(values, clusters)
    low, high = estimate.interval
    return (high - low) / 2 / float(t.ppf(0.975, estimate.topics - 1))


def test_standard_error_of_topics_is_the_formula_by_hand() -> None:
    # Sums of residuals: topic a 1 - 2 * 0.4, topic b 1 - 3 * 0.4.
    by_hand = (0.2**2 / (1 - 2 / 5) + (-0.2) ** 2 / (1 - 3 / 5)) ** 0.5 / 5
    assert standard_error([1, 0, 1, 0, 0], list("aabbb")) == pytest.approx(by_hand)


def test_mean_of_lengths_is_students_interval() -> None:
    values = [3.0, 5.0, 8.0, 4.0]
    estimate = statistics.mean(values)
    reach = t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    assert estimate.interval == pytest.approx((5 - reach, 5 + reach))
    with pytest.raises(ValueError, match="two clusters"):
        statistics.mean(values, ["one"] * 4)


def test_win_rates_equal_the_published_leaderboard() -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared data folder is absent")
    preferred: dict[str, list[float]] = defaultdict(list)
    with gzip.open(SHARED_DATA / "alpaca_eval_preferences.csv.gz", "rt", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            preferred[row["model"]].append(float(row["p_model_preferred"]))
    with (SHARED_DATA / "alpaca_eval_leaderboard.csv").open(encoding="utf-8") as lines:
        board = {row["model"]: row for row in csv.DictReader(lines)}
    assert board.keys() == preferred.keys()
    for model, outcomes in preferred.items():
        result = statistics.win_rate(outcomes)
        assert result.rate.value is not None
        assert 100 * result.rate.value == pytest.approx(float(board[model]["win_rate"]), abs=1e-3)
        error = standard_error(outcomes)
        assert error == pytest.approx(np.std(outcomes, ddof=1) / len(outcomes) ** 0.5)
        if published := board[model]["standard_error"]:  # the copy here leaves the column empty
            assert 100 * error == pytest.approx(float(published), abs=1e-3)


def test_the_share_of_distinct_texts_is_not_a_mean_over_rows() -> None:
    topics = [f"topic {n // 4}" for n in range(40)]
    different = statistics.distinct_share([str(n) for n in range(40)], topics)
    assert (different.value, different.n, different.topics, different.interval[1]) == (1.0, 40, 10, 1.0)
    assert 0.5 < different.interval[0] < 1
    repeated = statistics.distinct_share(["same"] * 40, topics)
    assert repeated.value == 1 / 40
    assert repeated.interval[0] <= 1 / 40 <= repeated.interval[1] < 0.3
    by_topic = statistics.distinct_share(topics, topics)
    assert by_topic.value == 10 / 40
    assert statistics.distinct_share(["a", "b"], ["x", "x"]).interval == (0.0, 1.0)
    assert statistics.distinct_share([], []).value is None


def test_the_interval_of_distinct_texts_covers_what_new_topics_give() -> None:
    rng = np.random.default_rng(0)

    def sampled_share() -> statistics.Rate:
        """30 topics of 4 texts; a topic repeats itself or does not."""
        texts, topics = [], []
        for topic in range(30):
            same = rng.random() < 0.5
            texts += [f"{topic}/{0 if same else number}" for number in range(4)]
            topics += [f"{topic}"] * 4
        return statistics.distinct_share(texts, topics)

    truth = 0.5 + 0.5 / 4
    covers = [low <= truth <= high for low, high in (sampled_share().interval for _ in range(300))]
    assert 0.9 < sum(covers) / len(covers) <= 1


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=20), st.lists(st.sampled_from([0.0, 1.0]), max_size=5))
def test_worst_cases_hold_whatever_the_missing_rows_turn_out_to_be(values: list[float], missing: list[float]) -> None:
    low, high = statistics.rate(values, missing=len(missing)).bounds
    complete = statistics.rate(values + missing).value
    if complete is not None:
        assert low - 1e-9 <= complete <= high + 1e-9
