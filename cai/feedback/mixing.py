"""People's labels beside a judge's: which of the two a pair takes, and how often they agree.

Bai et al. 2022 (arXiv 2212.08073, section 4.1) take helpfulness from people and harmlessness from the constitution:
that is a mix by tag. A mix by share leaves out as few pairs as it can. Hashes of prompt and texts say which, so that
the order of rows and of the two responses makes no difference.

Left out: weighing the two labels of one pair against each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cai.feedback.calibration import confidence
from cai.feedback.labels import Bools, Floats
from cai.maths.statistics import rate
from cai.storage.rows import Preference, stable_id, stable_seed


class Pair(NamedTuple):
    """Two responses to one prompt, by whomever they were compared."""

    key: str
    """The same for the same prompt and texts."""
    tags: Sequence[str]
    label: Sequence[str]
    """Tells apart what was said of the same pair: the text that people chose, or who judged it."""


def judged(row: Mapping[str, Any]) -> Pair:
    """The pair of a vote row."""
    key = _key(row["prompt_id"], row["a"]["text"], row["b"]["text"])
    return Pair(key, row["tags"], [row["id"], row["judge"], row["constitution"]])


def chosen_by_people(row: Preference) -> Pair:
    """The pair of a human preference."""
    chosen, rejected = row["chosen"][-1]["content"], row["rejected"][-1]["content"]
    return Pair(_key(row["prompt_id"], chosen, rejected), row["tags"], [chosen])


def by_tag(ours: Sequence[Pair], human: Sequence[Pair], tags: Sequence[str]) -> tuple[Bools, Bools]:
    """Which of the judge's and of people's labels stay, if people's are for the pairs with one of `tags` alone."""
    of_people = [
        np.array([not set(tags).isdisjoint(pair.tags) for pair in pairs], dtype=bool) for pairs in (ours, human)
    ]
    return ~of_people[0], of_people[1]


def by_share(ours: Sequence[Pair], human: Sequence[Pair], share: float) -> tuple[Bools, Bools]:
    """Which of the judge's and of people's labels stay, if people's are to be this share: of each as many as fit.

    A pair with both labels keeps one of them, that of the side which is short. Of A labels of the judge alone, H of
    people alone and B pairs with both then min((A + B) / (1 - share), (H + B) / share, A + B + H) stay.
    """
    n_ours, n_human = (Counter(pair.key for pair in pairs) for pairs in (ours, human))
    both = n_ours.keys() & n_human.keys()
    n = [sum(count for key, count in side.items() if key not in both) for side in (n_ours, n_human)]
    is_human = {}
    for key in sorted(both, key=lambda key: _draw("label", key)):
        is_human[key] = n[1] * (1 - share) < n[0] * share
        n[is_human[key]] += (n_human if is_human[key] else n_ours)[key]
    total = min(n[0] / (1 - share), n[1] / share)
    stays = []
    for pairs, people, wanted in ((ours, False, total * (1 - share)), (human, True, total * share)):
        candidates = [i for i, pair in enumerate(pairs) if is_human.get(pair.key, people) == people]
        candidates.sort(key=lambda i: (_draw("stays", pairs[i].key), _draw("said", *pairs[i].label)))
        kept = np.zeros(len(pairs), dtype=bool)
        kept[candidates[: round(wanted)]] = True
        stays.append(kept)
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


def _draw(what: str, *of: str) -> float:
    """Between 0 and 1."""
    return stable_seed("mix", what, *of) / 2**63
