"""Whether the labels of a run are right as often as they say: calibration figures with intervals, temperatures.

The formulas are in `cai.maths.calibration`. The value of a temperature is measured on prompts that it was not fitted
on. Intervals are clustered by prompt or topic: those of errors resample whole clusters, that of accuracy is a `rate` of
`cai.maths.statistics`, which stays wide where clusters are few and shows whether a judge differs from chance.

Left out: calibration maps other than a temperature, since they can change verdicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypedDict

import numpy as np

from cai.feedback.labelled_votes import LabelledVotes
from cai.feedback.truth import MeasuredOn, TruthKind, choose_truth, n_failed_pairs
from cai.maths import calibration
from cai.maths.chance import AgainstChance, against_chance
from cai.maths.statistics import RateFigure, rate
from cai.maths.vote_aggregation import Bools, Floats, sigmoid
from cai.storage.rows import is_held_out, stable_seed
from cai.text.errors import BadInput
from cai.text.formatting import wrapped
from cai.text.tables import rate_text, table

N_FOLDS = 5
TRUTH_SOURCES: Mapping[TruthKind, str] = {"human": "what people chose", "oracle": "the world's oracle"}


ErrorFigures = dict[str, Any]
"""Keys `value`, `n`, `topics` and `interval`, 95 %; no value and interval where it cannot be measured."""


class CalibrationFigures(TypedDict):
    """Figures before and after temperature. Those after it have no value where all pairs are of one cluster."""

    accuracy: RateFigure
    ece: ErrorFigures
    brier: ErrorFigures
    ece_after_temperature: ErrorFigures
    brier_after_temperature: ErrorFigures
    ece_if_calibrated: float
    """Mean calibration error of judges with these confidences that are right as often as they say."""
    temperature: float
    reliability: list[dict[str, Any]]
    reliability_after_temperature: list[dict[str, Any]]


class LabelCalibration(CalibrationFigures):
    """Calibration of a run's labels against a known truth."""

    name: str
    truth: TruthKind
    measured_on: MeasuredOn
    left_out: dict[str, int]
    """Pairs that are not measured, by reason."""
    against_chance: AgainstChance
    stage_temperature: float | None
    stage_temperature_fitted: bool
    stage_points_per_nat: float | None
    """None where no judge rates."""
    stage_points_per_nat_fitted: bool


@dataclass(frozen=True)
class FittedDivisor:
    """A fitted temperature or number of points per nat, and errors before and after dividing by it, on pairs that it
    was not fitted on."""

    truth: TruthKind
    value: float
    at_bound: bool
    bounds: list[float]
    pairs: int
    """Pairs that it was fitted on."""
    prompts: int
    """Clusters of these pairs."""
    measured_on: str
    """held_out, or cross_validation where no pair is held out."""
    measured_pairs: int
    ece_before: float
    ece_after: float | None
    """None where all pairs are of one cluster."""
    brier_before: float
    brier_after: float | None


def cross_validated_log_odds(log_odds: Floats, truth: Floats, clusters: Sequence[str]) -> Floats:
    """Each pair's log-odds divided by the temperature fitted on the clusters of the other folds.

    The fold of a cluster is its rank by hash modulo `N_FOLDS`, so that no fold holds all clusters. All values are NaN
    where there is only one cluster, since no other is left to fit on.
    """
    names, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    scaled = np.full(len(log_odds), np.nan)
    if len(names) < 2:
        return scaled
    by_hash = sorted(range(len(names)), key=lambda i: stable_seed("calibration", str(names[i])))
    rank = np.empty(len(names), dtype=np.int64)
    rank[by_hash] = np.arange(len(names))
    fold = rank[cluster] % N_FOLDS
    for number in np.unique(fold):
        inside, outside = fold == number, fold != number
        scaled[inside] = log_odds[inside] / calibration.fit_temperature(log_odds[outside], truth[outside])
    return scaled


def fit_and_measure_divisor(
    kind: TruthKind, sums: Floats, log_odds: Floats, truth: Floats, clusters: Sequence[str], held_out: Bools
) -> FittedDivisor:
    """The T that makes the truth likeliest under sums / T on the pairs that are not `held_out`; all are (pairs,).

    Its errors are measured on the held-out pairs, or, where there are none, by cross-validation. The errors without it
    are those of `log_odds`.
    """
    fitted_sums = sums[~held_out]
    temperature = calibration.fit_temperature(fitted_sums, truth[~held_out])
    low, high = calibration.temperature_bounds(fitted_sums)
    if held_out.any():
        rows, scaled = np.flatnonzero(held_out), sums[held_out] / temperature
    else:
        rows, scaled = np.arange(len(sums)), cross_validated_log_odds(sums, truth, clusters)
    is_measured = not np.isnan(scaled).any()
    return FittedDivisor(
        truth=kind,
        value=temperature,
        at_bound=not low * 1.01 < temperature < high / 1.01,
        bounds=[low, high],
        pairs=len(fitted_sums),
        prompts=len({clusters[row] for row in np.flatnonzero(~held_out).tolist()}),
        measured_on="held_out" if held_out.any() else "cross_validation",
        measured_pairs=len(rows),
        ece_before=calibration.calibration_error(log_odds[rows], truth[rows]),
        ece_after=calibration.calibration_error(scaled, truth[rows]) if is_measured else None,
        brier_before=calibration.brier_score(log_odds[rows], truth[rows]),
        brier_after=calibration.brier_score(scaled, truth[rows]) if is_measured else None,
    )


def measure_calibration(
    log_odds: Sequence[float], truth: Sequence[float], clusters: Sequence[str], n_failed: int = 0
) -> CalibrationFigures:
    """Calibration of pairs, before and after temperature; `n_failed` further pairs have no log-odds."""
    x, y = np.asarray(log_odds, dtype=float), np.asarray(truth, dtype=float)
    scaled = cross_validated_log_odds(x, y, clusters)
    is_scaled = not np.isnan(scaled).any()
    ece, brier = _measure_errors(x, y, clusters)
    ece_after, brier_after = _measure_errors(scaled, y, clusters)
    reliability_after = calibration.reliability_bins(scaled, y, clusters) if is_scaled else []
    return {
        "accuracy": rate(
            calibration.confidence_and_correctness(x, y)[1].tolist(), clusters, missing=n_failed
        ).as_json(),
        "ece": ece,
        "brier": brier,
        "ece_after_temperature": ece_after,
        "brier_after_temperature": brier_after,
        "ece_if_calibrated": calibration.error_if_calibrated(x),
        "temperature": calibration.fit_temperature(x, y),
        "reliability": [asdict(reliability_bin) for reliability_bin in calibration.reliability_bins(x, y, clusters)],
        "reliability_after_temperature": [asdict(reliability_bin) for reliability_bin in reliability_after],
    }


def _measure_errors(log_odds: Floats, truth: Floats, clusters: Sequence[str]) -> tuple[ErrorFigures, ErrorFigures]:
    """Calibration error and Brier score with intervals; without values where log-odds are NaN.

    The interval of the calibration error begins at 0 where noise alone explains it.
    """
    names, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    n, n_topics = len(log_odds), len(names)
    if np.isnan(log_odds).any():
        missing = {"value": None, "n": n, "topics": n_topics, "interval": None}
        return missing, missing.copy()
    confidences, correct = calibration.confidence_and_correctness(log_odds, truth)
    bins, gaps = calibration.bin_numbers(confidences), confidences - correct
    ece, ece_interval = calibration.bootstrap_interval(
        partial(calibration.weighted_calibration_error, bins, gaps), cluster
    )
    if ece <= calibration.noise_level(bins, gaps, cluster):
        ece_interval[0] = 0.0
    squared_errors = (sigmoid(log_odds) - truth) ** 2
    brier, brier_interval = calibration.bootstrap_interval(
        lambda weights: float(np.average(squared_errors, weights=weights)), cluster
    )
    return (
        {"value": ece, "n": n, "topics": n_topics, "interval": ece_interval},
        {"value": brier, "n": n, "topics": n_topics, "interval": brier_interval},
    )


def calibrate_labels(votes: LabelledVotes, kind: TruthKind | None = None) -> LabelCalibration:
    """Calibration of a run's log-odds, before they become hard or clamped labels, against people or the oracle.

    Measured on held-out prompts, where the truth is known of any. Pairs whose truth is unclear or a tie, and pairs
    without a label or exactly even, are counted and left out. Raises BadInput where no pair with a label is left.
    """
    labels = votes.labels()
    try:
        truth = choose_truth(votes.rows, kind)
    except BadInput as error:
        raise BadInput(f"{votes.name}: {error}") from None
    held_out = np.array([is_held_out(row) for row in votes.rows], dtype=bool)
    measured_on: MeasuredOn = "held_out" if (held_out & truth.is_decided).any() else "all"
    is_measured = held_out if measured_on == "held_out" else np.ones(len(held_out), dtype=bool)
    has_label = is_measured & (labels != 0)
    rows = np.flatnonzero(has_label & truth.is_decided)
    if not rows.size:
        raise BadInput(f"{votes.name}: no pair whose truth is known has a label")
    topics = votes.topics
    n_failed = n_failed_pairs(votes.judge_folders, truth.kind, measured_on)
    figures = measure_calibration(
        labels[rows].tolist(), truth.p_a_better[rows].tolist(), [topics[row] for row in rows.tolist()], n_failed
    )
    return {
        "name": votes.name,
        "truth": truth.kind,
        "measured_on": measured_on,
        "left_out": {
            "unclear": int((has_label & truth.is_unclear).sum()),
            "ties": int((has_label & (truth.p_a_better == 0.5)).sum()),
            "no_label": int((truth.is_decided & is_measured & (labels == 0)).sum()),
            "not_judged": n_failed,
        },
        "against_chance": against_chance(figures["accuracy"]["interval"]),
        "stage_temperature": votes.rule.temperature,
        "stage_temperature_fitted": votes.rule.is_temperature_fitted,
        "stage_points_per_nat": votes.rule.points_per_nat,
        "stage_points_per_nat_fitted": votes.rule.is_points_per_nat_fitted,
        **figures,
    }


def calibration_lines(figures: LabelCalibration) -> Iterator[str]:
    """The figures, and confidence against the share of correct labels."""
    left_out = figures["left_out"]
    yield from wrapped(
        f"{figures['name']}: {figures['accuracy']['n']:,} labels on "
        f"{figures['measured_on'].replace('_', ' ')} prompts against {TRUTH_SOURCES[figures['truth']]}; left "
        f"out: {left_out['unclear']:,} unclear, {left_out['ties']:,} ties, {left_out['no_label']:,} without a label, "
        f"{left_out['not_judged']:,} not judged"
    )
    yield f"the judge is {figures['against_chance']}"
    yield ""
    rows = [
        ["accuracy", rate_text(figures["accuracy"])],
        ["calibration error", rate_text(figures["ece"])],
        ["calibration error if calibrated", f"{figures['ece_if_calibrated']:.2f}"],
        ["calibration error after temperature", rate_text(figures["ece_after_temperature"])],
        ["squared error", rate_text(figures["brier"])],
        ["squared error after temperature", rate_text(figures["brier_after_temperature"])],
    ]
    yield from table(["", "value and 95 % interval"], rows)
    yield from wrapped(
        "calibration error (ECE): how far confidence is from the share of right labels, on average; if calibrated: "
        "that of a judge with these confidences that is right as often as it says. squared error (Brier): mean squared "
        "distance of a label from the truth. after temperature: with log-odds divided by the temperature that fits "
        "other prompts best."
    )
    yield ""
    factor, stage_temperature = figures["temperature"], figures["stage_temperature"]
    best = (
        f"{stage_temperature * factor:.2g} instead of {stage_temperature:g}"
        if stage_temperature
        else "which is a sum of weights for each pair"
    )
    yield from wrapped(f"temperature that fits best: {factor:.2f} times the stage's own, {best}")
    if figures["brier_after_temperature"]["value"] is None:
        yield "all pairs are of one prompt or topic, so that no temperature can be tried on others"
    elif figures["measured_on"] == "all":
        in_words = {
            "temperature": figures["stage_temperature_fitted"],
            "points per nat": figures["stage_points_per_nat_fitted"],
        }
        if fitted := " and ".join(name for name, is_fitted in in_words.items() if is_fitted):
            yield from wrapped(
                f"fitted on these prompts: the stage's {fitted}; figures after temperature are of other prompts"
            )
    yield ""
    rows = [
        [f"{pairs['low']:.2f} to {pairs['high']:.2f}", str(pairs["n"]), f"{pairs['confidence']:.2f}",
         rate_text({"value": pairs["right"], "interval": pairs["interval"]})]
        for pairs in figures["reliability"]
    ]  # fmt: skip
    yield from table(["confidence", "pairs", "mean confidence", "right"], rows)
    yield from wrapped("right: share of labels on the side of the truth, with its 95 % interval.")
