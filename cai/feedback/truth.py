"""Which response of a pair is the better one, where that is known: labels are measured against it and fitted to it.

`human`: people labelled this very pair. `oracle`: the prompt is of the embedded world, whose oracle scores responses.
Truth is the probability that *a* is better. It is 0.5, a tie, where people contradict each other or the oracle scores
both responses alike; ties are not used to measure a judge. Pairs that a judge failed on although their truth could
have been known are counted here too: they widen the bounds of accuracies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cai.maths.vote_aggregation import Bools, Floats
from cai.storage import run_folder
from cai.storage.files import read_json
from cai.storage.rows import TOPIC, is_held_out
from cai.text.errors import BadInput

TruthKind = Literal["human", "oracle"]
MeasuredOn = Literal["held_out", "all"]
"""Prompts that figures are measured on."""


class Truth(NamedTuple):
    """Truth of one kind about the pairs of vote rows."""

    kind: TruthKind
    p_a_better: Floats
    """Probability that *a* is better, (pairs,); NaN where it is unknown."""
    is_unclear: Bools
    """Whether the oracle cannot read a response of the pair although its prompt is of the embedded world, (pairs,)."""

    @property
    def is_decided(self) -> Bools:
        """Whether one response of the pair is known to be the better one, (pairs,)."""
        is_decided: Bools = ~np.isnan(self.p_a_better) & (self.p_a_better != 0.5)
        return is_decided


def available_truths(rows: Sequence[Mapping[str, Any]]) -> dict[TruthKind, Truth]:
    """Every kind of truth that is known of at least one pair, people's first."""
    by_people = np.array([row.get("human", np.nan) for row in rows], dtype=float)
    is_of_world = np.array([is_of_embedded_world(row["tags"]) for row in rows], dtype=bool)
    by_oracle = np.full(len(rows), np.nan)
    for i in np.flatnonzero(is_of_world).tolist():
        by_oracle[i] = _oracle_p_a_better(rows[i])
    truths = (
        Truth("human", by_people, np.zeros(len(rows), dtype=bool)),
        Truth("oracle", by_oracle, is_of_world & np.isnan(by_oracle)),
    )
    return {truth.kind: truth for truth in truths if truth.is_decided.any()}


def choose_truth(rows: Sequence[Mapping[str, Any]], kind: TruthKind | None = None) -> Truth:
    """The truth of that kind; the only one there is where `kind` is None.

    Raises BadInput where there is none of the kind, or `kind` is None and there are two.
    """
    truths = available_truths(rows)
    if not truths:
        raise BadInput(
            "no pair of this run has a known truth; that takes pairs that people labelled (`human:` of a judge stage) "
            "or prompts of source micro"
        )
    if kind is None:
        if len(truths) > 1:
            raise BadInput(f"found the truth of {' and of '.join(truths)}, expected --truth to say which of them")
        (kind,) = truths
    if kind not in truths:
        raise BadInput(f"--truth {kind}: no pair of this run has that, expected {' or '.join(truths)}")
    return truths[kind]


def is_of_embedded_world(tags: Sequence[str]) -> bool:
    """Whether a prompt with these tags is of the embedded world, whose oracle knows the truth."""
    return any(tag.startswith(TOPIC) for tag in tags)


def _oracle_p_a_better(row: Mapping[str, Any]) -> float:
    from cai.micro.oracle import gold_score

    a, b = (gold_score(row["prompt"], row[side]["text"]) for side in "ab")
    return float("nan") if a is None or b is None else 0.5 * (1 + np.sign(a - b))


FailedWithTruth = dict[TruthKind, dict[MeasuredOn, int]]
"""Pairs of all prompts, and of held-out ones, by the kind of truth."""


def count_failed_with_truth(failed_pairs: Sequence[Mapping[str, Any]]) -> FailedWithTruth:
    """Counts of the failed pairs by the kind of truth that could have been known; a judge stage's figures hold them."""
    pairs_by_kind: dict[TruthKind, list[Mapping[str, Any]]] = {
        "human": [pair for pair in failed_pairs if "human" in pair],
        "oracle": [pair for pair in failed_pairs if is_of_embedded_world(pair["tags"])],
    }
    return {
        kind: {"all": len(pairs), "held_out": sum(is_held_out(pair) for pair in pairs)}
        for kind, pairs in pairs_by_kind.items()
    }


def n_failed_pairs(judge_folders: Iterable[Path], kind: TruthKind, measured_on: MeasuredOn) -> int:
    """Pairs of finished judge stages without a vote whose truth of that kind could have been known."""
    stages = [read_json(folder / run_folder.STAGE) or {} for folder in judge_folders]
    votes = [figures for stage in stages for figures in stage.get("figures", {}).get("votes", {}).values()]
    return sum(figures["failed_with_truth"][kind][measured_on] for figures in votes)
