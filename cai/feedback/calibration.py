"""Whether a judge is right as often as it says: reliability, expected calibration error, Brier score, temperature.

Everything is about the side that a judge prefers: its *confidence* max(p, 1 - p) against how often that side is the
better one. Which response is called *a* then makes no difference. Truth is the probability that *a* is better, 0.5 for
a tie: it counts half for either side.

- Expected calibration error (Naeini et al. 2015): the mean over bins of equal width, weighted by what is in them, of
  |mean confidence - share right|.
- Brier score: the mean of (p - truth)^2.
- Temperature (Guo et al. 2017, arXiv 1706.04599): T that maximises the likelihood of log-odds / T. What it is worth is
  measured on prompts that it was not fitted on.

Intervals resample whole prompts or topics, never rows. Left out: other maps than temperature, which turn verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cai.errors import BadInput
from cai.feedback.explain import Evidence
from cai.feedback.labels import Floats, probability
from cai.records import HELD_OUT, TOPIC, stable_seed
from cai.statistics import rate
from cai.tables import rate_text, table

BINS = 10
FOLDS = 5
TEMPERATURES = (0.05, 100.0)
"""Between these T is looked for: a judge that is right in everything would have 0."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Bin:
    """Pairs of like confidence."""

    low: float
    high: float
    n: int
    confidence: float
    """Their mean."""
    right: float
    """How often the preferred side is the better one."""
    interval: tuple[float, float]
    """95 % of it, clustered."""


def confidence(log_odds: Floats, truth: Floats) -> tuple[Floats, Floats]:
    """max(p, 1 - p) of each pair, and how far the preferred side is the better one; an even judge is half right."""
    p = probability(np.abs(log_odds))
    right = np.where(log_odds > 0, truth, np.where(log_odds < 0, 1 - truth, 0.5))
    return p, right


def reliability(log_odds: Floats, truth: Floats, clusters: Sequence[str]) -> list[Bin]:
    """Bins of equal width from 0.5 to 1; empty ones are left out."""
    sure, right = confidence(log_odds, truth)
    edges = np.linspace(0.5, 1.0, BINS + 1).tolist()
    number = _bin_of(sure)
    found = []
    for i in np.unique(number).tolist():
        here = np.flatnonzero(number == i)
        share = rate(right[here].tolist(), [clusters[row] for row in here.tolist()])
        found.append(
            Bin(edges[i], edges[i + 1], len(here), float(sure[here].mean()), float(right[here].mean()), share.interval)
        )
    return found


def calibration_error(log_odds: Floats, truth: Floats) -> float:
    """Expected calibration error, 0 to 0.5."""
    sure, right = confidence(log_odds, truth)
    return float(np.abs(np.bincount(_bin_of(sure), sure - right)).sum() / len(sure))


def _bin_of(sure: Floats) -> NDArray[np.int64]:
    return np.minimum(((sure - 0.5) * 2 * BINS).astype(np.int64), BINS - 1)


def brier(log_odds: Floats, truth: Floats) -> float:
    """Mean squared error of the probability; 0.25 is what an even judge has."""
    return float(np.mean((probability(log_odds) - truth) ** 2))


def fit_temperature(log_odds: Floats, truth: Floats) -> float:
    """The T that makes the truth likeliest under log-odds / T, within `TEMPERATURES`."""
    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        x = log_odds / np.exp(log_t)
        return float(np.mean(truth * np.logaddexp(0, -x) + (1 - truth) * np.logaddexp(0, x)))

    low, high = np.log(TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4}).x))


def held_out(log_odds: Floats, truth: Floats, clusters: Sequence[str], folds: int = FOLDS) -> Floats:
    """Each pair's log-odds divided by the temperature fitted on the clusters of the other folds.

    A hash of its cluster decides a pair's fold, so that adding pairs moves none of the others.
    """
    fold = np.array([stable_seed("calibration", cluster) % folds for cluster in clusters])
    scaled = np.array(log_odds, dtype=float)
    for number in np.unique(fold):
        ours, rest = fold == number, fold != number
        scaled[ours] = log_odds[ours] / (fit_temperature(log_odds[rest], truth[rest]) if rest.any() else 1.0)
    return scaled


def measured(log_odds: Sequence[float], truth: Sequence[float], clusters: Sequence[str]) -> dict[str, Any]:
    """All of it, before and after temperature, with 95 % intervals from resampled clusters."""
    x, y = np.asarray(log_odds, dtype=float), np.asarray(truth, dtype=float)
    scaled = held_out(x, y, clusters)
    statistics: Mapping[str, Callable[[NDArray[np.int64]], float]] = {
        "accuracy": lambda rows: float(confidence(x[rows], y[rows])[1].mean()),
        "ece": lambda rows: calibration_error(x[rows], y[rows]),
        "brier": lambda rows: brier(x[rows], y[rows]),
        "ece_after_temperature": lambda rows: calibration_error(scaled[rows], y[rows]),
        "brier_after_temperature": lambda rows: brier(scaled[rows], y[rows]),
    }
    resampled = _resampled(clusters)
    everything = np.arange(len(x))
    return {
        name: {
            "value": statistic(everything),
            "n": len(x),
            "topics": len(set(clusters)),
            "interval": np.quantile([statistic(rows) for rows in resampled], [0.025, 0.975]).tolist(),
        }
        for name, statistic in statistics.items()
    } | {
        "temperature": fit_temperature(x, y),
        "reliability": [asdict(each) for each in reliability(x, y, clusters)],
        "reliability_after_temperature": [asdict(each) for each in reliability(scaled, y, clusters)],
    }


def of_labels(given: Evidence) -> dict[str, Any]:
    """How far log-odds of a run, before they become hard or clamped labels, are what the world's oracle says.

    Measured on held-out prompts, where there are any.

    Pairs that it cannot read, or scores alike, are counted and left out. Raises BadInput where none is left.
    """
    from cai.micro.oracle import gold_score

    sides = given.sides()
    held = [HELD_OUT in row["tags"] for row in given.rows]
    of_world = [any(tag.startswith(TOPIC) for tag in row["tags"]) for row in given.rows]
    asked = [i for i in range(len(held)) if of_world[i] and sides[i] != 0 and (held[i] or not any(held))]
    kept, truth, left_out = [], [], {"unclear": 0, "ties": 0}
    for i in asked:
        a, b = (gold_score(given.rows[i]["prompt"], given.rows[i][side]["text"]) for side in "ab")
        if a is None or b is None:
            left_out["unclear"] += 1
        elif a == b:
            left_out["ties"] += 1
        else:
            kept.append(i)
            truth.append(float(a > b))
    if not kept:
        raise BadInput(f"{given.name}: no pair of this run has a known truth; that takes prompts of source micro")
    topics = given.topics
    return {
        "name": given.name,
        "measured_on": "held_out" if any(held) else "all",
        "left_out": left_out,
        "stage_temperature": given.rule.temperature,
    } | measured(sides[kept].tolist(), truth, [topics[i] for i in kept])


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The figures, and confidence against how often it was right."""
    names = ["accuracy", "ece", "ece_after_temperature", "brier", "brier_after_temperature"]
    yield (
        f"{found['name']}: {found['accuracy']['n']:,} labels on {found['measured_on'].replace('_', ' ')} prompts; left "
        f"out: {found['left_out']['unclear']} unclear, {found['left_out']['ties']} ties"
    )
    yield from table(["", "value [95 %]"], [[name.replace("_", " "), rate_text(found[name])] for name in names])[1:]
    now = found["stage_temperature"]
    instead = (
        f"{now * found['temperature']:.2g} instead of {now:g}" if now else "which is a sum of weights for each pair"
    )
    yield f"temperature that fits best: {found['temperature']:.2f} times the stage's own, {instead}"
    yield ""
    rows = [
        [f"{each['low']:.2f} to {each['high']:.2f}", str(each["n"]), f"{each['confidence']:.2f}",
         rate_text({"value": each["right"], "interval": each["interval"]})]
        for each in found["reliability"]
    ]  # fmt: skip
    yield from table(["confidence", "pairs", "mean", "right"], rows)


def _resampled(clusters: Sequence[str]) -> list[NDArray[np.int64]]:
    """Rows of as many clusters drawn with replacement, time and again."""
    names = np.asarray(clusters)
    rows = [np.flatnonzero(names == name) for name in sorted(set(clusters))]
    rng = np.random.default_rng(0)
    return [np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))]) for _ in range(RESAMPLES)]
