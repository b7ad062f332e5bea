"""People's labels beside a judge's: which of the two a pair takes, and how often they agree.

Bai et al. 2022 (arXiv 2212.08073, section 4.1) take helpfulness from people and harmlessness from the constitution:
that is a mix by tag. A mix by share leaves out as few pairs as it can. Hashes of prompt and texts say which, so that
the order of rows and of the two responses makes no difference.

Left out: weighing the two labels of one pair against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cai.feedback.calibration import confidence
from cai.feedback.labels import Bools, Floats
from cai.records import Preference, stable_id, stable_seed
from cai.statistics import rate


class Pair(NamedTuple):
    """Two responses to one prompt, by whomever they were compared."""

    key: str
    """The same for the same prompt and texts."""
    tags: Sequence[str]


def judged(row: Mapping[str, Any]) -> Pair:
    """The pair of a vote row."""
    return Pair(_key(row["prompt_id"], row["a"]["text"], row["b"]["text"]), row["tags"])


def chosen_by_people(row: Preference) -> Pair:
    """The pair of a human preference."""
    return Pair(_key(row["prompt_id"], row["chosen"][-1]["content"], row["rejected"][-1]["content"]), row["tags"])


def by_tag(ours: Sequence[Pair], human: Sequence[Pair], tags: Sequence[str]) -> tuple[Bools, Bools]:
    """Which of the judge's and of people's labels stay, if people's are for the pairs with one of `tags` alone."""
    of_people = [
        np.array([not set(tags).isdisjoint(pair.tags) for pair in pairs], dtype=bool) for pairs in (ours, human)
    ]
    return ~of_people[0], of_people[1]


def by_share(ours: Sequence[Pair], human: Sequence[Pair], share: float) -> tuple[Bools, Bools]:
    """Which of the judge's and of people's labels stay, if people's are to be this share: of each as many as fit.

    A pair with both labels keeps one of them, people's with a probability of `share`.
    """
    both = {pair.key for pair in ours} & {pair.key for pair in human}
    stays = []
    for pairs, is_human in ((ours, False), (human, True)):
        theirs = [pair.key not in both or (_draw("label", pair.key) < share) == is_human for pair in pairs]
        stays.append(np.array(theirs, dtype=bool))
    total = min(stays[0].sum() / (1 - share), stays[1].sum() / share)
    for pairs, kept, wanted in ((ours, stays[0], total * (1 - share)), (human, stays[1], total * share)):
        candidates = sorted(np.flatnonzero(kept).tolist(), key=lambda i: _draw("stays", pairs[i].key))
        kept[candidates[round(wanted) :]] = False
    return stays[0], stays[1]


def people_say(rows: Sequence[Mapping[str, Any]], human: Sequence[Preference]) -> Floats:
    """Probability that *a* is better by people, (rows,): the row's own `human`, or a preference for the same pair."""
    chosen: dict[str, list[str]] = {}
    for preference in human:
        chosen.setdefault(chosen_by_people(preference).key, []).append(preference["chosen"][-1]["content"])
    found = np.full(len(rows), np.nan)
    for i, row in enumerate(rows):
        if "human" in row:
            found[i] = row["human"]
        elif texts := chosen.get(judged(row).key):
            found[i] = np.mean([text == row["a"]["text"] for text in texts])
    return found


def agreement(log_odds: Floats, better: Floats, clusters: Sequence[str]) -> dict[str, Any]:
    """How often the judge is on people's side, where both have one; an even label is so by half.

    `value` is None, and `why` says so, where no pair has labels of both.
    """
    both = np.flatnonzero(~np.isnan(log_odds) & ~np.isnan(better) & (better != 0.5))
    _, right = confidence(log_odds[both], better[both])
    found = rate(right.tolist(), [clusters[i] for i in both.tolist()]).as_json()
    return found if both.size else found | {"why": "no pair has labels of both"}


def _key(prompt_id: str, one: str, other: str) -> str:
    return stable_id("pair", prompt_id, sorted((one, other)))


def _draw(what: str, key: str) -> float:
    """Between 0 and 1."""
    return stable_seed("mix", what, key) / 2**63
