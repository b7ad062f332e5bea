"""Compares two judges, or two wordings of principles, on the pairs that two finished runs have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cai.feedback.explain import (
    DECIDED,
    clustered_rate,
    correlation_about_zero,
    example_figures,
    example_text_lines,
    most_turned,
    number_text,
)
from cai.feedback.labelled_votes import LabelledVotes
from cai.text.errors import BadInput
from cai.text.formatting import printable
from cai.text.tables import rate_text, table


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
