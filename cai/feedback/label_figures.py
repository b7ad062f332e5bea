"""Figures of preferences before anything is trained on them: confidence, length, behaviours that win, accuracy.

The truth is known for prompts of the embedded world alone, whose oracle scores a response. Labels are measured on
held-out prompts where there are any. A pair whose responses the oracle scores alike is a tie, which says nothing about
labels; a pair with a response that the oracle cannot read is counted as unclear.

Preferences are added one at a time while they are written; only numbers are kept of each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cai.feedback.truth import MeasuredOn, is_of_embedded_world, n_failed_pairs
from cai.maths.behaviours import DETECTORS, n_words
from cai.maths.statistics import RateFigure, rate
from cai.maths.vote_aggregation import Floats
from cai.storage.rows import Preference, is_held_out, topic_of

MAX_DETECTED = 1000
"""Pairs that the text detectors read, evenly spread: they take longer than all other figures."""


class LabelStatistics:
    """Numbers of each preference, added in order: 100,000 preferences fit in memory without their texts."""

    def __init__(self, n_preferences: int) -> None:
        self.p_chosen: list[float] = []
        self.sign_of_chosen: list[float] = []
        """1 where *a* of the judged pair is chosen, -1 where *b* is; NaN without a judge."""
        self.gold_margins: list[float] = []
        """Oracle's score of the chosen response minus that of the rejected one; NaN where it has none."""
        self.held_out: list[bool] = []
        self.clusters: list[str] = []
        self.word_counts: list[tuple[int, int]] = []
        """Words of the chosen and of the rejected response."""
        self.detected: dict[str, dict[str, list[float]]] = {name: {"chosen": [], "rejected": []} for name in DETECTORS}
        """Values of each text detector by side, for every `self.detector_step`-th pair."""
        self.detector_step = -(-n_preferences // MAX_DETECTED)
        self.acts: dict[str, Counter[str]] = {}
        """Counts of "winning act over losing act" by class of request in the embedded world."""

    def add(self, preference: Preference, a_is_chosen: bool | None = None) -> None:
        """Records the numbers of the next preference; `a_is_chosen` is None without a judge."""
        texts = {"chosen": preference["chosen"][-1]["content"], "rejected": preference["rejected"][-1]["content"]}
        is_of_world = is_of_embedded_world(preference["tags"])
        if len(self.p_chosen) % self.detector_step == 0:
            for name, detector in DETECTORS.items():
                for side, text in texts.items():
                    self.detected[name][side].append(float(detector(text)))
        self.p_chosen.append(preference["p_chosen"])
        self.sign_of_chosen.append(np.nan if a_is_chosen is None else 1.0 if a_is_chosen else -1.0)
        self.held_out.append(is_held_out(preference))
        self.clusters.append(topic_of(preference["tags"], preference["prompt_id"]))
        self.word_counts.append((n_words(texts["chosen"]), n_words(texts["rejected"])))
        self.gold_margins.append(self._gold_margin(preference, texts) if is_of_world else np.nan)

    @property
    def n_uneven(self) -> int:
        """Preferences for one of the two responses."""
        return sum(p != 0.5 for p in self.p_chosen)

    def _gold_margin(self, preference: Preference, texts: dict[str, str]) -> float:
        """The oracle's margin; counts the acts of both responses."""
        from cai.micro.oracle import gold_score, read

        prompt = preference["prompt"]
        chosen, rejected = read(prompt, texts["chosen"]), read(prompt, texts["rejected"])
        if chosen.kind is not None:
            acts = f"{chosen.act or 'unclear'} over {rejected.act or 'unclear'}"
            self.acts.setdefault(chosen.kind, Counter())[acts] += 1
        better, worse = gold_score(prompt, texts["chosen"]), gold_score(prompt, texts["rejected"])
        return float("nan") if better is None or worse is None else better - worse

    def figures(self, principles: Sequence[str], log_odds: Floats, judge_folders: Sequence[Path]) -> dict[str, Any]:
        """Figures of all preferences; those from `accuracy` on only where the oracle knows any of their prompts.

        `log_odds` are those of the principles that *a* is better, for the preferences with a judge, which come first:
        (preferences, principles), NaN where a principle did not vote. Pairs that a judge in `judge_folders` failed on
        widen the bounds of the accuracy.
        """
        p, gold = np.array(self.p_chosen), np.array(self.gold_margins)
        votes = np.full((len(p), len(principles)), np.nan)  # log-odds that the chosen response is better
        votes[: len(log_odds)] = np.array(self.sign_of_chosen[: len(log_odds)])[:, None] * log_odds
        held_out = np.array(self.held_out, dtype=bool)
        measured_on: MeasuredOn = "held_out" if held_out.any() else "all"
        is_measured = held_out if held_out.any() else np.ones(len(p), dtype=bool)
        is_decided = is_measured & ~np.isnan(gold) & (gold != 0)
        figures: dict[str, Any] = {
            "pairs": len(p),
            "mean_confidence": float(p.mean()),
            "undecided": int((p == 0.5).sum()),
            "longer_wins": self._longer_wins(),
            "behaviours": {
                name: {side: float(np.mean(values)) for side, values in by_side.items()}
                for name, by_side in self.detected.items()
            },
            "principles": principle_figures(principles, votes, np.where(is_decided, gold, np.nan)),
        }
        if not np.isnan(gold).all():
            is_correct = (gold > 0) & (p > 0.5)  # an even label is not correct
            figures["accuracy"] = rate(
                is_correct[is_decided].astype(float).tolist(),
                [self.clusters[row] for row in np.flatnonzero(is_decided)],
                missing=n_failed_pairs(judge_folders, "oracle", measured_on),
            ).as_json()
            figures["measured_on"] = measured_on
            figures["ties"] = int((is_measured & (gold == 0)).sum())
            figures["unclear"] = int((is_measured & np.isnan(gold)).sum())
            figures["acts"] = {kind: dict(counts.most_common()) for kind, counts in sorted(self.acts.items())}
        return figures

    def _longer_wins(self) -> RateFigure | None:
        """Rate of pairs of different length, in words, whose longer response is chosen; None without such pairs."""
        word_counts = np.array(self.word_counts)
        rows = np.flatnonzero(word_counts[:, 0] != word_counts[:, 1]).tolist()
        longer_is_chosen = (word_counts[rows, 0] > word_counts[rows, 1]).astype(float)
        return rate(longer_is_chosen.tolist(), [self.clusters[row] for row in rows]).as_json() if rows else None


def principle_figures(principles: Sequence[str], votes: Floats, gold: Floats) -> dict[str, dict[str, Any]]:
    """Figures of each principle that voted, by its id: its mean |log-odds| in nats, and how often it agrees.

    `agreement` is the share of votes for the chosen response. `agreement_with_gold` is the share for the response with
    the higher oracle score, by the margins `gold` (preferences,), NaN where there is none. That is no accuracy: a
    principle about one aspect may rightly favour the other response.
    """
    figures: dict[str, dict[str, Any]] = {}
    for column, id in sorted(enumerate(principles), key=lambda numbered: numbered[1]):
        vote = votes[:, column]
        has_vote = ~np.isnan(vote)
        if not has_vote.any():
            continue
        figures[id] = {
            "pairs": int(has_vote.sum()),
            "mean_strength": float(np.abs(vote[has_vote]).mean()),
            "agreement": float((vote[has_vote] > 0).mean()),
        }
        has_gold = has_vote & ~np.isnan(gold)
        if has_gold.any():
            figures[id]["agreement_with_gold"] = float((vote[has_gold] * gold[has_gold] > 0).mean())
    return figures
