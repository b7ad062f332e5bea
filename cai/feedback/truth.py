"""Which response of a pair is the better one, where that is known: what labels can be held against, and fitted to.

`human`: people said so of this very pair. `oracle`: the prompt is of the embedded world, whose oracle scores responses.
Truth is the probability that *a* is better; 0.5, where people contradict each other or the oracle scores both alike, is
a tie and says nothing about a judge.

Left out: what labels are worth by it (`cai.feedback.calibration`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from cai.feedback.labels import Bools, Floats
from cai.storage.rows import TOPIC
from cai.text.errors import BadInput

Kind = Literal["human", "oracle"]
NONE = (
    "no pair of this run has a known truth; that takes pairs that people labelled (`human:` of a judge stage) or "
    "prompts of source micro"
)


class Truth(NamedTuple):
    """What is known of the pairs of vote rows."""

    kind: Kind
    better: Floats
    """Probability that *a* is better, (pairs,); NaN where it is not known."""
    unclear: Bools
    """Pairs of the embedded world with a response that its oracle cannot read."""

    @property
    def decided(self) -> Bools:
        """Pairs of which one response is known to be the better one."""
        decided: Bools = ~np.isnan(self.better) & (self.better != 0.5)
        return decided


def truths(rows: Sequence[Mapping[str, Any]]) -> dict[Kind, Truth]:
    """Every kind of truth that is known of at least one pair, people's first."""
    found = (_by_people(rows), _by_oracle(rows))
    return {truth.kind: truth for truth in found if truth.decided.any()}


def the_truth(rows: Sequence[Mapping[str, Any]], kind: Kind | None = None) -> Truth:
    """The truth of that kind, or the only one there is.

    Raises BadInput where there is none, or there are two and nothing says which.
    """
    found = truths(rows)
    if not found:
        raise BadInput(NONE)
    if kind is None:
        if len(found) > 1:
            raise BadInput(f"found the truth of {' and of '.join(found)}, expected --truth to say which of them")
        (kind,) = found
    if kind not in found:
        raise BadInput(f"--truth {kind}: no pair of this run has that, expected {' or '.join(found)}")
    return found[kind]


def _by_people(rows: Sequence[Mapping[str, Any]]) -> Truth:
    better = np.array([row.get("human", np.nan) for row in rows], dtype=float)
    return Truth("human", better, np.zeros(len(rows), dtype=bool))


def _by_oracle(rows: Sequence[Mapping[str, Any]]) -> Truth:
    of_world = np.array([any(tag.startswith(TOPIC) for tag in row["tags"]) for row in rows], dtype=bool)
    better = np.full(len(rows), np.nan)
    for i in np.flatnonzero(of_world).tolist():
        better[i] = _gold(rows[i])
    return Truth("oracle", better, of_world & np.isnan(better))


def _gold(row: Mapping[str, Any]) -> float:
    from cai.micro.oracle import gold_score

    a, b = (gold_score(row["prompt"], row[side]["text"]) for side in "ab")
    return float("nan") if a is None or b is None else 0.5 * (1 + np.sign(a - b))
