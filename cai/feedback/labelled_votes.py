"""The rule that turns votes into labels, and the votes behind a finished stage's labels.

A `prefer` stage applies the rule and writes it beside its rows. Whoever explains or measures the labels of the stage
reads the rule back instead of the stage's config.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from cai.feedback.stored_votes import read_votes
from cai.maths.behaviours import n_words
from cai.maths.vote_aggregation import Floats, aggregate_votes, mean_over_orders, sigmoid
from cai.storage import run_folder
from cai.storage.files import read_json, write_json
from cai.storage.journal import RECORDS
from cai.storage.rows import topic_of
from cai.storage.stage_folders import stale_note
from cai.text.errors import BadInput, did_you_mean

LABEL_RULE = "label_rule.json"
LabelKind = Literal["soft", "hard", "clamp"]


@dataclass(frozen=True)
class LabelRule:
    """Parameters of a pair's log-odds l = sum of w_i l_i / T, and of the label that is made of them."""

    weights: Mapping[str, float]
    """Weight of each principle that voted, by its id; factors of tags are included."""
    temperature: float | None = None
    """T; None divides by the sum of weights."""
    is_temperature_fitted: bool = False
    """Whether T was fitted, on prompts that are not held out."""
    points_per_nat: float | None = None
    """What votes of a judge that rates, in points, are divided by before they are aggregated; None without any."""
    is_points_per_nat_fitted: bool = False
    """Whether that was fitted, on prompts that are not held out."""
    abstain_below: float = 0.0
    """Nats from even below which a principle's log-odds do not count."""
    min_confidence: float = 0.5
    """Probability of the preferred response below which a pair gets no label."""
    tie_below: float = 0.0
    """Nats from even up to which a pair counts as a tie."""
    labels: LabelKind = "soft"
    """soft: the probability; hard: its side; clamp: the probability within the bounds `clamp`."""
    clamp: tuple[float, float] | None = None
    methods: tuple[str, ...] = ()
    """How the judges were asked: pairwise, reasoned, rating."""

    def aggregate(self, log_odds: Floats, principles: Sequence[str], *, without: str | None = None) -> Floats:
        """Log-odds of each pair, (pairs,), from those of its principles, (pairs, principles); NaN where all abstain.

        `without` is the id of a principle that gets weight 0.
        """
        weights = np.array([0.0 if id == without else self.weights[id] for id in principles], dtype=float)
        return aggregate_votes(log_odds, weights, temperature=self.temperature, abstain_below=self.abstain_below)

    def p_chosen(self, strength: Floats) -> Floats:
        """Labels of pairs from the log-odds that their chosen response is the better one, at least 0; both (pairs,)."""
        if self.labels == "hard":
            return np.ones_like(strength)
        p = sigmoid(strength)
        return p if self.clamp is None else np.minimum(p, self.clamp[1])

    def write(self, folder: Path) -> None:
        """Writes the rule into the folder of a stage."""
        write_json(folder / LABEL_RULE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The rule that a finished `prefer` stage wrote. Raises BadInput where the folder has none."""
        fields = read_json(folder / LABEL_RULE)
        if fields is None:
            raise BadInput(
                f"{folder}: found no {LABEL_RULE}, expected the rule of its labels; an earlier version made this "
                "stage: remove its folder and run the recipe again"
            )
        clamp = fields["clamp"] and tuple(fields["clamp"])
        return cls(**{**fields, "clamp": clamp, "methods": tuple(fields["methods"])})


@dataclass(frozen=True)
class LabelledVotes:
    """Votes on pairs. `ab` and `ba` are log-odds by order in nats, (pairs, principles), NaN without a vote."""

    name: str
    """Name of the run, or RUN/STAGE."""
    rows: Sequence[Mapping[str, Any]]
    """Rows of the pairs; their `votes` are not read."""
    principles: Sequence[str]
    ab: Floats
    ba: Floats
    rule: LabelRule
    judge_folders: Sequence[Path] = ()
    """Folders of the stages that made the votes."""
    prefer_folder: Path | None = None
    """Folder of the stage that made the labels; None where they are of no such stage."""
    stale_note: str | None = None
    """Where the labels are stale: a sentence that says so, why, and what computes them again."""

    @functools.cached_property
    def log_odds(self) -> Floats:
        """Mean log-odds of both orders, (pairs, principles)."""
        return mean_over_orders(self.ab, self.ba)

    def labels(self, *, without: str | None = None) -> Floats:
        """Log-odds of each pair's label, (pairs,), 0 where it has none; `without` names a principle of weight 0."""
        log_odds = self.rule.aggregate(self.log_odds, self.principles, without=without)
        has_label = ~np.isnan(log_odds) & (np.abs(log_odds) > self.rule.tie_below)
        has_label &= sigmoid(np.abs(log_odds)) >= self.rule.min_confidence
        return np.where(has_label, log_odds, 0.0)

    def unlabelled(self) -> dict[str, int]:
        """Why pairs have no label, in words that follow "are", with the number of pairs."""
        log_odds = self.rule.aggregate(self.log_odds, self.principles)
        abstained = np.isnan(log_odds)
        is_tie = ~abstained & (np.abs(log_odds) <= self.rule.tie_below)
        unsure = ~abstained & ~is_tie & (sigmoid(np.abs(log_odds)) < self.rule.min_confidence)
        even = f"within {self.rule.tie_below:g} nats of even" if self.rule.tie_below else "exactly even"
        reasons = {
            even: is_tie,
            f"below min_confidence {self.rule.min_confidence:g}": unsure,
            "without a principle that has a say": abstained,
        }
        return {reason: int(rows.sum()) for reason, rows in reasons.items() if rows.any()}

    @property
    def behaviours(self) -> Mapping[str, Mapping[str, float]] | None:
        """Means of text detectors by name over `chosen` and `rejected` responses; None where the stage has none."""
        facts: dict[str, Any] = (self.prefer_folder and read_json(self.prefer_folder / run_folder.STAGE)) or {}
        behaviours: dict[str, dict[str, float]] | None = facts.get("figures", {}).get("labels", {}).get("behaviours")
        return behaviours

    def has_files_of(self, other: LabelledVotes) -> bool:
        """Whether votes and the rule are read from the same files as those of `other`, as in a fork of its run."""
        own_files, other_files = self._files(), other._files()
        return len(own_files) == len(other_files) and all(map(os.path.samefile, own_files, other_files))

    def _files(self) -> list[Path]:
        rules = [self.prefer_folder / LABEL_RULE] if self.prefer_folder else []
        return [*(folder / RECORDS for folder in self.judge_folders), *rules]

    @functools.cached_property
    def topics(self) -> list[str]:
        """Topic of each pair, by which intervals are clustered."""
        return [topic_of(row["tags"], row["prompt_id"]) for row in self.rows]

    @functools.cached_property
    def extra_words(self) -> Floats:
        """Number of words that *a* has more than *b*, (pairs,)."""
        return np.array([n_words(row["a"]["text"]) - n_words(row["b"]["text"]) for row in self.rows], dtype=float)


def load_labelled_votes(name: str, runs_folder: Path) -> LabelledVotes:
    """The votes behind a finished `prefer` stage, named RUN, or RUN/STAGE where the run has several.

    Raises BadInput where there is no such stage, or its labels come from human pairs alone.
    """
    run, stage_id = find_prefer_stage(name, runs_folder)
    folder = run_folder.latest(run)[stage_id]
    judge_folders = [run / stage["folder"] for stage in read_json(folder / run_folder.STAGE)["inputs"].values()]
    if not judge_folders:
        raise BadInput(f"{name}: {stage_id} has labels of people alone, and no votes to explain")
    return replace(labelled_votes(name, judge_folders, folder), stale_note=stale_note(run, [stage_id]))


def labelled_votes(name: str, judge_folders: Sequence[Path], prefer_folder: Path) -> LabelledVotes:
    """The votes of judge stages under the rule of a finished `prefer` stage."""
    rule = LabelRule.read(prefer_folder)
    votes = read_votes(judge_folder / RECORDS for judge_folder in judge_folders)
    ab, ba = votes.log_odds_by_order(rule.points_per_nat)
    rows = list(votes.parsed_rows())
    return LabelledVotes(name, rows, votes.principles, ab, ba, rule, judge_folders, prefer_folder)


def find_prefer_stage(name: str, runs_folder: Path) -> tuple[Path, str]:
    """The folder of a run and the id of its finished `prefer` stage; `name` is RUN or RUN/STAGE. Raises BadInput."""
    stage_id = None
    try:
        run = run_folder.find_run(name, runs_folder)
    except BadInput:
        run_name, _, stage_id = name.rpartition("/")
        if not run_name:
            raise
        run = run_folder.find_run(run_name, runs_folder)
    prefer_stages = [
        id
        for id, folder in run_folder.latest(run).items()
        if run_folder.finished(folder) and read_json(folder / run_folder.STAGE)["kind"] == "prefer"
    ]
    if stage_id is None and len(prefer_stages) == 1:
        return run, prefer_stages[0]
    if stage_id in prefer_stages:
        return run, stage_id
    expected = ", ".join(f"{run.name}/{id}" for id in prefer_stages) or "a run whose `prefer` stage is done"
    raise BadInput(f"found {name!r}, expected {expected}" + (did_you_mean(stage_id, prefer_stages) if stage_id else ""))
