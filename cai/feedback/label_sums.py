"""How one pair's label follows from its votes: the terms of the weighted sum, its divisor, and the label.

The same arithmetic as `prefer`'s, for a reader. Left out: which labels `mix` takes from people instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from cai.feedback.labelled_votes import LABEL_RULE, LabelKind, LabelRule
from cai.maths.vote_aggregation import has_say, mean_over_orders, sigmoid
from cai.storage.stage_folders import standing_stages


class LabelTerm(TypedDict):
    """One principle's part in the sum. Log-odds are in nats, for *a*."""

    principle: str
    mean: float | None
    """Mean log-odds of both orders, points already divided by `points_per_nat`; None without one vote in each order."""
    weight: float
    weighted: float | None
    """weight × mean; None where the principle has no say: weight 0, no vote, or nearer to even than `abstain_below`."""


class LabelSum(TypedDict):
    """How a pair's label follows: log-odds for *a* = sum of the weighted log-odds / divisor."""

    stage: str
    """The stage that made the label."""
    terms: list[LabelTerm]
    sum: float
    divisor: float
    divided_by: str
    """What the divisor is: the sum of weights, or the temperature."""
    points_per_nat: float | None
    log_odds: float | None
    """For *a*; None where no principle has a say."""
    p_chosen: float | None
    """The label of the response that is preferred; None where the pair gets none."""
    labels: LabelKind
    clamp: tuple[float, float] | None
    abstain_below: float
    min_confidence: float


def label_rules(run: Path) -> dict[str, dict[str, LabelRule]]:
    """Id of a stage with votes to the rules of the stages, by id, that make labels of the votes that it holds now."""
    standing = standing_stages(run)
    rules: dict[str, dict[str, LabelRule]] = {}
    for stage_id, stage in standing.items():
        if not (stage.folder / LABEL_RULE).is_file():
            continue
        for votes_id, read in stage.facts["inputs"].items():
            if votes_id in standing and standing[votes_id].digest == read["digest"]:
                rules.setdefault(votes_id, {})[stage_id] = LabelRule.read(stage.folder)
    return rules


def label_sum(stage_id: str, row: Mapping[str, Any], rule: LabelRule) -> LabelSum:
    """How the rule of the stage turns the votes of a row into a label."""
    log_odds: dict[str, dict[str, list[float]]] = {}
    for vote in row["votes"]:
        log_odds.setdefault(vote["principle"], {"ab": [], "ba": []})[vote["order"]].append(vote["log_odds"])
    principles = list(log_odds)
    is_whole = {id: all(len(values) == 1 for values in orders.values()) for id, orders in log_odds.items()}
    scale = rule.points_per_nat if row.get("method") == "rating" else None
    means = np.array(
        [
            mean_over_orders(orders["ab"][0], orders["ba"][0]) / (scale or 1.0) if is_whole[id] else np.nan
            for id, orders in log_odds.items()
        ]
    )
    weights = np.array([rule.weights[id] for id in principles], dtype=float)
    counts = has_say(means, weights, rule.abstain_below)
    log_odds_of_pair = rule.aggregate(means[None, :], principles)  # (1,)
    strength = np.abs(log_odds_of_pair)
    has_label = sigmoid(strength) >= rule.min_confidence  # False for NaN
    if rule.labels == "hard":
        has_label &= strength > 0
    return {
        "stage": stage_id,
        "terms": [
            {
                "principle": principle,
                "mean": None if np.isnan(mean) else float(mean),
                "weight": float(weight),
                "weighted": float(weight * mean) if has_a_say else None,
            }
            for principle, mean, weight, has_a_say in zip(principles, means, weights, counts, strict=True)
        ],
        "sum": float((weights * means)[counts].sum()),
        "divisor": float(weights[counts].sum()) if rule.temperature is None else rule.temperature,
        "divided_by": _divisor_in_words(rule),
        "points_per_nat": scale,
        "log_odds": float(log_odds_of_pair[0]) if counts.any() else None,
        "p_chosen": float(rule.p_chosen(strength)[0]) if has_label[0] else None,
        "labels": rule.labels,
        "clamp": rule.clamp,
        "abstain_below": rule.abstain_below,
        "min_confidence": rule.min_confidence,
    }


def label_line(label: LabelSum) -> str:
    """The sum and the label in words, from `preferences: sum +3.20 / sum of weights 3 = +1.07` to the label."""
    log_odds = label["log_odds"]
    if log_odds is None:
        return f"{label['stage']}: no label, since no principle has a say"
    line = f"{label['stage']}: sum {label['sum']:+.2f} / {label['divided_by']} {label['divisor']:g}"
    if label["points_per_nat"] is not None:
        line = f"{line}, with {label['points_per_nat']:g} points per nat,"
    side = "a" if log_odds > 0 else "b" if log_odds < 0 else "neither"
    probability = float(sigmoid(np.array(abs(log_odds))))
    line = f"{line} = {log_odds:+.2f}, so {side} is better with probability {probability:.3f}"
    if label["p_chosen"] is None:
        below = f"below min_confidence {label['min_confidence']:g}" if log_odds else "exactly even"
        return f"{line}; no label, since that is {below}"
    if label["labels"] == "clamp" and label["clamp"]:
        low, high = label["clamp"]
        return f"{line}; label {label['p_chosen']:.3f}, kept within {low:g} and {high:g}"
    return f"{line}; {label['labels']} label {label['p_chosen']:.3f}"


def _divisor_in_words(rule: LabelRule) -> str:
    if rule.temperature is None:
        return "sum of weights"
    return "fitted temperature" if rule.is_temperature_fitted else "temperature"
