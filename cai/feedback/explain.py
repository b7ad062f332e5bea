"""What each principle does to a run's labels, from the votes alone: no model is asked.

A vote is a principle's log-odds (nats) that response *a* is better, the mean of both orders. A vote of 60 % or more is
*decided*; a judge is almost never exactly even. Correlations of two principles are taken about zero
(`cai.maths.correlation`), on the pairs that both voted on, and left out where these are fewer than `MIN_COMMON_PAIRS`.
Two principles are called redundant or conflicting only where the interval excludes 0 and both have `MIN_DECIDED`
decided votes on these pairs.

A principle that has no vote, because each failed or it applied to no pair, is listed too, with what failed.

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
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import log
from typing import Any, TypedDict

import numpy as np

from cai.feedback.asked_votes import AskedVotes, changed_wordings, read_asked_votes, read_failed_pairs
from cai.feedback.labelled_votes import LabelledVotes
from cai.maths.correlation import Correlation, correlation_about_zero
from cai.maths.statistics import RateFigure, rate
from cai.maths.vote_aggregation import Bools, Floats, Ints, sigmoid
from cai.text.errors import BadInput
from cai.text.formatting import shorten, wrapped

DECIDED = log(0.6 / 0.4)
"""Nats from which a vote counts as decided."""
REDUNDANT, CONFLICTING = 0.8, -0.3
"""Correlations from which two principles are named."""
MIN_COMMON_PAIRS = 20
"""Pairs with votes of both from which a correlation is given."""
MIN_DECIDED = 10
"""Decided votes of each of two principles from which they are named: fewer, and the correlation is one of votes that
hardly differ from even, whose side is noise."""
VISIBLE_CHANGE = 0.05
"""Change of a label's probability from which a pair is shown: below it a label that turns was even, and stays so."""


class PrincipleInfluence(TypedDict):
    """One principle's votes. A rate is None where it has no rows; rates are over decided votes unless stated."""

    weight: float | None
    """None for a principle without a vote, which no label depends on."""
    share_of_say: float
    """Share of the sum of all weighted |log-odds|."""
    pairs: int
    """Pairs with its vote."""
    asked: int | None
    """Pairs that the judge was asked about; None where an earlier version did not count them."""
    failed: int
    """Pairs without its vote that the judge was asked about."""
    failures: dict[str, int]
    """Why, with the number of pairs."""
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
    """Correlation with the number of words that *a* has more than *b*; None with fewer than `MIN_COMMON_PAIRS`."""


class CorrelatedPrinciples(TypedDict):
    principles: list[str]
    correlation: float
    pairs: int
    topics: int
    interval: list[float]
    decided: list[int]
    """Decided votes of each principle on these pairs."""


class LabelsWithout(TypedDict):
    """Labels that change their side, are lost and are gained without a principle, and the pairs that change most."""

    turned: int
    barely_turned: int
    """Those of `turned` whose probability changes by less than `VISIBLE_CHANGE`."""
    lost: int
    gained: int
    examples: list[dict[str, Any]]


class Explanation(TypedDict):
    """Figures of every principle, of every two, and of the labels without each."""

    name: str
    pairs: int
    labelled: int
    unlabelled: dict[str, int]
    """Why the other pairs have no label, with their number."""
    behaviours: Mapping[str, Mapping[str, float]] | None
    """Means of text detectors over chosen and rejected responses, by detector; None where the stage has none."""
    failed_pairs: dict[str, int]
    """Why further pairs have no vote of any principle, with their number."""
    prefers_own: RateFigure | None
    """Labels on the side of the judge's own text where another model wrote the other one. Own texts may be better."""
    principles: dict[str, PrincipleInfluence]
    correlations: list[CorrelatedPrinciples]
    """Of every two principles with enough pairs in common, the strongest first."""
    correlations_left_out: int
    """Of two principles with fewer pairs in common."""
    redundant: list[CorrelatedPrinciples]
    conflicting: list[CorrelatedPrinciples]
    without: dict[str, LabelsWithout]


def explain(votes: LabelledVotes, n_examples: int = 3, principles: Collection[str] | None = None) -> Explanation:
    """Figures of every principle, how they go together, and what happens to the labels without each.

    With `principles`, ids, only these are reported, and correlations with one of them. The labels are those of all.
    """
    asked = read_asked_votes(votes.judge_folders)
    ids = [id for id in sorted({*votes.principles, *asked}) if principles is None or id in principles]
    labels, log_odds = votes.labels(), votes.log_odds
    weights = np.array([votes.rule.weights[id] for id in votes.principles])
    counts = ~np.isnan(log_odds) & (np.abs(log_odds) >= votes.rule.abstain_below)
    weighted = np.where(counts, weights * np.abs(log_odds), 0.0)
    total_weighted = weighted.sum() if weighted.any() else 1.0
    pairs_of_principles = [names for names in itertools.combinations(votes.principles, 2) if {*names} & {*ids}]
    correlated = correlations(votes, pairs_of_principles)
    # 1 where the judge wrote a alone, -1 where it wrote b alone.
    own_side = np.array(
        [(row["a"]["model"] == row["judge"]) - float(row["b"]["model"] == row["judge"]) for row in votes.rows]
    )
    return {
        "name": votes.name,
        "pairs": len(votes.rows),
        "labelled": int((labels != 0).sum()),
        "unlabelled": votes.unlabelled(),
        "behaviours": votes.behaviours,
        "failed_pairs": read_failed_pairs(votes.judge_folders),
        "prefers_own": clustered_rate(own_side * labels > 0, (own_side != 0) & (labels != 0), votes.topics),
        "principles": {
            id: _influence(votes, id, labels, weighted.sum(0) / total_weighted, asked.get(id)) for id in ids
        },
        "correlations": correlated,
        "correlations_left_out": len(pairs_of_principles) - len(correlated),
        "redundant": [entry for entry in correlated if entry["correlation"] >= REDUNDANT and is_established(entry)],
        "conflicting": [entry for entry in correlated if entry["correlation"] <= CONFLICTING and is_established(entry)],
        "without": {id: _labels_without(votes, id, labels, n_examples) for id in ids},
    }


def _influence(
    votes: LabelledVotes, id: str, labels: Floats, shares: Floats, asked: AskedVotes | None
) -> PrincipleInfluence:
    """Figures of one principle; `shares` are those of all principles in the sum of weighted |log-odds|."""
    is_voted = id in votes.principles
    column = list(votes.principles).index(id) if is_voted else 0
    ab, ba, log_odds = (
        values[:, column] if is_voted else np.full(len(votes.rows), np.nan)
        for values in (votes.ab, votes.ba, votes.log_odds)
    )
    has_vote = ~np.isnan(log_odds)
    is_decided = has_vote & (np.abs(log_odds) >= DECIDED)
    has_order = has_vote & np.array([row.get("method") != "rating" for row in votes.rows], dtype=bool)
    labels_without = votes.labels(without=id)
    extra_words = votes.extra_words
    length = correlation_about_zero(log_odds[has_vote], extra_words[has_vote], np.arange(has_vote.sum()))

    def rate_of_same_side(sides: Floats) -> RateFigure | None:
        return clustered_rate(log_odds * sides > 0, is_decided & (sides != 0), votes.topics)

    return {
        "weight": float(votes.rule.weights[id]) if is_voted else None,
        "share_of_say": float(shares[column]) if is_voted else 0.0,
        "pairs": int(has_vote.sum()),
        **(asked or {"asked": None, "failed": 0, "failures": {}}),
        "decided": clustered_rate(is_decided, has_vote, votes.topics),
        "mean_strength": float(np.abs(log_odds[has_vote]).mean()) if has_vote.any() else None,
        "agreement": rate_of_same_side(labels),
        "agreement_with_the_others": rate_of_same_side(labels_without),
        "position_bias": float((ab - ba)[has_order].mean() / 2) if has_order.any() else None,
        "flip_rate": float((ab * ba < 0)[is_decided & has_order].mean()) if (is_decided & has_order).any() else None,
        "prefers_longer": rate_of_same_side(extra_words),
        "length_correlation": length.value if length and length.n >= MIN_COMMON_PAIRS else None,
    }


def correlations(votes: LabelledVotes, pairs: Sequence[tuple[str, str]]) -> list[CorrelatedPrinciples]:
    """The correlation of each pair of principles, the strongest first.

    Left out where fewer than `MIN_COMMON_PAIRS` pairs of responses have votes of both, or one has no uneven vote there.
    """
    topics = topic_numbers(votes.topics)
    correlated: list[CorrelatedPrinciples] = []
    for names in pairs:
        first, second = (votes.log_odds[:, list(votes.principles).index(id)] for id in names)
        has_both = ~np.isnan(first) & ~np.isnan(second)
        if (correlation := correlation_of_votes(first, second, topics)) is not None:
            correlated.append(
                {
                    "principles": list(names),
                    "correlation": correlation.value,
                    "pairs": correlation.n,
                    "topics": correlation.topics,
                    "interval": list(correlation.interval),
                    "decided": [int((np.abs(column[has_both]) >= DECIDED).sum()) for column in (first, second)],
                }
            )
    return sorted(correlated, key=lambda entry: -abs(entry["correlation"]))


def is_established(entry: CorrelatedPrinciples) -> bool:
    """Whether a correlation says something about two principles: its interval excludes 0, and both decide often."""
    return not contains_zero(entry["interval"]) and min(entry["decided"]) >= MIN_DECIDED


def contains_zero(interval: Sequence[float]) -> bool:
    """Whether 0 lies within an interval, (low, high)."""
    low, high = interval
    return low <= 0 <= high


def correlation_of_votes(first: Floats, second: Floats, topics: Ints) -> Correlation | None:
    """The correlation of two principles' votes on the pairs that have both; None for too few or without an uneven one.

    All are (pairs,): votes, NaN where there is none, and the number of the pair's topic.
    """
    has_both = ~np.isnan(first) & ~np.isnan(second)
    if has_both.sum() < MIN_COMMON_PAIRS:
        return None
    return correlation_about_zero(first[has_both], second[has_both], topics[has_both])


def topic_numbers(topics: Sequence[str]) -> Ints:
    """Topics as numbers from 0."""
    numbers: Ints = np.unique(np.asarray(topics, dtype=object), return_inverse=True)[1]
    return numbers


def _labels_without(votes: LabelledVotes, id: str, labels: Floats, n_examples: int) -> LabelsWithout:
    labels_without = votes.labels(without=id)
    is_turned = labels * labels_without < 0
    return {
        "turned": int(is_turned.sum()),
        "barely_turned": int((is_turned & (probability_change(labels, labels_without) < VISIBLE_CHANGE)).sum()),
        "lost": int(((labels != 0) & (labels_without == 0)).sum()),
        "gained": int(((labels == 0) & (labels_without != 0)).sum()),
        "examples": [
            example_figures(votes.rows[i], p_a=labels[i], p_a_without=labels_without[i])
            for i in most_turned(labels, labels_without)[:n_examples].tolist()
        ],
    }


def most_turned(labels: Floats, changed_labels: Floats) -> Ints:
    """Indices of the pairs whose labels are on different sides and change visibly, the largest change first."""
    change = probability_change(labels, changed_labels)
    rows = np.flatnonzero((labels * changed_labels < 0) & (change >= VISIBLE_CHANGE))
    return rows[np.argsort(-change[rows], kind="stable")]


def probability_change(labels: Floats, changed_labels: Floats) -> Floats:
    """How far the probability that *a* is better moves between two labels, given in nats; all are (pairs,)."""
    return np.abs(sigmoid(labels) - sigmoid(changed_labels))


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


def correlation_remarks(explanation: Explanation) -> Iterator[tuple[str, CorrelatedPrinciples]]:
    """What is remarked on two principles, and the two."""
    yield from (("say nearly the same", entry) for entry in explanation["redundant"])
    yield from (("contradict each other", entry) for entry in explanation["conflicting"])


def example_text_lines(example: Mapping[str, Any]) -> Iterator[str]:
    """Prompt and responses of an example, shortened, in lines that fit a terminal."""
    for key in ("prompt", "a", "b"):
        yield from wrapped(f"  {key:6} {shorten(example[key], 200)}", " " * 9)


def compare_votes(first: LabelledVotes, second: LabelledVotes, n_examples: int = 3) -> dict[str, Any]:
    """Figures over the pairs of both runs, the same prompt with the same two texts.

    `turned` is the rate of labels, or of votes decided in both, that are on different sides; `mean_strength` is in
    nats. Values in lists are those of the first and of the second run. A principle with fewer than `MIN_COMMON_PAIRS`
    pairs has no correlation. `wordings` are the principles that the judges of the two were asked about in other words.
    Raises BadInput where no pair is in both.
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
        correlation = correlation_of_votes(first_votes, second_votes, topic_numbers(topics))
        principles[id] = {
            "pairs": int(in_both.sum()),
            "correlation": correlation and correlation.value,
            "correlation_interval": correlation and list(correlation.interval),
            "mean_strength": [
                float(np.abs(votes[in_both]).mean()) if in_both.any() else None for votes in (first_votes, second_votes)
            ],
            "turned": clustered_rate(first_votes * second_votes < 0, is_decided, topics),
        }
    return {
        "names": [first.name, second.name],
        "pairs": [len(first.rows), len(second.rows)],
        "matched": len(matched),
        "is_same": first.has_files_of(second),
        "wordings": {
            id: words
            for id, words in changed_wordings(first.judge_folders, second.judge_folders).items()
            if id in principles
        },
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
