"""Whether a judge is right as often as it says: reliability, expected calibration error, Brier score, temperature.

Everything is about the side that a judge prefers: its *confidence* max(p, 1 - p) against how often that side is the
better one. Which response is called *a* then makes no difference. Truth is the probability that *a* is better, 0.5 for
a tie: it counts half for either side.

- Expected calibration error (Naeini et al. 2015): the mean over bins of equal width, weighted by what is in them, of
  |mean confidence - share right|.
- Brier score: the mean of (p - truth)^2.
- Temperature (Guo et al. 2017, arXiv 1706.04599): T that maximises the likelihood of log-odds / T. What it is worth is
  measured on prompts that it was not fitted on.

Intervals are clustered by prompt or topic: those of errors resample whole clusters, that of accuracy is a `rate` of
`cai.maths.statistics`, which stays wide where clusters are few and says whether a judge can be told from chance. Noise
makes calibration errors larger on average: `ece_if_calibrated` says what a perfect judge would show with as many pairs,
and the interval begins at 0 where random signs of the clusters' gaps give as much in 5 %. Simulated coverage of the
nominal 95 % (50 to 1,000 pairs, alone or four alike; calibrated or up to three times too sure): 0.82 to 0.96, least
below 200.

Left out: other maps than temperature, which turn verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cai.feedback.explain import Evidence
from cai.feedback.labels import Bools, Floats, probability
from cai.feedback.truth import Kind, the_truth
from cai.feedback.votes import failed_pairs
from cai.maths.statistics import rate
from cai.storage.rows import HELD_OUT, stable_seed
from cai.text.errors import BadInput
from cai.text.tables import rate_text, table

BINS = 10
FOLDS = 5
TEMPERATURES = (0.05, 100.0)
"""Between these times the mean size of the log-odds T is looked for: a judge that is right in everything would have 0,
one that is right by chance infinity."""
RESAMPLES = 1000
SAID_BY = {"human": "what people chose", "oracle": "the world's oracle"}


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
    """Expected calibration error, 0 to 1: a judge that is sure and always wrong has 1."""
    sure, right = confidence(log_odds, truth)
    return _weighted_error(_bin_of(sure), sure - right, np.ones(len(sure)))


def error_if_calibrated(log_odds: Floats) -> float:
    """Mean calibration error that judges of these confidences show if right as often as they say: what n allows."""
    sure = probability(np.abs(log_odds))
    rng, number, every = np.random.default_rng(0), _bin_of(sure), np.ones(len(sure))
    drawn = (sure - (rng.random(len(sure)) < sure) for _ in range(RESAMPLES))
    return float(np.mean([_weighted_error(number, gap, every) for gap in drawn]))


def _bin_of(sure: Floats) -> NDArray[np.int64]:
    return np.minimum(((sure - 0.5) * 2 * BINS).astype(np.int64), BINS - 1)


def brier(log_odds: Floats, truth: Floats) -> float:
    """Mean squared error of the probability; 0.25 is what an even judge has."""
    return float(np.mean((probability(log_odds) - truth) ** 2))


def fit_temperature(log_odds: Floats, truth: Floats) -> float:
    """The T that makes the truth likeliest under log-odds / T, within `TEMPERATURES`; c times it for c * log-odds."""
    from scipy.optimize import minimize_scalar

    size = _size(log_odds)
    unit = log_odds / size

    def loss(log_t: float) -> float:
        x = unit / np.exp(log_t)
        return float(np.mean(truth * np.logaddexp(0, -x) + (1 - truth) * np.logaddexp(0, x)))

    low, high = np.log(TEMPERATURES)
    best = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4}).x
    return float(size * np.exp(best))


def _size(log_odds: Floats) -> float:
    """Mean of |log-odds| over those that are not even, on which T does not depend; 1 where all are."""
    uneven = np.abs(log_odds[log_odds != 0])
    return float(uneven.mean()) if uneven.size else 1.0


def held_out(log_odds: Floats, truth: Floats, clusters: Sequence[str], folds: int = FOLDS) -> Floats:
    """Each pair's log-odds divided by the temperature fitted on the clusters of the other folds.

    A cluster's fold is its place by hash, modulo `folds`: two clusters are never all in one. NaN where there is but one
    cluster, and thus no other to fit on.
    """
    names, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    scaled = np.full(len(log_odds), np.nan)
    if len(names) < 2:
        return scaled
    by_hash = sorted(range(len(names)), key=lambda i: stable_seed("calibration", str(names[i])))
    place = np.empty(len(names), dtype=np.int64)
    place[by_hash] = np.arange(len(names))
    fold = place[cluster] % folds
    for number in np.unique(fold):
        ours, rest = fold == number, fold != number
        scaled[ours] = log_odds[ours] / fit_temperature(log_odds[rest], truth[rest])
    return scaled


def fitted(sums: Floats, before: Floats, truth: Floats, clusters: Sequence[str], reserved: Bools) -> dict[str, Any]:
    """The T that makes the truth likeliest under sums / T, by the pairs that are not `reserved`; arrays are (pairs,).

    Measured on the reserved pairs, or, where there are none, on each prompt by the T of the others (`held_out`), beside
    `before`, the log-odds without it. What it is worth is None where one cluster is all there is.
    """
    temperature = fit_temperature(sums[~reserved], truth[~reserved])
    low, high = (bound * _size(sums[~reserved]) for bound in TEMPERATURES)
    if reserved.any():
        which, scaled = np.flatnonzero(reserved), sums[reserved] / temperature
    else:
        which, scaled = np.arange(len(sums)), held_out(sums, truth, clusters)
    is_measured = not np.isnan(scaled).any()
    return {
        "value": temperature,
        "at_bound": not low * 1.01 < temperature < high / 1.01,
        "bounds": [low, high],
        "pairs": int((~reserved).sum()),
        "prompts": len({clusters[i] for i in np.flatnonzero(~reserved).tolist()}),
        "measured_on": "held_out" if reserved.any() else "cross_validation",
        "measured_pairs": len(which),
        "ece": calibration_error(before[which], truth[which]),
        "ece_after_temperature": calibration_error(scaled, truth[which]) if is_measured else None,
        "brier": brier(before[which], truth[which]),
        "brier_after_temperature": brier(scaled, truth[which]) if is_measured else None,
    }


def measured(
    log_odds: Sequence[float], truth: Sequence[float], clusters: Sequence[str], failed: int = 0
) -> dict[str, Any]:
    """All of it, before and after temperature, with clustered 95 % intervals; `failed` pairs have no log-odds.

    `ece_if_calibrated` is the mean of what a judge of the same confidences that is right as often as it says would show
    with as many pairs. Figures after temperature have no value where all pairs are of one cluster.
    """
    x, y = np.asarray(log_odds, dtype=float), np.asarray(truth, dtype=float)
    scaled = held_out(x, y, clusters)
    names, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    size = {"n": len(x), "topics": len(names)}
    figures: dict[str, Any] = {}
    for name, odds in (("", x), ("_after_temperature", scaled)):
        if np.isnan(odds).any():
            figures |= {f"{what}{name}": {"value": None, **size, "interval": None} for what in ("ece", "brier")}
            continue
        sure, right = confidence(odds, y)
        number, gap = _bin_of(sure), sure - right
        value, interval = _bootstrap(partial(_weighted_error, number, gap), cluster)
        if value <= _noise(number, gap, cluster):
            interval[0] = 0.0
        figures[f"ece{name}"] = {"value": value, **size, "interval": interval}
        value, interval = _bootstrap(partial(_weighted_mean, (probability(odds) - y) ** 2), cluster)
        figures[f"brier{name}"] = {"value": value, **size, "interval": interval}
    return (
        {"accuracy": rate(confidence(x, y)[1].tolist(), clusters, missing=failed).as_json()}
        | figures
        | {
            "ece_if_calibrated": error_if_calibrated(x),
            "temperature": fit_temperature(x, y),
            "reliability": [asdict(each) for each in reliability(x, y, clusters)],
            "reliability_after_temperature": [
                asdict(each) for each in (reliability(scaled, y, clusters) if len(names) > 1 else [])
            ],
        }
    )


def of_labels(given: Evidence, kind: Kind | None = None) -> dict[str, Any]:
    """How far log-odds of a run, before they become hard or clamped labels, are what people or the oracle say.

    Measured on held-out prompts, where the truth is known of any. Pairs whose truth is unclear or a tie, and pairs
    without a label or exactly even, are counted and left out. Raises BadInput where no pair with a label is left.
    """
    sides = given.sides()
    try:
        truth = the_truth(given.rows, kind)
    except BadInput as error:
        raise BadInput(f"{given.name}: {error}") from None
    held = np.array([HELD_OUT in row["tags"] for row in given.rows], dtype=bool)
    on_held_out = bool((held & truth.decided).any())
    among = held | (not on_held_out)
    asked = among & (sides != 0)
    kept = np.flatnonzero(asked & truth.decided)
    if not kept.size:
        raise BadInput(f"{given.name}: no pair whose truth is known has a label")
    topics = given.topics
    clusters = [topics[i] for i in kept.tolist()]
    measured_on = "held_out" if on_held_out else "all"
    failed = failed_pairs(given.stages, truth.kind, measured_on)
    found = measured(sides[kept].tolist(), truth.better[kept].tolist(), clusters, failed)
    return {
        "name": given.name,
        "truth": truth.kind,
        "measured_on": measured_on,
        "left_out": {
            "unclear": int((asked & truth.unclear).sum()),
            "ties": int((asked & (truth.better == 0.5)).sum()),
            "no_label": int((truth.decided & among & (sides == 0)).sum()),
            "not_judged": failed,
        },
        "against_chance": against_chance(*found["accuracy"]["interval"]),
        "stage_temperature": given.rule.temperature,
        "stage_temperature_fitted": given.rule.fitted,
    } | found


def against_chance(low: float, high: float) -> str:
    """What the 95 % interval of an accuracy allows to say."""
    if low <= 0.5 <= high:
        return "not distinguishable from chance"
    return "better than chance" if low > 0.5 else "worse than chance"


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The figures, and confidence against how often it was right."""
    names = ["accuracy", "ece", "ece_after_temperature", "brier", "brier_after_temperature"]
    left_out = found["left_out"]
    yield (
        f"{found['name']}: {found['accuracy']['n']:,} labels on {found['measured_on'].replace('_', ' ')} prompts "
        f"against {SAID_BY[found['truth']]}; left out: {left_out['unclear']:,} unclear, {left_out['ties']:,} ties, "
        f"{left_out['no_label']:,} without a label, {left_out['not_judged']:,} not judged"
    )
    yield f"the judge is {found['against_chance']}"
    rows = [[name.replace("_", " "), rate_text(found[name])] for name in names]
    rows.insert(2, ["ece if calibrated", f"{found['ece_if_calibrated']:.2f}"])
    yield from table(["", "value [95 %]"], rows)[1:]
    now = found["stage_temperature"]
    instead = (
        f"{now * found['temperature']:.2g} instead of {now:g}" if now else "which is a sum of weights for each pair"
    )
    yield f"temperature that fits best: {found['temperature']:.2f} times the stage's own, {instead}"
    if found["brier_after_temperature"]["value"] is None:
        yield "all pairs are of one prompt or topic, so that no temperature can be tried on others"
    elif found["stage_temperature_fitted"] and found["measured_on"] == "all":
        yield "the stage's own was fitted on these prompts; figures after temperature are of others"
    yield ""
    rows = [
        [f"{each['low']:.2f} to {each['high']:.2f}", str(each["n"]), f"{each['confidence']:.2f}",
         rate_text({"value": each["right"], "interval": each["interval"]})]
        for each in found["reliability"]
    ]  # fmt: skip
    yield from table(["confidence", "pairs", "mean", "right"], rows)


def _weighted_error(number: NDArray[np.int64], gap: Floats, weights: Floats) -> float:
    """Expected calibration error of rows by weight; `number` is their bin, `gap` how far confidence exceeds right."""
    return float(np.abs(np.bincount(number, gap * weights)).sum() / weights.sum())


def _noise(number: NDArray[np.int64], gap: Floats, cluster: NDArray[np.int64]) -> float:
    """What a calibration error without cause stays below in 95 %: each cluster's gaps get a random sign (Liu 1988)."""
    rng, n, every = np.random.default_rng(0), int(cluster.max()) + 1, np.ones(len(gap))
    signs = (rng.choice([-1.0, 1.0], n)[cluster] for _ in range(RESAMPLES))
    return float(np.quantile([_weighted_error(number, gap * sign, every) for sign in signs], 0.95))


def _weighted_mean(values: Floats, weights: Floats) -> float:
    return float(np.average(values, weights=weights))


def _bootstrap(figure: Callable[[Floats], float], cluster: NDArray[np.int64]) -> tuple[float, list[float]]:
    """A figure of rows by their weights, and its basic bootstrap interval (Davison and Hinkley 1997, section 5.2).

    That is 2 v - q for the quantiles q over resamples of whole clusters, since noise lifts these above the value v as
    it lifts v above the truth; within [0, 1], and wide enough to hold v.
    """
    rng = np.random.default_rng(0)
    n = int(cluster.max()) + 1
    value = figure(np.ones(len(cluster)))
    drawn = (np.bincount(rng.integers(n, size=n), minlength=n)[cluster].astype(float) for _ in range(RESAMPLES))
    low, high = np.quantile([figure(weights) for weights in drawn], [0.025, 0.975]).tolist()
    return value, [max(0.0, min(value, 2 * value - high)), min(1.0, max(value, 2 * value - low))]
