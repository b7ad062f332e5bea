"""What each principle does to a run's labels, from the votes alone: no model is asked.

A vote is a principle's log-odds (nats) that response *a* is better, the mean of both orders. A vote of 60 % or more is
*decided*; a judge is almost never exactly even. Correlations are taken about zero, sum(x y) / sqrt(sum(x^2) sum(y^2)):
exchanging *a* and *b* of a pair flips the signs of all its votes, which changes a correlation about the mean but not
this one. Two principles are compared on the pairs that both voted on.

Votes of a judge that rates are converted from points by the rule of the labels (`points_per_nat`). They have no order,
so there are no figures about positions and flips.

The labels without a principle are those with its weight set to 0. That is no causal claim about a judge that would be
asked in other words.

`compare_votes` holds two runs against each other: two judges, or two wordings of principles, on the pairs that the runs
have in common.

Left out: whether a principle is right (`cai constitution test` measures that), and truth from other sources.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import log
from typing import Any, TypedDict

import numpy as np

from cai.feedback.labelled_votes import LabelledVotes
from cai.maths.statistics import RateFigure, rate
from cai.maths.vote_aggregation import Bools, Floats, Ints, sigmoid
from cai.text.errors import BadInput
from cai.text.formatting import printable, shorten
from cai.text.tables import rate_text, table

DECIDED = log(0.6 / 0.4)
"""Nats from which a vote counts as decided."""
REDUNDANT, CONFLICTING = 0.8, -0.3
"""Correlations from which two principles are named."""
MIN_COMMON_PAIRS = 20
"""Pairs with votes of both from which two principles are named."""


class PrincipleInfluence(TypedDict):
    """One principle's votes. A rate is None where it has no rows; rates are over decided votes unless stated."""

    weight: float
    share_of_say: float
    """Share of the sum of all weighted |log-odds|."""
    pairs: int
    decided: RateFigure | None
    """Of all votes."""
    mean_strength: float | None
    agreement: RateFigure | None
    """Votes on the side of the label."""
    agreement_with_the_others: RateFigure | None
    """Votes on the side of the label without this principle."""
    position_bias: float | None
    flip_rate: float | None
    prefers_longer: RateFigure | None
    length_correlation: float | None
    """Correlation with the number of words that *a* has more than *b*."""


class CorrelatedPrinciples(TypedDict):
    principles: list[str]
    correlation: float
    pairs: int


class LabelsWithout(TypedDict):
    """Labels that change their side, are lost and are gained without a principle, and the pairs that change most."""

    turned: int
    lost: int
    gained: int
    examples: list[dict[str, Any]]


class Explanation(TypedDict):
    """Figures of every principle, of every two, and of the labels without each."""

    name: str
    pairs: int
    labelled: int
    prefers_own: RateFigure | None
    """Labels on the side of the judge's own text where another model wrote the other one. Own texts may be better."""
    principles: dict[str, PrincipleInfluence]
    correlation: dict[str, dict[str, float | None]]
    redundant: list[CorrelatedPrinciples]
    conflicting: list[CorrelatedPrinciples]
    without: dict[str, LabelsWithout]


def explain(votes: LabelledVotes, n_examples: int = 3) -> Explanation:
    """Figures of every principle, how they go together, and what happens to the labels without each."""
    labels, log_odds, principles = votes.labels(), votes.log_odds, votes.principles
    weights = np.array([votes.rule.weights[id] for id in principles])
    counts = ~np.isnan(log_odds) & (np.abs(log_odds) >= votes.rule.abstain_below)
    weighted = np.where(counts, weights * np.abs(log_odds), 0.0)
    total_weighted = weighted.sum() if weighted.any() else 1.0
    correlation, n_common = correlations(log_odds)
    # 1 where the judge wrote a alone, -1 where it wrote b alone.
    own_side = np.array(
        [(row["a"]["model"] == row["judge"]) - float(row["b"]["model"] == row["judge"]) for row in votes.rows]
    )
    return {
        "name": votes.name,
        "pairs": len(votes.rows),
        "labelled": int((labels != 0).sum()),
        "prefers_own": clustered_rate(own_side * labels > 0, (own_side != 0) & (labels != 0), votes.topics),
        "principles": {
            id: _influence(votes, column, labels, float(weights[column]), weighted[:, column].sum() / total_weighted)
            for column, id in enumerate(principles)
        },
        "correlation": {
            id: {second: None if np.isnan(value) else value for second, value in zip(principles, row, strict=True)}
            for id, row in zip(principles, correlation.tolist(), strict=True)
        },
        "redundant": _correlated(principles, correlation, n_common, lambda value: value >= REDUNDANT),
        "conflicting": _correlated(principles, correlation, n_common, lambda value: value <= CONFLICTING),
        "without": {id: _labels_without(votes, id, labels, n_examples) for id in principles},
    }


def _influence(votes: LabelledVotes, column: int, labels: Floats, weight: float, say: float) -> PrincipleInfluence:
    ab, ba, log_odds = votes.ab[:, column], votes.ba[:, column], votes.log_odds[:, column]
    has_vote = ~np.isnan(log_odds)
    is_decided = has_vote & (np.abs(log_odds) >= DECIDED)
    has_order = has_vote & np.array([row.get("method") != "rating" for row in votes.rows], dtype=bool)
    labels_without = votes.labels(without=votes.principles[column])
    extra_words = votes.extra_words

    def rate_of_same_side(sides: Floats) -> RateFigure | None:
        return clustered_rate(log_odds * sides > 0, is_decided & (sides != 0), votes.topics)

    return {
        "weight": weight,
        "share_of_say": float(say),
        "pairs": int(has_vote.sum()),
        "decided": clustered_rate(is_decided, has_vote, votes.topics),
        "mean_strength": float(np.abs(log_odds[has_vote]).mean()) if has_vote.any() else None,
        "agreement": rate_of_same_side(labels),
        "agreement_with_the_others": rate_of_same_side(labels_without),
        "position_bias": float((ab - ba)[has_order].mean() / 2) if has_order.any() else None,
        "flip_rate": float((ab * ba < 0)[is_decided & has_order].mean()) if (is_decided & has_order).any() else None,
        "prefers_longer": rate_of_same_side(extra_words),
        "length_correlation": correlation_about_zero(log_odds[has_vote], extra_words[has_vote]),
    }


def correlations(log_odds: Floats) -> tuple[Floats, Floats]:
    """Correlations about zero of every two principles, and the number of pairs that both voted on.

    `log_odds` is (pairs, principles), NaN where a principle did not vote; both results are (principles, principles).
    A correlation is NaN where one of the principles has no uneven vote.
    """
    has_vote = (~np.isnan(log_odds)).astype(float)
    values = np.nan_to_num(log_odds)
    squares = (values**2).T @ has_vote
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation: Floats = (values.T @ values) / np.sqrt(squares * squares.T)
    return correlation, has_vote.T @ has_vote


def correlation_about_zero(x: Floats, y: Floats) -> float | None:
    """sum(x y) / sqrt(sum(x^2) sum(y^2)); None where it is not defined."""
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else None


def _correlated(
    principles: Sequence[str], correlation: Floats, n_common: Floats, is_named: Callable[[float], bool]
) -> list[CorrelatedPrinciples]:
    """Every two principles whose correlation is to be named, the strongest first."""
    correlated: list[CorrelatedPrinciples] = []
    for i, j in itertools.combinations(range(len(principles)), 2):
        value, n_pairs = float(correlation[i, j]), int(n_common[i, j])
        if n_pairs >= MIN_COMMON_PAIRS and is_named(value):
            correlated.append({"principles": [principles[i], principles[j]], "correlation": value, "pairs": n_pairs})
    return sorted(correlated, key=lambda entry: -abs(entry["correlation"]))


def _labels_without(votes: LabelledVotes, id: str, labels: Floats, n_examples: int) -> LabelsWithout:
    labels_without = votes.labels(without=id)
    return {
        "turned": int((labels * labels_without < 0).sum()),
        "lost": int(((labels != 0) & (labels_without == 0)).sum()),
        "gained": int(((labels == 0) & (labels_without != 0)).sum()),
        "examples": [
            example_figures(votes.rows[i], p_a=labels[i], p_a_without=labels_without[i])
            for i in most_turned(labels, labels_without)[:n_examples].tolist()
        ],
    }


def most_turned(labels: Floats, changed_labels: Floats) -> Ints:
    """Indices of the pairs whose labels are on different sides, those far from even on both first."""
    rows = np.flatnonzero(labels * changed_labels < 0)
    strength = np.minimum(np.abs(labels[rows]), np.abs(changed_labels[rows]))
    return rows[np.argsort(-strength, kind="stable")]


def example_figures(row: Mapping[str, Any], **log_odds: float) -> dict[str, Any]:
    """A pair's texts, and log-odds as probabilities under the names of the keyword arguments."""
    return {"pair": row["id"], "prompt": row["prompt"][-1]["content"], "a": row["a"]["text"], "b": row["b"]["text"]} | {
        name: float(sigmoid(np.array(value))) for name, value in log_odds.items()
    }


def clustered_rate(values: Bools, is_counted: Bools, topics: Sequence[str]) -> RateFigure | None:
    """Rate of true `values` where `is_counted`, clustered by topic; None where nothing is counted. All are (pairs,)."""
    if not is_counted.any():
        return None
    rows = np.flatnonzero(is_counted).tolist()
    return rate(values[is_counted].astype(float).tolist(), [topics[row] for row in rows]).as_json()


def explanation_lines(explanation: Explanation) -> Iterator[str]:
    """The figures as tables, then examples of pairs."""
    yield f"{explanation['name']}: {explanation['labelled']:,} of {explanation['pairs']:,} pairs have a label"
    if own := explanation["prefers_own"]:
        yield f"for the judge's own text, where another model wrote the other: {rate_text(own)} of {own['n']:,}"
    yield ""
    headers = ["principle", "weight", "say", "pairs", "decided", "strength", "with label", "with others", "position",
               "flips", "longer", "turned", "lost", "gained"]  # fmt: skip
    rows = []
    for id, principle in explanation["principles"].items():
        without = explanation["without"][id]
        rows.append(
            [
                id, f"{principle['weight']:g}", f"{100 * principle['share_of_say']:.0f} %", f"{principle['pairs']:,}",
                rate_text(principle["decided"]), number_text(principle["mean_strength"], "{:.2f}"),
                rate_text(principle["agreement"]), rate_text(principle["agreement_with_the_others"]),
                number_text(principle["position_bias"], "{:+.2f}"), number_text(principle["flip_rate"], "{:.2f}"),
                rate_text(principle["prefers_longer"]),
                str(without["turned"]), str(without["lost"]), str(without["gained"]),
            ]
        )  # fmt: skip
    yield from table(headers, rows)
    yield ""
    yield "say: share of all weighted log-odds. decided: votes of 60 % or more; of these: on the side of the label, of"
    yield "the label without it, of the longer response. strength, position: nats. turned, lost, gained: labels without"
    yield "the principle. Brackets: 95 % intervals, clustered by topic."
    yield ""
    ids = list(explanation["correlation"])
    cells = [
        [id, *(number_text(explanation["correlation"][id][column_id], "{:+.2f}") for column_id in ids[: i + 1])]
        + [""] * (len(ids) - i - 1)
        for i, id in enumerate(ids)
    ]
    yield from table(["correlation", *(shorten(id, 12) for id in ids)], cells)
    for remark, entry in correlation_remarks(explanation):
        names = " and ".join(entry["principles"])
        yield printable(f"{names} {remark}: {entry['correlation']:+.2f} over {entry['pairs']:,} pairs")
    for id, without in explanation["without"].items():
        for example in without["examples"]:
            yield ""
            change = f"a {example['p_a']:.2f} -> {example['p_a_without']:.2f}"
            yield printable(f"without {id}, pair {example['pair']}: {change}")
            yield from example_text_lines(example)


def correlation_remarks(explanation: Explanation) -> Iterator[tuple[str, CorrelatedPrinciples]]:
    """What is remarked on two principles, and the two."""
    yield from (("say nearly the same", entry) for entry in explanation["redundant"])
    yield from (("contradict each other", entry) for entry in explanation["conflicting"])


def example_text_lines(example: Mapping[str, Any]) -> Iterator[str]:
    """Prompt and responses of an example, shortened."""
    for key in ("prompt", "a", "b"):
        yield printable(f"  {key:6} {shorten(example[key], 200)}")


def number_text(value: float | None, form: str) -> str:
    """The formatted number; a dash for None."""
    return "-" if value is None else form.format(value)


def compare_votes(first: LabelledVotes, second: LabelledVotes, n_examples: int = 3) -> dict[str, Any]:
    """Figures over the pairs of both runs, the same prompt with the same two texts.

    `turned` is the rate of labels, or of votes decided in both, that are on different sides; `mean_strength` is in
    nats. Values in lists are those of the first and of the second run. Raises BadInput where no pair is in both.
    """
    second_row_by_key = {_pair_key(row): j for j, row in enumerate(second.rows)}
    matches = [(i, second_row_by_key.get(_pair_key(row))) for i, row in enumerate(first.rows)]
    matched = [(i, j) for i, j in matches if j is not None]
    if not matched:
        raise BadInput(
            f"{first.name} and {second.name} have no pair in common: the same prompt with the same two responses"
        )
    first_rows, second_rows = (np.array(rows) for rows in zip(*matched, strict=True))
    # Changes the sign where a pair's a and b have changed places.
    sign = np.array([1.0 if first.rows[i]["a"]["text"] == second.rows[j]["a"]["text"] else -1.0 for i, j in matched])
    topics = [first.topics[i] for i in first_rows]
    first_labels, second_labels = first.labels()[first_rows], second.labels()[second_rows] * sign
    principles = {}
    for id in sorted({*first.principles} & {*second.principles}):
        first_votes = first.log_odds[first_rows, list(first.principles).index(id)]
        second_votes = second.log_odds[second_rows, list(second.principles).index(id)] * sign
        in_both = ~np.isnan(first_votes) & ~np.isnan(second_votes)
        is_decided = in_both & (np.abs(first_votes) >= DECIDED) & (np.abs(second_votes) >= DECIDED)
        principles[id] = {
            "pairs": int(in_both.sum()),
            "correlation": correlation_about_zero(first_votes[in_both], second_votes[in_both]),
            "mean_strength": [
                float(np.abs(votes[in_both]).mean()) if in_both.any() else None for votes in (first_votes, second_votes)
            ],
            "turned": clustered_rate(first_votes * second_votes < 0, is_decided, topics),
        }
    return {
        "names": [first.name, second.name],
        "pairs": [len(first.rows), len(second.rows)],
        "matched": len(matched),
        "turned": clustered_rate(
            first_labels * second_labels < 0, (first_labels != 0) & (second_labels != 0), topics
        ),
        "principles": principles,
        "examples": [
            example_figures(first.rows[first_rows[i]], p_a=first_labels[i], p_a_in_the_other=second_labels[i])
            for i in most_turned(first_labels, second_labels)[:n_examples].tolist()
        ],
        "only_in": [
            sorted({*first.principles} - {*second.principles}),
            sorted({*second.principles} - {*first.principles}),
        ],
    }  # fmt: skip


def _pair_key(row: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
    return row["prompt_id"], frozenset((row["a"]["text"], row["b"]["text"]))


def difference_lines(differences: Mapping[str, Any]) -> Iterator[str]:
    """The figures as a table, and the pairs whose labels differ most."""
    (first, second), (n_first, n_second) = differences["names"], differences["pairs"]
    yield printable(
        f"{differences['matched']:,} pairs in both of {n_first:,} in {first} and {n_second:,} in {second}; "
        f"labels turned: {rate_text(differences['turned'])}"
    )
    yield ""
    rows = [
        [id, f"{principle['pairs']:,}", number_text(principle["correlation"], "{:+.2f}"),
         rate_text(principle["turned"]), *(number_text(value, "{:.2f}") for value in principle["mean_strength"])]
        for id, principle in differences["principles"].items()
    ]  # fmt: skip
    yield from table(["principle", "pairs", "correlation", "turned", "strength", "in the other"], rows)
    for name, principles in zip(differences["names"], differences["only_in"], strict=True):
        if principles:
            yield printable(f"only in {name}: {', '.join(principles)}")
    for example in differences["examples"]:
        yield ""
        probabilities = f"a {example['p_a']:.2f} in {first}, {example['p_a_in_the_other']:.2f} in {second}"
        yield printable(f"pair {example['pair']}: {probabilities}")
        yield from example_text_lines(example)
