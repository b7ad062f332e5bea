"""People's labels beside a judge's: which of the two a pair keeps, and how often they agree.

Bai et al. 2022 (arXiv 2212.08073, section 4.1) take helpfulness from people and harmlessness from the constitution:
that is a mix by tag. A mix by share leaves out as few pairs as possible. Hashes of prompt and texts decide which, so
that the order of rows and of the two responses makes no difference.

Left out: weighting the two labels of one pair against each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cai.maths.calibration import confidence_and_correctness
from cai.maths.statistics import rate
from cai.maths.vote_aggregation import Bools, Floats
from cai.storage.rows import Preference, stable_id, stable_seed


class LabelledPair(NamedTuple):
    """Two responses to one prompt, labelled by a judge or by people."""

    key: str
    """Equal for the same prompt and texts, in either order."""
    tags: Sequence[str]
    label: Sequence[str]
    """Identifies one of several labels of the same pair: the text that people chose, or the judge."""


Pairs = Sequence[LabelledPair]


def pair_of_vote(row: Mapping[str, Any]) -> LabelledPair:
    """The pair of a vote row."""
    key = _pair_key(row["prompt_id"], row["a"]["text"], row["b"]["text"])
    return LabelledPair(key, row["tags"], [row["id"], row["judge"], row["constitution"]])


def pair_of_preference(row: Preference) -> LabelledPair:
    """The pair of a human preference."""
    chosen, rejected = row["chosen"][-1]["content"], row["rejected"][-1]["content"]
    return LabelledPair(_pair_key(row["prompt_id"], chosen, rejected), row["tags"], [chosen])


def keep_by_tag(ai_pairs: Pairs, human_pairs: Pairs, human_tags: Sequence[str]) -> tuple[Bools, Bools]:
    """Whether each of the judge's and of people's labels is kept: people's for pairs with one of the tags."""
    ai_has_tag, human_has_tag = (
        np.array([not set(human_tags).isdisjoint(pair.tags) for pair in pairs], dtype=bool)
        for pairs in (ai_pairs, human_pairs)
    )
    return ~ai_has_tag, human_has_tag


def keep_by_share(ai_pairs: Pairs, human_pairs: Pairs, human_share: float) -> tuple[Bools, Bools]:
    """Whether each of the judge's and of people's labels is kept: as many as possible with that share of people's.

    A pair with both labels keeps the label of the side that is short. Of A labels of the judge alone, H of people alone
    and B pairs with both then min((A + B) / (1 - share), (H + B) / share, A + B + H) are kept.
    """
    ai_counts, human_counts = (Counter(pair.key for pair in pairs) for pairs in (ai_pairs, human_pairs))
    keys_of_both = ai_counts.keys() & human_counts.keys()
    n_ai, n_human = (
        sum(count for key, count in counts.items() if key not in keys_of_both) for counts in (ai_counts, human_counts)
    )
    takes_human_label: dict[str, bool] = {}
    for key in sorted(keys_of_both, key=lambda key: _hash_rank("label", key)):
        takes_human_label[key] = n_human * (1 - human_share) < n_ai * human_share
        if takes_human_label[key]:
            n_human += human_counts[key]
        else:
            n_ai += ai_counts[key]
    n_kept = min(n_ai / (1 - human_share), n_human / human_share)
    keep_ai = _keep_by_hash(ai_pairs, takes_human_label, False, n_kept * (1 - human_share))
    keep_human = _keep_by_hash(human_pairs, takes_human_label, True, n_kept * human_share)
    return keep_ai, keep_human


def _keep_by_hash(pairs: Pairs, takes_human_label: Mapping[str, bool], is_human: bool, n_kept: float) -> Bools:
    """Whether each pair is among the `n_kept` lowest hashes of the pairs whose label comes from this side."""
    candidates = [i for i, pair in enumerate(pairs) if takes_human_label.get(pair.key, is_human) == is_human]
    candidates.sort(key=lambda i: (_hash_rank("stays", pairs[i].key), _hash_rank("said", *pairs[i].label)))
    is_kept = np.zeros(len(pairs), dtype=bool)
    is_kept[candidates[: round(n_kept)]] = True
    return is_kept


def human_p_a_better(rows: Sequence[Mapping[str, Any]], human_preferences: Sequence[Preference]) -> Floats:
    """Probability that *a* is better by people, (rows,), NaN where nobody labelled the pair.

    It is the row's own `human`, or the mean over the preferences for the same pair.
    """
    chosen_texts: dict[str, list[str]] = {}
    for preference in human_preferences:
        chosen_texts.setdefault(pair_of_preference(preference).key, []).append(preference["chosen"][-1]["content"])
    p_a_better = np.full(len(rows), np.nan)
    for i, row in enumerate(rows):
        if "human" in row:
            p_a_better[i] = row["human"]
        elif texts := chosen_texts.get(pair_of_vote(row).key):
            p_a_better[i] = np.mean([text == row["a"]["text"] for text in texts])
    return p_a_better


def agreement_with_people(log_odds: Floats, p_a_better: Floats, clusters: Sequence[str]) -> Mapping[str, Any]:
    """How often the judge's label agrees with people's, where both have a side; an even label agrees by half.

    `value` is None, and `why` says so, where no pair has labels of both.
    """
    rows = np.flatnonzero(~np.isnan(log_odds) & ~np.isnan(p_a_better) & (p_a_better != 0.5))
    _, correct = confidence_and_correctness(log_odds[rows], p_a_better[rows])
    figures = rate(correct.tolist(), [clusters[row] for row in rows.tolist()]).as_json()
    return figures if rows.size else {**figures, "why": "no pair has labels of both"}


def _pair_key(prompt_id: str, *texts: str) -> str:
    return stable_id("pair", prompt_id, sorted(texts))


def _hash_rank(salt: str, *parts: str) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    return stable_seed("mix", salt, *parts) / 2**63
